"""What drafting takes: the block that predicts tokens, if it is wanted, its memory, and why nothing may be drafted.

Where devices compute, the block is computed by the last of them, beside the output matrix, of which it makes use.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from slimoe.offload.gguf.header import GGUFFile
from slimoe.offload.graph.token_rows import row_bytes
from slimoe.offload.memory.kv_cache import KVSize, kv_bytes
from slimoe.offload.model.mtp_block import MOST_WAITING, MtpBlock, mtp_block
from slimoe.offload.model.regrouped import join_layers
from slimoe.offload.model.spec import ModelSpec
from slimoe.offload.model.tensors import ModelSources
from slimoe.offload.plan.device_plan import DevicePlan
from slimoe.offload.plan.device_steps import StepNeeds, not_computed
from slimoe.offload.plan.device_support import is_layer_computed
from slimoe.offload.plan.engine_config import EngineConfig
from slimoe.offload.plan.weight_forms import compute_bytes

_ROWS_OF_STORING = 12
"""Rows of hidden states that storing a token's keys and values takes, where the block is computed."""
_ROWS_OF_HOST = 4
"""And in host memory: the token's row, and hidden states of the model, as they come and as they are handed on."""


def undraftable(config: EngineConfig) -> str | None:
    """What speaks against drafting tokens, as the end of a sentence; None where nothing does."""
    if config.loss.lossy is not None or config.loss.max_kl:
        return "what a lossy mode gives up is measured for one token at a time"
    if config.trace is not None:
        return "a recording of the selected experts is one of the answer's tokens alone"
    return None


def wanted_block(config: EngineConfig, gguf: GGUFFile, spec: ModelSpec, sources: ModelSources) -> MtpBlock | None:
    """The block that drafts tokens, where it is asked for and the file has one.

    Raises ModelFileError for a damaged one.
    """
    if config.draft not in ("mtp", "auto") or undraftable(config):
        return None
    return mtp_block(gguf, spec, sources)


class Planned(Protocol):
    """What is asked of a plan, with the block or without."""

    @property
    def devices(self) -> Sequence[DevicePlan]:
        """The devices that compute layers."""

    @property
    def shortfall(self) -> object | None:
        """What the plan lacks, None where it lacks nothing."""

    @property
    def mtp(self) -> MtpBlock | None:
        """The block that drafts tokens."""

    @property
    def is_resident(self) -> bool:
        """Whether the whole model is in host memory."""

    @property
    def kv(self) -> KVSize:
        """The size of the KV cache."""

    @property
    def n_batch(self) -> int:
        """The most tokens of a step."""

    @property
    def n_parallel(self) -> int:
        """The most requests at once, of which the block predicts tokens in one step."""


Plan = TypeVar("Plan", bound=Planned)


def with_or_without(
    config: EngineConfig, block: MtpBlock | None, n_devices: int, plan: Callable[[MtpBlock | None], Plan]
) -> tuple[Plan, tuple[str, ...]]:
    """The plan with the block, or without where that is better, and notes about what drafts.

    Under auto the block's memory is of more use to experts, and that of a device which nobody named to its layers.
    There are `n_devices` to choose from.
    """
    chosen, why = _chosen(config, block, n_devices, plan)
    n_more = 0 if chosen.mtp is None else chosen.mtp.spec.n_layer_nextn
    several = f"Of the {1 + n_more} blocks that predict tokens the first drafts, the others are not used."
    note = draft_note(config, chosen.mtp, why)
    return chosen, (*([note] if note else ()), *([several] if n_more else ()))


def _chosen(
    config: EngineConfig, block: MtpBlock | None, n_devices: int, plan: Callable[[MtpBlock | None], Plan]
) -> tuple[Plan, str]:
    """The plan with the block, or without where that is better, and then why, as the end of a sentence."""
    chosen = plan(block)
    if block is None:
        return chosen, ""
    if chosen.devices and (lack := _lacking(block, chosen)):
        return plan(None), lack
    is_whole = chosen.is_resident or (chosen.devices and all(device.is_whole for device in chosen.devices))
    is_auto = config.draft == "auto"
    if is_auto and (chosen.shortfall is not None or not is_whole):
        return plan(None), "its memory is of more use to experts"
    if n_devices and (is_auto or config.devices.is_automatic):
        without = plan(None)
        names, lost = ({device.device.name for device in one.devices} for one in (chosen, without))
        if lost - names:
            return without, f"{', '.join(sorted(lost - names))} would have no room for its layers then"
    return chosen, ""


def draft_note(config: EngineConfig, block: MtpBlock | None, why: str = "") -> str | None:
    """The sentence that says why no tokens are drafted although they were asked for; None where nothing is amiss.

    `block` is the one that the plan has; without it `why` says what speaks against the file's.
    """
    problem = None if config.draft == "none" else undraftable(config)
    if config.draft == "mtp" and block is None and problem is None:
        problem = why or "the file has no block that predicts tokens, or none that can be run"
    return None if problem is None else f"No tokens are drafted (--draft {config.draft}): {problem}."


def block_bytes(block: MtpBlock, kv: KVSize, n_batch: int, n_parallel: int) -> tuple[int, int]:
    """Bytes of host memory that a block takes wherever it is computed, and those that it takes where that is.

    The ones are rows of its token table, and hidden states; the others weights with all its experts, keys and values,
    and intermediate results.
    """
    rows = 4 * (n_batch * _ROWS_OF_HOST + n_parallel * MOST_WAITING) * block.spec.n_embd
    stored = 4 * n_batch * _ROWS_OF_STORING * block.spec.n_embd
    weights = sum(source.n_bytes for source in block.weights)
    cache = kv_bytes(block.spec, kv.n_cells, kv.kind, {block.index})
    of_block = weights + cache + stored + compute_bytes(block.spec, kv.n_cells, n_parallel)
    return rows + row_bytes(block.sources.token_embd, n_batch), of_block


def _lacking(block: MtpBlock, plan: Planned) -> str:
    """What the plan's last device lacks for the block, as the end of a sentence; empty if it lacks nothing."""
    device, step = plan.devices[-1].device, StepNeeds(plan.kv, plan.n_batch, plan.n_parallel)
    if lack := not_computed(device, block.spec, block.sources, step, (block.joint.weight,)):
        return lack.removesuffix(".")
    if is_layer_computed(device, block.spec.architecture, join_layers(block.sources).layers[-1]):
        return ""
    return f"{device.name} ({device.description}) does not multiply with the experts of the block that predicts them"
