"""Decides in which arrangement each weight lies in memory, and what that costs. Loads nothing."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from gguf import GGMLQuantizationType

from slimoe.offload.errors import UsageError
from slimoe.offload.ggml.cpu_backend import can_repack
from slimoe.offload.graph.token_rows import row_bytes
from slimoe.offload.graph.weights import STAGED_BYTES, Form
from slimoe.offload.machine.probe import KernelSpeed
from slimoe.offload.model.spec import ModelSpec
from slimoe.offload.model.tensors import LayerSources, ModelSources, WeightSource

WEIGHT_MODES = ("auto", "mapped", "copied", "repacked", "both")
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
        """All of it."""
        return self.mapped + self.copied + self.repacked + self.kv + self.compute + self.program + self.staging

    def batch_form(self, source: WeightSource) -> Form:
        """The form of a weight for steps of several tokens."""
        if self.mode == "mapped":
            return "mapped"
        return "repacked" if self.mode == "repacked" and self._repacks(source) else "copied"

    def single_form(self, source: WeightSource) -> Form:
        """The form of a weight for steps of one token."""
        return "repacked" if self.mode == "both" and self._repacks(source) else self.batch_form(source)

    def _repacks(self, source: WeightSource) -> bool:
        return source.type in self.repacked_types and _repackable(source)


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes of the KV cache and of the program itself, cells of the cache and tokens of a batch."""

    kv: int
    program: int
    n_cells: int
    n_batch: int


def repackable_types(sources: ModelSources) -> set[GGMLQuantizationType]:
    """Types of this model that the repack buffer takes; measure these."""
    return {source.type for source in _weights(sources) if _repackable(source)}


def matrix_bytes(sources: ModelSources) -> int:
    """Bytes of all matrices."""
    return sum(source.n_bytes for source in _weights(sources) if source.is_matrix)


def staging_bytes(sources: ModelSources) -> int:
    """Host memory through which weights go to a device, piece by piece."""
    return min(STAGED_BYTES, _JOINED * max(source.n_bytes for source in _weights(sources)))


def choose_weight_forms(
    sources: ModelSources,
    spec: ModelSpec,
    mode: str,
    speeds: Mapping[str, KernelSpeed],
    needs: Needs,
    available: int,
) -> WeightForms:
    """The placement that `mode` names, or for auto the fastest that fits into `available` bytes.

    If none fits, it is the smallest, and refusing it is the caller's. Raises UsageError for an unknown mode.
    """
    if mode not in WEIGHT_MODES:
        raise UsageError(f"The weight mode {mode!r} is unknown. Use one of {', '.join(WEIGHT_MODES)}.")
    compute = compute_bytes(spec, needs.n_cells, needs.n_batch)
    if mode != "mapped" and sources.output.weight is not sources.token_embd:
        compute += row_bytes(sources.token_embd, needs.n_batch)
    possible = frozenset(repackable_types(sources))

    def place(chosen: Mode, kinds: frozenset[GGMLQuantizationType]) -> WeightForms:
        return _place(sources, WeightForms(chosen, kinds, 0, 0, 0, needs.kv, compute, needs.program))

    named: dict[str, Callable[[], WeightForms]] = {
        "mapped": lambda: place("mapped", frozenset()),
        "copied": lambda: place("copied", frozenset()),
        "repacked": lambda: place("repacked", possible),
        "both": lambda: place("both", possible),
    }
    if mode != "auto":
        return named[mode]()
    paying = frozenset(kind for kind in possible if kind.name in speeds and _pays(speeds[kind.name]))
    both = place("both", paying)
    if paying and both.required <= available:
        return both
    alone = frozenset(kind for kind in paying if _pays_alone(speeds[kind.name]))
    return place("repacked", alone) if alone else place("copied", frozenset())


def _place(sources: ModelSources, rule: WeightForms) -> WeightForms:
    """`rule` with its byte counts filled in."""
    forms = {
        (source.name, "copied" if form == "mapped" and len(source.spans) > 1 else form): source.n_bytes
        for source in _weights(sources)
        for form in (rule.batch_form(source), rule.single_form(source))
    }
    if rule.mode == "mapped":
        forms[sources.token_embd.name, "mapped"] = sources.token_embd.n_bytes
    totals = {wanted: sum(n for (_, form), n in forms.items() if form == wanted) for wanted in get_args(Form)}
    # A weight is read whole before it is rearranged.
    staging = max((n for (_, form), n in forms.items() if form == "repacked"), default=0)
    return replace(
        rule,
        mapped=totals["mapped"],
        copied=totals["copied"],
        repacked=totals["repacked"],
        staging=_JOINED * staging,
    )


def _pays(speed: KernelSpeed) -> bool:
    return speed.single_repacked < _WORTHWHILE * speed.single_plain


def _pays_alone(speed: KernelSpeed) -> bool:
    """Whether one copy is better repacked, for a prompt and an answer of usual lengths."""
    single = _TYPICAL_ANSWER * (speed.single_plain - speed.single_repacked)
    batches = _TYPICAL_PROMPT / 256
    return single > batches * (speed.batch_repacked - speed.batch_plain)


def _repackable(source: WeightSource) -> bool:
    if not source.is_matrix or (len(source.ne) == 3 and source.ne[2] < 2):
        return False
    return can_repack(source.type, source.ne[0], source.ne[1])


def _layer_weights(layer: LayerSources) -> Iterator[WeightSource]:
    linears = [linear for linear in (*layer.qkv, layer.attn_output, *layer.gate_up, layer.down) if linear]
    yield from (linear.weight for linear in linears)
    yield from (linear.bias for linear in linears if linear.bias)
    yield from layer.vectors


def _weights(sources: ModelSources) -> Iterator[WeightSource]:
    """Everything but the token table, which is here only if it is the output matrix as well."""
    yield sources.output.weight
    yield sources.output_norm
    if sources.rope_freqs:
        yield sources.rope_freqs
    for layer in sources.layers:
        yield from _layer_weights(layer)


def compute_bytes(spec: ModelSpec, n_cells: int, n_batch: int) -> int:
    """An upper estimate of the intermediate results of a batch, F32, and of its attention mask, F16."""
    n_used = max(1, spec.n_expert_used)
    per_token = n_used * (3 * spec.n_ff + 2 * spec.n_embd) + 8 * spec.n_embd + 4 * spec.n_embd_head * spec.n_head
    return 4 * (n_batch * per_token + spec.n_vocab) + 2 * n_batch * n_cells + (2 << 20)
