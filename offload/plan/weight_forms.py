"""Decides in which form each weight lies in host memory, and how many bytes that takes. Loads nothing."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, get_args

import numpy as np
from gguf import GGMLQuantizationType

from slimoe.offload.errors import UsageError
from slimoe.offload.ggml.cpu_backend import can_repack
from slimoe.offload.graph.token_rows import row_bytes
from slimoe.offload.graph.weights import STAGED_BYTES, Form
from slimoe.offload.machine.probe import FormSpeed, KernelSpeed
from slimoe.offload.model.regrouped import as_matrix, join_layers, without_experts
from slimoe.offload.model.spec import ModelSpec
from slimoe.offload.model.tensors import ModelSources, WeightSource
from slimoe.offload.plan.batch_sizes import TYPICAL_ANSWER, TYPICAL_PROMPT
from slimoe.offload.plan.engine_config import WEIGHT_MODES

Mode = Literal["mapped", "copied", "repacked", "both"]

_JOINED = 2
"""The largest weight that is repacked is gate and up, joined."""
_WORTHWHILE = 0.97
"""A second copy must save at least 3 % of a step's time, or it is only memory."""
_TYPICAL_BATCH = 256
EVER = 1 << 20
"""More tokens than any step has."""
_OUTPUT_NAMES = "output.weight", "token_embd.weight"
"""Of a token table only the product with hidden states is asked for: its rows are looked up elsewhere."""
_STEPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Tokens of steps for which forms are compared."""


class MatrixKind(NamedTuple):
    """What decides which form of a matrix multiplies faster: its type, and whether it is a stack of experts.

    The one that gives logits is a kind of its own: of a prompt's many tokens it meets the last alone.
    """

    type: GGMLQuantizationType
    is_expert: bool
    is_output: bool = False

    @classmethod
    def of(cls, source: WeightSource) -> "MatrixKind":
        """The kind of a weight."""
        return cls(source.type, len(source.ne) > 2, source.name in _OUTPUT_NAMES)


@dataclass(frozen=True, slots=True)
class WeightForms:
    """What will be in memory, in bytes, and how the matrices lie there.

    `mode` mapped: as pages of the file, shared with other processes. copied: in our own memory. repacked: some kinds
    rearranged, the others copied. both: all copied, and some kinds repacked as well. `repacked_tokens` says up to how
    many tokens a step multiplies with repacked matrices of each kind; larger steps take plain ones. `alone` are the
    kinds of matrices, not of experts, that are best repacked where each lies in memory once.
    """

    mode: Mode
    mapped: int
    copied: int
    repacked: int
    kv: int
    compute: int
    program: int
    staging: int = 0
    n_batch: int = 1
    repacked_tokens: Mapping[MatrixKind, int] = field(default_factory=dict)
    alone: frozenset[MatrixKind] = frozenset()

    @property
    def required(self) -> int:
        """Bytes of everything in host memory."""
        return self.mapped + self.copied + self.repacked + self.kv + self.compute + self.program + self.staging

    @property
    def arrangement(self) -> tuple[object, ...]:
        """What two plans must have in common for the same weights to serve both."""
        return self.mode, self.n_batch, dict(self.repacked_tokens)

    def form(self, source: WeightSource, n_tokens: int) -> Form:
        """The form of a weight for steps of so many tokens."""
        if self.mode == "mapped":
            return "mapped"
        is_repacked = n_tokens <= self.repacked_tokens.get(MatrixKind.of(source), 0) and _repackable(source)
        return "repacked" if is_repacked else "copied"

    def single_form(self, source: WeightSource) -> Form:
        """The form of a weight for steps of one token."""
        return self.form(source, 1)

    def forms(self, source: WeightSource) -> set[Form]:
        """All forms of a weight that steps of up to `n_batch` tokens ask for."""
        return {self.form(source, 1), self.form(source, self.n_batch)}

    def in_tiers(self) -> "WeightForms":
        """The same for a model whose experts lie in slots, as they are stored; other matrices have one form each."""
        repacked = dict.fromkeys(self.alone, EVER)
        return replace(self, mode="repacked" if repacked else "copied", repacked_tokens=repacked)

    def plain(self) -> "WeightForms":
        """The same with all weights as they are stored."""
        return replace(self, mode="copied", repacked_tokens={}, alone=frozenset())

    def repacked_beside(self, sources: ModelSources) -> tuple[int, int]:
        """Bytes of what `both` repacks of a model whose experts lie in buckets, and those of staging meanwhile.

        `sources` are the file's own. What lies in memory repacked alone is not among it.
        """
        tiered = self.in_tiers()
        weights = (*_weights(join_layers(without_experts(sources))), *bucket_stacks(sources))
        wanted = [source for source in weights if self.form(source, 1) == "repacked" != tiered.form(source, 1)]
        return sum(source.n_bytes for source in wanted), max((source.n_bytes for source in wanted), default=0)

    def dense_staging(self, sources: ModelSources) -> int:
        """Bytes through which matrices that are no experts' are repacked."""
        weights = _weights(join_layers(without_experts(sources)))
        return max((one.n_bytes for one in weights if self.form(one, 1) == "repacked"), default=0)


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes of the KV cache (`kv`) and of the program itself, cells of a token's row in all masks, a batch's tokens,
    and whether the logits of all of these are wanted.
    """

    kv: int
    program: int
    n_masked: int
    n_batch: int
    has_all_logits: bool = False


def bucket_stacks(sources: ModelSources) -> Iterator[WeightSource]:
    """The stacks of all buckets of experts' best copies; a stack of a single expert is a matrix."""
    for layer in sources.layers:
        if layer.buckets:
            for bucket in sorted({copies[0] for copies in layer.buckets.layout.buckets}):
                yield from map(as_matrix, layer.buckets.buckets[bucket])


def repackable_types(sources: ModelSources) -> set[GGMLQuantizationType]:
    """Types of this model's weights that can be repacked on this CPU."""
    return {kind.type for kind in repackable_kinds(sources)}


def repackable_kinds(sources: ModelSources) -> set[MatrixKind]:
    """Kinds of this model's weights that can be repacked on this CPU."""
    return {MatrixKind.of(source) for source in (*_weights(sources), *bucket_stacks(sources)) if _repackable(source)}


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
    *,
    has_second: bool = True,
) -> WeightForms:
    """The forms that `mode` names, or for auto the fastest that fit into `available` bytes.

    If none fit, they are the smallest, and refusing them is the caller's. `speeds` are by the name of the type. Without
    `has_second` auto takes only forms that every budget can have: one of each matrix, experts as they are stored.
    Raises UsageError for an unknown mode.
    """
    if mode not in WEIGHT_MODES:
        raise UsageError(f"The weight mode {mode!r} is unknown. Use one of {', '.join(WEIGHT_MODES)}.")
    compute = compute_bytes(spec, needs.n_masked, needs.n_batch)
    if mode != "mapped":
        compute += row_bytes(sources.token_embd, needs.n_batch)
    possible = repackable_kinds(sources)
    forms = WeightForms("copied", 0, 0, 0, needs.kv, compute, needs.program, n_batch=needs.n_batch)
    if mode == "mapped":
        return _counted(sources, replace(forms, mode="mapped"))
    if mode == "copied":
        return _counted(sources, forms)
    if mode == "repacked":
        return _counted(sources, replace(forms, mode="repacked", repacked_tokens=dict.fromkeys(possible, EVER)))
    if mode == "both":
        return _counted(sources, replace(forms, mode="both", repacked_tokens=dict.fromkeys(possible, 1)))
    shape = _Shape(spec.n_expert, spec.n_expert_used, needs.n_batch, needs.has_all_logits)
    measured = {kind: speeds[kind.type.name] for kind in possible if kind.type.name in speeds}
    by_kind = {kind: known.expert if kind.is_expert else known.dense for kind, known in measured.items()}
    alone = {kind for kind, speed in by_kind.items() if shape.is_better_alone(kind, speed)}
    dense = frozenset(kind for kind in alone if not kind.is_expert)
    forms = replace(forms, alone=dense)
    tokens = {kind: shape.repacked_tokens(kind, speed) for kind, speed in by_kind.items()}
    tokens = {kind: n for kind, n in tokens.items() if n}
    both = _counted(sources, replace(forms, mode=_mode(tokens, needs.n_batch), repacked_tokens=tokens))
    if has_second and both.required <= available:
        return both
    single = dict.fromkeys(alone if has_second else dense, EVER)
    one = replace(forms, mode="repacked" if single else "copied", repacked_tokens=single)
    return _counted(sources, one)


@dataclass(frozen=True, slots=True)
class _Shape:
    """What decides how many rows of activations a matrix meets in a step: experts, used ones, the largest step, and
    whether the logits of all of its tokens are wanted.
    """

    n_expert: int
    n_used: int
    n_batch: int
    has_all_logits: bool

    def seconds(self, kind: MatrixKind, speed: FormSpeed, n_tokens: int) -> tuple[float, float]:
        """Seconds with plain and with repacked matrices, of all experts or of one other matrix, in a step."""
        if not kind.is_expert:
            plain, repacked = speed.seconds(np.array([float(n_tokens)]))
            return float(plain[0]), float(repacked[0])
        # As many tokens select an expert as chance has it.
        share = min(1.0, self.n_used / max(1, self.n_expert))
        rows = np.arange(1, n_tokens + 1)
        logs = [math.lgamma(n_tokens + 1) - math.lgamma(n + 1) - math.lgamma(n_tokens - n + 1) for n in rows]
        if share == 1.0:
            chances = (rows == n_tokens).astype(float)
        else:
            chances = np.exp(np.array(logs) + rows * math.log(share) + (n_tokens - rows) * math.log1p(-share))
        plain, repacked = speed.seconds(rows.astype(float))
        return float(chances @ plain), float(chances @ repacked)

    def repacked_tokens(self, kind: MatrixKind, speed: FormSpeed) -> int:
        """Up to how many tokens steps are faster with repacked matrices; 0 if a single one gains next to nothing."""
        faster = 0
        for n_tokens in (*(n for n in _STEPS if n < self.n_batch), self.n_batch):
            plain, repacked = self.seconds(kind, speed, n_tokens)
            if repacked >= (plain if faster else _WORTHWHILE * plain):
                return faster
            faster = n_tokens
        return EVER

    def is_better_alone(self, kind: MatrixKind, speed: FormSpeed) -> bool:
        """Whether repacked matrices save time over a prompt and an answer of usual lengths, and to a single token."""
        n_rows = 1 if kind.is_output and not self.has_all_logits else _TYPICAL_BATCH
        single, batch = self.seconds(kind, speed, 1), self.seconds(kind, speed, n_rows)
        saved = TYPICAL_ANSWER * (single[0] - single[1]) + TYPICAL_PROMPT / _TYPICAL_BATCH * (batch[0] - batch[1])
        return single[1] < _WORTHWHILE * single[0] and saved > 0


def _mode(tokens: Mapping[MatrixKind, int], n_batch: int) -> Mode:
    if not tokens:
        return "copied"
    return "repacked" if min(tokens.values()) >= n_batch else "both"


def _counted(sources: ModelSources, rule: WeightForms) -> WeightForms:
    """`rule` with its byte counts filled in."""
    forms = {
        (source.name, "copied" if form == "mapped" and len(source.spans) > 1 else form): source.n_bytes
        for source in _weights(sources)
        for form in rule.forms(source)
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


def compute_bytes(spec: ModelSpec, n_masked: int, n_batch: int) -> int:
    """An upper estimate of the bytes of a batch's intermediate results, F32, and of its masks, F16.

    `n_masked` are the cells of a token's row in all masks.
    """
    n_used = max(1, spec.n_expert_used)
    n_always = max(spec.experts.n_ff_shared, spec.n_ff_dense)
    n_queries = max(of.n_embd_head * of.n_head for of in spec.attentions)
    per_token = n_used * (3 * spec.n_ff + 2 * spec.n_embd_expert) + 8 * spec.n_embd + 4 * n_queries
    per_token += 2 * spec.attention.n_decompressed + 4 * spec.n_expert_aux * spec.n_embd_expert
    per_token += 2 * spec.experts.n_latent
    per_token += 3 * n_always + 8 * spec.n_expert * (spec.router_score == "sigmoid")
    return 4 * (n_batch * per_token + spec.n_vocab) + 2 * n_batch * n_masked + (2 << 20)
