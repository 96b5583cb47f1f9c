"""Which bytes of a file make up each weight the graph wants: decided here, loaded elsewhere.

A graph's weight is not always one tensor of the file: the legacy Mixtral layout keeps each expert by itself, and a
repacked copy joins matrices that read the same input (Q, K and V; gate and up), because one product over joined rows
needs one synchronisation of the threads instead of three.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from gguf import GGMLQuantizationType

from slimoe.offload.errors import ModelFileError, UnsupportedModelError
from slimoe.offload.gguf.header import GGUFFile, TensorInfo
from slimoe.offload.model.native_format import PROJECTIONS, constants_name, read_layout, stack_name
from slimoe.offload.model.native_layout import NativeLayer, NativeLayout
from slimoe.offload.model.spec import ModelSpec
from slimoe.offload.model.tensor_list import layer_tensors


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of bytes in one shard."""

    shard: int
    offset: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class WeightSource:
    """One weight as the graph wants it: `ne` in ggml's order, and the spans that follow each other in memory."""

    name: str
    ne: tuple[int, ...]
    type: GGMLQuantizationType
    spans: tuple[Span, ...]
    is_batched: bool = False
    """Whether it is a stack whose matrices are each multiplied with rows of their own, one for each head."""

    @property
    def n_bytes(self) -> int:
        """Bytes in memory, in whatever buffer."""
        return sum(span.n_bytes for span in self.spans)

    @property
    def is_matrix(self) -> bool:
        """Whether it is multiplied with activations (and not a norm, a bias or a table of rows)."""
        return len(self.ne) > 1


@dataclass(frozen=True, slots=True)
class LinearSource:
    """A matrix, or a stack of experts' matrices, and its bias if the file has one."""

    weight: WeightSource
    bias: WeightSource | None = None

    @property
    def parts(self) -> tuple[WeightSource, ...]:
        """The matrix, and the bias if there is one."""
        return (self.weight, self.bias) if self.bias else (self.weight,)


@dataclass(frozen=True, slots=True)
class BucketSources:
    """A native layer's experts: per bucket the stacks of gate, up and down, and what of it is which expert."""

    layout: NativeLayer
    buckets: tuple[tuple[WeightSource, WeightSource, WeightSource], ...]
    constants: WeightSource | None


@dataclass(frozen=True, slots=True)
class SharedSources:
    """A shared expert: its matrices, and the vector [n_embd] whose product gates its output, if it has one."""

    gate_up: tuple[LinearSource, ...]
    down: LinearSource
    gate: WeightSource | None = None


@dataclass(frozen=True, slots=True)
class LatentSources:
    """What latent attention (MLA) multiplies its low-rank rows with: `q` makes queries, where these have a rank.

    Absorbed, `k` [n_unrotated, n_lora_kv, n_head] takes queries to the row's space, and `v` [n_lora_kv, n_embd_head_v,
    n_head] takes what attention makes of rows to values; else `k` makes both keys and values.
    """

    q: LinearSource | None
    k: LinearSource
    v: LinearSource | None

    @property
    def matrices(self) -> tuple[LinearSource, ...]:
        """Those that there are."""
        return tuple(one for one in (self.q, self.k, self.v) if one)


@dataclass(frozen=True, slots=True)
class LayerSources:
    """One block. `qkv` is three matrices, or one of all; `gate_up` two or one; `router` None in a dense block.

    A block without attention has no `attn_norm`, one without a feed-forward part no `ffn_norm`; norms are vectors with
    or without a bias. With `latent` attention `qkv` are the matrices of queries, or of their low rank, and of the low
    rank of keys and values, and `q_norm` and `k_norm` are those of the low ranks. `choice_bias` [n_expert] is added to
    the router's scores to select experts, but not to their weights. `expert_biases` are gate's, up's and down's
    [n, n_expert], or none. In a native file `buckets` has all experts; `gate_up` and `down` are the best copies if
    these are one stack in the router's order, and otherwise absent.
    """

    attn_norm: LinearSource | None
    qkv: tuple[LinearSource, ...]
    attn_output: LinearSource | None
    ffn_norm: LinearSource | None
    router: LinearSource | None
    gate_up: tuple[LinearSource, ...]
    down: LinearSource | None
    buckets: BucketSources | None = None
    q_norm: WeightSource | None = None
    k_norm: WeightSource | None = None
    choice_bias: WeightSource | None = None
    shared: SharedSources | None = None
    expert_biases: tuple[WeightSource, ...] = ()
    latent: LatentSources | None = None

    @property
    def vectors(self) -> tuple[WeightSource, ...]:
        """The norms, the router, and the biases of the experts, in the order of the computation."""
        every = (
            *(self.attn_norm.parts if self.attn_norm else ()),
            self.q_norm,
            self.k_norm,
            *(self.ffn_norm.parts if self.ffn_norm else ()),
            *(self.router.parts if self.router else ()),
            self.choice_bias,
            self.shared.gate if self.shared else None,
            *self.expert_biases,
        )
        return tuple(one for one in every if one is not None)

    @property
    def matrices(self) -> tuple[LinearSource, ...]:
        """Those that every token is multiplied with: of attention, and of the shared expert."""
        shared = (*self.shared.gate_up, self.shared.down) if self.shared else ()
        latent = self.latent.matrices if self.latent else ()
        return (*self.qkv, *latent, *((self.attn_output,) if self.attn_output else ()), *shared)

    @property
    def is_stacked(self) -> bool:
        """Whether a graph of the whole model can compute it: its experts, if any, are one stack per projection."""
        return self.router is None or self.down is not None


@dataclass(frozen=True, slots=True)
class ModelSources:
    """A whole model. `output` is the token table itself when the file ties them.

    `rope_freqs` divide the rotation's frequencies; where a file has divisors for short contexts and others for long
    ones, they are those of the context that the model is opened with: see `in_context`.
    """

    token_embd: WeightSource
    output_norm: LinearSource
    output: LinearSource
    rope_freqs: WeightSource | None
    layers: tuple[LayerSources, ...]
    rope_factors_short: WeightSource | None = None
    rope_factors_long: WeightSource | None = None

    @property
    def whole(self) -> tuple[WeightSource, ...]:
        """Those of the model as a whole: the token table, what divides frequencies, the output's norm and matrix."""
        rope = (self.rope_freqs, self.rope_factors_short, self.rope_factors_long)
        output = () if self.output.weight is self.token_embd else self.output.parts
        return (self.token_embd, *(one for one in rope if one), *self.output_norm.parts, *output)

    def in_context(self, n_ctx: int, n_ctx_orig: int) -> "ModelSources":
        """The same model in a context of `n_ctx` tokens, where longer ones than `n_ctx_orig` are long."""
        factors = self.rope_factors_long if n_ctx > n_ctx_orig else self.rope_factors_short
        return replace(self, rope_freqs=self.rope_freqs or factors)


_DOWNLOAD_AGAIN = "Download or convert it again."
_WITHOUT_KERNELS = frozenset(GGMLQuantizationType[name] for name in ("I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K"))
"""Types that ggml can store, but neither multiply with nor look rows up in."""

# Written by old converters, read by nobody: the rotation is computed.
_IGNORED_SUFFIXES = ("attn_rot_embd", ".rope_freqs.weight", "attn.rotary_emb.inv_freq")


class _Reader:
    """Looks tensors up and remembers which were asked for, so that an unread one can be refused."""

    def __init__(self, gguf: GGUFFile) -> None:
        self.gguf = gguf
        self.read: set[str] = set()

    def tensor(self, name: str) -> TensorInfo:
        info = self.gguf.tensors.get(name)
        if info is None:
            raise ModelFileError(self.gguf.path, f"tensor {name} is missing.", _DOWNLOAD_AGAIN)
        is_vector = len(info.ne) == 1
        if info.type in _WITHOUT_KERNELS or (is_vector and info.type is not GGMLQuantizationType.F32):
            problem = f"{'vector' if is_vector else 'matrix'} {name} has type {info.type.name}, which has no kernel."
            raise UnsupportedModelError(self.gguf.path, problem, _DOWNLOAD_AGAIN)
        self.read.add(name)
        return info

    def weight(self, name: str) -> WeightSource:
        info = self.tensor(name)
        return WeightSource(name, info.ne, info.type, (Span(info.shard, info.offset, info.n_bytes),))

    def optional(self, name: str) -> WeightSource | None:
        return self.weight(name) if name in self.gguf.tensors else None

    def linear(self, stem: str) -> LinearSource:
        weight, bias = self.weight(f"{stem}.weight"), self.optional(f"{stem}.bias")
        n_out = weight.ne[1:]
        if bias and bias.ne != n_out:
            raise ModelFileError(self.gguf.path, f"tensor {bias.name} has the shape {bias.ne}, not {n_out}.")
        return LinearSource(weight, bias)

    def experts(self, layer: int, projection: str, n_expert: int) -> LinearSource:
        """A stack of experts: stored as one tensor, or one tensor each in files of December 2023."""
        stacked = f"blk.{layer}.{projection}_exps.weight"
        first = f"blk.{layer}.{projection}.0.weight"
        if stacked in self.gguf.tensors or first not in self.gguf.tensors:
            return LinearSource(self.weight(stacked))
        parts = [self.weight(f"blk.{layer}.{projection}.{e}.weight") for e in range(n_expert)]
        if len({(part.ne, part.type) for part in parts}) > 1:
            raise UnsupportedModelError(self.gguf.path, f"the experts of {first} differ in shape or type.")
        spans = tuple(span for part in parts for span in part.spans)
        return LinearSource(WeightSource(stacked, (*parts[0].ne, n_expert), parts[0].type, spans))

    def refuse_unread(self, skipped: tuple[str, ...]) -> None:
        """Raises UnsupportedModelError for a tensor that was not asked for, but for those of the `skipped` blocks."""
        for name in self.gguf.tensors:
            if name not in self.read and not name.endswith(_IGNORED_SUFFIXES) and not name.startswith(skipped):
                problem = f"tensor {name} has no place in this architecture; ignoring it would change the answers."
                raise UnsupportedModelError(self.gguf.path, problem)


def model_sources(gguf: GGUFFile, spec: ModelSpec) -> ModelSources:
    """Finds every weight of the file.

    Raises ModelFileError for a missing tensor and UnsupportedModelError for one that would go unread.
    """
    reader = _Reader(gguf)
    roles = {tensor.role for tensor in spec.architecture.tensors}
    layout = read_layout(gguf, spec) if spec.is_native else None

    def divisors(role: str) -> WeightSource | None:
        return reader.optional(f"{role}.weight") if role in roles else None

    token_embd = reader.weight("token_embd.weight")
    has_output = "output.weight" in gguf.tensors
    has_biased_norm = any(role.role == "output_norm" and role.suffix == "bias" for role in spec.architecture.tensors)
    sources = ModelSources(
        token_embd=token_embd,
        output_norm=LinearSource(
            reader.weight("output_norm.weight"), reader.weight("output_norm.bias") if has_biased_norm else None
        ),
        output=reader.linear("output") if has_output else LinearSource(token_embd),
        rope_freqs=divisors("rope_freqs"),
        layers=tuple(_layer_sources(reader, spec, layer, layout) for layer in range(spec.n_layer)),
        rope_factors_short=divisors("rope_factors_short"),
        rope_factors_long=divisors("rope_factors_long"),
    )
    reader.refuse_unread(tuple(f"blk.{spec.n_layer + index}." for index in range(spec.n_layer_nextn)))
    return sources


def _layer_sources(reader: _Reader, spec: ModelSpec, layer: int, layout: NativeLayout | None) -> LayerSources:
    tensors = {tensor.role: tensor for tensor in reversed([*layer_tensors(spec, layer)])}
    names = {role: tensor.name for role, tensor in tensors.items()}
    biases = {tensor.role: tensor.name for tensor in layer_tensors(spec, layer) if tensor.name.endswith(".bias")}
    gate_up: tuple[LinearSource, ...] = ()
    down: LinearSource | None = None
    buckets: BucketSources | None = None

    def weight(role: str) -> WeightSource | None:
        if role not in names or (tensors[role].is_optional and names[role] not in reader.gguf.tensors):
            return None
        return reader.weight(names[role])

    def linear(role: str) -> LinearSource:
        return reader.linear(names[role].removesuffix(".weight"))

    def vector(role: str) -> LinearSource | None:
        if role not in names:
            return None
        return LinearSource(reader.weight(names[role]), reader.weight(biases[role]) if role in biases else None)

    if layout:
        native = layout.layers[layer]
        stacks = [
            [reader.weight(stack_name(layer, part, bucket)) for part in PROJECTIONS]
            for bucket in range(native.n_bucket)
        ]
        constants = reader.optional(constants_name(layer)) if native.target else None
        buckets = BucketSources(native, tuple((gate, up, down) for gate, up, down in stacks), constants)
        if native.is_plain:  # The best copies lie as in a stock file.
            *inner, outer = (LinearSource(stack) for stack in stacks[native.buckets[0][0]])
            gate_up, down = tuple(inner), outer
    elif "ffn_gate_exps" in names:
        gate_up = tuple(reader.experts(layer, role, spec.n_expert) for role in ("ffn_gate", "ffn_up"))
        down = reader.experts(layer, "ffn_down", spec.n_expert)
    else:
        gate_up, down = (linear("ffn_gate"), linear("ffn_up")), linear("ffn_down")
    has_attention = "attn_norm" in names
    latent = _latent(linear, names) if "attn_kv_a_mqa" in names else None
    shared: SharedSources | None = None
    if "ffn_down_shexp" in names:
        both = linear("ffn_gate_shexp"), linear("ffn_up_shexp")
        shared = SharedSources(both, linear("ffn_down_shexp"), weight("ffn_gate_inp_shexp"))
    return LayerSources(
        attn_norm=vector("attn_norm"),
        qkv=_qkv(reader, spec, f"blk.{layer}") if has_attention else (),
        attn_output=linear("attn_output") if has_attention else None,
        ffn_norm=vector(spec.architecture.ffn_norm),
        router=vector("ffn_gate_inp"),
        gate_up=gate_up,
        down=down,
        buckets=buckets,
        q_norm=weight("attn_q_a_norm" if latent else "attn_q_norm"),
        k_norm=weight("attn_kv_a_norm" if latent else "attn_k_norm"),
        choice_bias=weight("exp_probs_b"),
        shared=shared,
        latent=latent,
    )


def _latent(linear: Callable[[str], LinearSource], names: Collection[str]) -> LatentSources:
    """The matrices of latent attention by `linear`, which finds one by its role."""
    q = linear("attn_q_b") if "attn_q_b" in names else None
    if "attn_kv_b" in names:
        return LatentSources(q, linear("attn_kv_b"), None)
    k, v = (replace(one, weight=replace(one.weight, is_batched=True)) for one in map(linear, ("attn_k_b", "attn_v_b")))
    return LatentSources(q, k, v)


def _qkv(reader: _Reader, spec: ModelSpec, block: str) -> tuple[LinearSource, ...]:
    """Q, K and V, which some files keep as one matrix, or the first two matrices of latent attention."""
    if latent := spec.attention.latent:
        roles = ("attn_q_a" if latent.n_lora_q else "attn_q", "attn_kv_a_mqa")
        return tuple(reader.linear(f"{block}.{name}") for name in roles)
    if f"{block}.attn_qkv.weight" not in reader.gguf.tensors:
        return tuple(reader.linear(f"{block}.{name}") for name in ("attn_q", "attn_k", "attn_v"))
    fused = reader.linear(f"{block}.attn_qkv")
    parts, begin = [], 0
    for name, n_head in (("attn_q", spec.n_head), ("attn_k", spec.n_head_kv), ("attn_v", spec.n_head_kv)):
        end = begin + n_head * spec.n_embd_head
        bias = _rows(fused.bias, f"{block}.{name}.bias", begin, end) if fused.bias else None
        parts.append(LinearSource(_rows(fused.weight, f"{block}.{name}.weight", begin, end), bias))
        begin = end
    return tuple(parts)


def _rows(source: WeightSource, name: str, begin: int, end: int) -> WeightSource:
    """Rows `begin` to `end` of a matrix, or such elements of a vector."""
    span, row_bytes = source.spans[0], source.n_bytes // source.ne[-1]
    part = Span(span.shard, span.offset + begin * row_bytes, (end - begin) * row_bytes)
    return WeightSource(name, (*source.ne[:-1], end - begin), source.type, (part,))
