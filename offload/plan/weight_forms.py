"""Decides in which form each weight lies in host memory, and how many bytes that takes. Loads nothing."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from gguf import GGMLQuantizationType

from slimoe.offload.errors import UsageError
from slimoe.offload.ggml.cpu_backend import can_repack
from slimoe.offload.graph.token_rows import row_bytes
from slimoe.offload.graph.weights import STAGED_BYTES, Form
from slimoe.offload.machine.probe import KernelSpeed
from slimoe.offload.model.regrouped import as_matrix, join_layers, without_experts
from slimoe.offload.model.spec import ModelSpec
from slimoe.offload.model.tensors import ModelSources, WeightSource
from slimoe.offload.plan.engine_config import WEIGHT_MODES

Mode = Literal["mapped", "copied", "repacked", "both"]

_JOINED = 2
"""The largest weight that is repacked is gate and up, joined."""
_WORTHWHILE = 0.97
"""A second copy must save at least 3 % of a step's time, or it is only memory."""
_TYPICAL_PROMPT, _TYPICAL_ANSWER = 512, 128


@dataclass(frozen=True, slots=True)
class WeightForms:
    """What will be in memory, in bytes, and how the matrices lie there.

    `mode` mapped: as pages of the file, shared with other processes. copied: in our own memory. repacked: those of
    the `repacked_types` rearranged, the others copied. both: all copied, and those of the `repacked_types` repacked
    as well, which serves batches from the one and single tokens from the other.
    """

    mode: Mode
    repacked_types: frozenset[GGMLQuantizationType]
    mapped: int
    copied: int
    repacked: int
    kv: int
    compute: int
    program: int
    staging: int = 0

    @property
    def required(self) -> int:
        """Bytes of everything in host memory."""
        return self.mapped + self.copied + self.repacked + self.kv + self.compute + self.program + self.staging

    def batch_form(self, source: WeightSource) -> Form:
        """The form of a weight for steps of several tokens."""
        if self.mode == "mapped":
            return "mapped"
        return "repacked" if self.mode == "repacked" and self._repacks(source) else "copied"

    def single_form(self, source: WeightSource) -> Form:
        """The form of a weight for steps of one token."""
        return "repacked" if self.mode == "both" and self._repacks(source) else self.batch_form(source)

    def repacked_beside(self, sources: ModelSources) -> tuple[int, int]:
        """Bytes of what `both` repacks of a model whose experts lie in buckets, and those of staging meanwhile.

        `sources` are the file's own.
        """
        weights = (*_weights(join_layers(without_experts(sources))), *bucket_stacks(sources))
        sizes = [source.n_bytes for source in weights if self.single_form(source) == "repacked"]
        return sum(sizes), max(sizes, default=0)

    def _repacks(self, source: WeightSource) -> bool:
        return source.type in self.repacked_types and _repackable(source)


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes of the KV cache (`kv`) and of the program itself, the cache's cells and a batch's tokens."""

    kv: int
    program: int
    n_cells: int
    n_batch: int


def bucket_stacks(sources: ModelSources) -> Iterator[WeightSource]:
    """The stacks of all buckets of experts' best copies; a stack of a single expert is a matrix."""
    for layer in sources.layers:
        if layer.buckets:
            for bucket in sorted({copies[0] for copies in layer.buckets.layout.buckets}):
                yield from map(as_matrix, layer.buckets.buckets[bucket])


def repackable_types(sources: ModelSources) -> set[GGMLQuantizationType]:
    """Types of this model's weights that can be repacked on this CPU."""
    return {source.type for source in (*_weights(sources), *bucket_stacks(sources)) if _repackable(source)}


def matrix_bytes(sources: ModelSources) -> int:
    """Bytes of all matrices of a model."""
    return sum(source.n_bytes for source in _weights(sources) if source.is_matrix)


def staging_bytes(sources: ModelSources) -> int:
    """Bytes of host memory through which weights go to a device, piece by piece."""
    return min(STAGED_BYTES, _JOINED * max(source.n_bytes for source in _weights(sources)))


def choose_weight_forms(
    sources: ModelSources,
    spec: ModelSpec,
    mode: str,
    speeds: Mapping[str, KernelSpeed],
    needs: Needs,
    available: int,
) -> WeightForms:
    """The forms that `mode` names, or for auto the fastest that fit into `available` bytes.

    If none fit, they are the smallest, and refusing them is the caller's. `speeds` are by the name of the type. Raises
    UsageError for an unknown mode.
    """
    if mode not in WEIGHT_MODES:
        raise UsageError(f"The weight mode {mode!r} is unknown. Use one of {', '.join(WEIGHT_MODES)}.")
    compute = compute_bytes(spec, needs.n_cells, needs.n_batch)
    if mode != "mapped" and sources.output.weight is not sources.token_embd:
        compute += row_bytes(sources.token_embd, needs.n_batch)
    possible = frozenset(repackable_types(sources))
    forms = WeightForms("copied", frozenset(), 0, 0, 0, needs.kv, compute, needs.program)
    if mode == "mapped":
        return _counted(sources, replace(forms, mode="mapped"))
    if mode == "copied":
        return _counted(sources, forms)
    if mode == "repacked":
        return _counted(sources, replace(forms, mode="repacked", repacked_types=possible))
    if mode == "both":
        return _counted(sources, replace(forms, mode="both", repacked_types=possible))
    known = {kind: speeds[kind.name] for kind in possible if kind.name in speeds}
    paying = {k: speed for k, speed in known.items() if speed.single_repacked < _WORTHWHILE * speed.single_plain}
    both = _counted(sources, replace(forms, mode="both", repacked_types=frozenset(paying)))
    if paying and both.required <= available:
        return both
    # One copy is better repacked if that saves time over a prompt and an answer of usual lengths.
    alone = frozenset(
        kind
        for kind, speed in paying.items()
        if _TYPICAL_ANSWER * (speed.single_plain - speed.single_repacked)
        > _TYPICAL_PROMPT / 256 * (speed.batch_repacked - speed.batch_plain)
    )
    return _counted(sources, replace(forms, mode="repacked", repacked_types=alone) if alone else forms)


def _counted(sources: ModelSources, rule: WeightForms) -> WeightForms:
    """`rule` with its byte counts filled in."""
    forms = {
        (source.name, "copied" if form == "mapped" and len(source.spans) > 1 else form): source.n_bytes
        for source in _weights(sources)
        for form in (rule.batch_form(source), rule.single_form(source))
    }
    if rule.mode == "mapped":
        forms[sources.token_embd.name, "mapped"] = sources.token_embd.n_bytes
    mapped, copied, repacked = (sum(n for (_, form), n in forms.items() if form == wanted) for wanted in get_args(Form))
    # A weight is read whole before it is repacked.
    staging = max((n for (_, form), n in forms.items() if form == "repacked"), default=0)
    return replace(rule, mapped=mapped, copied=copied, repacked=repacked, staging=_JOINED * staging)


def _repackable(source: WeightSource) -> bool:
    if not source.is_matrix or source.is_batched or (len(source.ne) == 3 and source.ne[2] < 2):
        return False
    return can_repack(source.type, source.ne[0], source.ne[1])


def _weights(sources: ModelSources) -> Iterator[WeightSource]:
    """All weights but the token table, which is among them only if it is the output matrix as well."""
    yield from sources.output.parts
    yield from sources.output_norm.parts
    if sources.rope_freqs:
        yield sources.rope_freqs
    for layer in sources.layers:
        for linear in (*layer.matrices, *layer.gate_up, *((layer.down,) if layer.down else ())):
            yield from linear.parts
        yield from layer.vectors


def compute_bytes(spec: ModelSpec, n_cells: int, n_batch: int) -> int:
    """An upper estimate of the bytes of a batch's intermediate results, F32, and of its masks, F16."""
    n_used, n_masks = max(1, spec.n_expert_used), 2 if any(spec.windowed) else 1
    n_always = max(spec.experts.n_ff_shared, spec.n_ff_dense)
    per_token = n_used * (3 * spec.n_ff + 2 * spec.n_embd) + 8 * spec.n_embd + 4 * spec.n_embd_head * spec.n_head
    per_token += 2 * spec.attention.n_decompressed + 4 * spec.n_expert_aux * spec.n_embd
    per_token += 3 * n_always + 8 * spec.n_expert * (spec.router_score == "sigmoid")
    return 4 * (n_batch * per_token + spec.n_vocab) + 2 * n_masks * n_batch * n_cells + (2 << 20)
