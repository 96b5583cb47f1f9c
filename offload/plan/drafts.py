"""What drafting takes: the block that predicts tokens, if it is wanted, its memory, and why nothing may be drafted."""

from collections.abc import Sequence

from gguf import GGMLQuantizationType

from slimoe.offload.gguf.header import GGUFFile
from slimoe.offload.graph.token_rows import row_bytes
from slimoe.offload.memory.kv_cache import kv_bytes
from slimoe.offload.model.mtp_block import MtpBlock, mtp_block
from slimoe.offload.model.spec import ModelSpec
from slimoe.offload.model.tensors import ModelSources
from slimoe.offload.plan.engine_config import EngineConfig
from slimoe.offload.plan.weight_forms import compute_bytes

_ROWS_OF_STORING = 12
"""Rows of hidden states that storing a token's keys and values takes, its own and the model's beside it."""


def undraftable(config: EngineConfig) -> str | None:
    """What speaks against drafting tokens, as the end of a sentence; None where nothing does."""
    if config.loss.lossy is not None or config.loss.max_kl:
        return "what a lossy mode gives up is measured for one token at a time"
    if config.trace is not None:
        return "a recording of the selected experts is one of the answer's tokens alone"
    return None


def wanted_block(
    config: EngineConfig, gguf: GGUFFile, spec: ModelSpec, sources: ModelSources, devices: Sequence[object]
) -> MtpBlock | None:
    """The block that drafts tokens, where it is asked for, the file has it and only the CPU computes.

    Raises ModelFileError for a damaged one.
    """
    if config.draft not in ("mtp", "auto") or undraftable(config) or devices:
        return None
    return mtp_block(gguf, spec, sources)


def draft_note(config: EngineConfig, block: MtpBlock | None, devices: Sequence[object]) -> str | None:
    """The sentence that says why no tokens are drafted although they were asked for; None where nothing is amiss.

    `block` is the one that the plan has, `devices` are those that it computes on.
    """
    problem = None if config.draft == "none" else undraftable(config)
    if config.draft == "mtp" and block is None and problem is None:
        problem = "the file has no block that predicts tokens, or none that can be run"
        if devices:
            problem = "only the CPU runs the block that predicts tokens; --device none leaves devices out"
    return None if problem is None else f"No tokens are drafted (--draft {config.draft}): {problem}."


def block_bytes(block: MtpBlock, n_cells: int, n_batch: int, n_parallel: int, kind: GGMLQuantizationType) -> int:
    """Bytes of host memory that a block takes: weights with all its experts, keys and values, intermediate results."""
    table, stored = row_bytes(block.sources.token_embd, n_batch), 4 * n_batch * _ROWS_OF_STORING * block.spec.n_embd
    kv = kv_bytes(block.spec, n_cells, kind, {block.index})
    weights = sum(source.n_bytes for source in block.weights)
    return weights + kv + table + stored + compute_bytes(block.spec, n_cells, n_parallel)
