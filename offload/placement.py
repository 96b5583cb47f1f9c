"""Decides in which arrangement each weight lies in memory, and what that costs. Loads nothing."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from gguf import GGMLQuantizationType

from offload.backend import can_repack
from offload.errors import UsageError
from offload.memory import human
from offload.model_spec import ModelSpec
from offload.probe import KernelSpeed
from offload.weight_source import LayerSources, ModelSources, WeightSource

Copies = Literal["plain", "repacked", "both"]
REPACK_MODES = ("auto", "on", "off")

_OVERHEAD_BYTES = 256 << 20
"""Python, libraries, tokenizer and what a request holds for a while."""
_WORTHWHILE = 0.97
"""A second copy must save at least 3 % of a step's time, or it is only memory."""
_TYPICAL_PROMPT, _TYPICAL_ANSWER = 512, 128


@dataclass(frozen=True, slots=True)
class Placement:
    """What will be in memory, in bytes.

    `mapped` are pages of the file itself, shared and evictable; `copied` and `repacked` are our own. `copies` says
    whether matrices of the `repacked_types` are there as in the file, repacked, or both: repacked for single tokens,
    plain for batches.
    """

    copies: Copies
    repacked_types: frozenset[GGMLQuantizationType]
    mapped: int
    copied: int
    repacked: int
    kv: int
    compute: int
    overhead: int = _OVERHEAD_BYTES

    @property
    def required(self) -> int:
        """All of it."""
        return self.mapped + self.copied + self.repacked + self.kv + self.compute + self.overhead

    def repacks(self, source: WeightSource) -> bool:
        """Whether this weight gets a repacked copy."""
        return _repackable(source) and source.type in self.repacked_types

    def describe(self) -> str:
        """One line for a person."""
        parts = {
            "file": self.mapped,
            "copies": self.copied,
            "repacked": self.repacked,
            "KV cache": self.kv,
            "compute": self.compute,
        }
        listed = ", ".join(f"{name} {human(n)}" for name, n in parts.items() if n)
        return f"{human(self.required)} of memory: {listed}, rest {human(self.overhead)}"


def repackable_types(sources: ModelSources) -> set[GGMLQuantizationType]:
    """Types of this model that the repack buffer takes; measure these."""
    return {source.type for source in _matrices(sources) if _repackable(source)}


def matrix_bytes(sources: ModelSources) -> int:
    """Bytes of all matrices."""
    return sum(source.n_bytes for source in _matrices(sources))


def decide_placement(
    sources: ModelSources,
    spec: ModelSpec,
    mode: str,
    speeds: Mapping[str, KernelSpeed],
    kv: int,
    n_batch: int,
    available: int,
) -> Placement:
    """The fastest placement that fits into `available` bytes; the smallest one if none does.

    `mode` is off (only what is in the file), on (only repacked, where possible) or auto. Raises UsageError for
    another mode.
    """
    if mode not in REPACK_MODES:
        raise UsageError(f"The repack mode {mode!r} is unknown. Use one of {', '.join(REPACK_MODES)}.")
    compute = _compute_bytes(spec, n_batch)

    def place(copies: Copies, kinds: frozenset[GGMLQuantizationType]) -> Placement:
        return _place(sources, copies, kinds, kv, compute)

    plain = place("plain", frozenset())
    if mode == "off":
        return plain
    if mode == "on":
        return place("repacked", frozenset(repackable_types(sources)))
    worthwhile = frozenset(k for k in repackable_types(sources) if k.name in speeds and _pays(speeds[k.name]))
    both = place("both", worthwhile)
    if not worthwhile or both.required <= available:
        return both if worthwhile else plain
    alone = frozenset(k for k in worthwhile if _pays_alone(speeds[k.name]))
    return place("repacked", alone) if alone else plain


def _place(
    sources: ModelSources, copies: Copies, kinds: frozenset[GGMLQuantizationType], kv: int, compute: int
) -> Placement:
    mapped = copied = repacked = 0
    for source in _unique(sources):
        repacks = _repackable(source) and source.type in kinds
        repacked += source.n_bytes if repacks else 0
        # The token table is looked up by rows, which a repacked tensor does not give.
        if repacks and copies == "repacked" and source.name != sources.token_embd.name:
            continue
        if len(source.spans) == 1:
            mapped += source.n_bytes
        else:
            copied += source.n_bytes
    return Placement(copies, kinds, mapped, copied, repacked, kv, compute)


def _pays(speed: KernelSpeed) -> bool:
    return speed.single_repacked < _WORTHWHILE * speed.single_plain


def _pays_alone(speed: KernelSpeed) -> bool:
    """Whether one copy is better repacked, for a prompt and an answer of usual lengths."""
    single = _TYPICAL_ANSWER * (speed.single_plain - speed.single_repacked)
    batches = _TYPICAL_PROMPT / 256
    return single > batches * (speed.batch_repacked - speed.batch_plain)


def _repackable(source: WeightSource) -> bool:
    if len(source.ne) < 2 or (len(source.ne) == 3 and source.ne[2] < 2):
        return False
    return can_repack(source.type, source.ne[0], source.ne[1])


def _layer_weights(layer: LayerSources) -> Iterator[WeightSource]:
    linears = (*layer.qkv, layer.attn_output, *layer.gate_up, layer.down)
    yield from (linear.weight for linear in linears)
    yield from (linear.bias for linear in linears if linear.bias)
    yield layer.attn_norm
    yield layer.ffn_norm
    if layer.router:
        yield layer.router


def _unique(sources: ModelSources) -> list[WeightSource]:
    every = [sources.token_embd, sources.output.weight, sources.output_norm]
    every += [sources.rope_freqs] if sources.rope_freqs else []
    every += [weight for layer in sources.layers for weight in _layer_weights(layer)]
    return list({source.name: source for source in every}.values())


def _matrices(sources: ModelSources) -> list[WeightSource]:
    """Everything that is multiplied with; the token table only if it is the output as well."""
    tied = sources.output.weight.name == sources.token_embd.name
    return [s for s in _unique(sources) if s.is_matrix and (tied or s.name != sources.token_embd.name)]


def _compute_bytes(spec: ModelSpec, n_batch: int) -> int:
    """An upper estimate of the intermediate results of a batch, F32."""
    n_used = max(1, spec.n_expert_used)
    per_token = n_used * (3 * spec.n_ff + 2 * spec.n_embd) + 8 * spec.n_embd + 4 * spec.n_embd_head * spec.n_head
    return 4 * (n_batch * per_token + spec.n_vocab) + (16 << 20)
