"""Finds the weights of a model in its file, and refuses what would go unread."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import replace

from gguf import GGMLQuantizationType

from slimoe.offload.errors import ModelFileError, UnsupportedModelError
from slimoe.offload.gguf.header import GGUFFile, TensorInfo
from slimoe.offload.model.native_format import constants_name, read_layout, stack_name
from slimoe.offload.model.native_layout import NativeLayer, NativeLayout
from slimoe.offload.model.recurrent_spec import RecurrentSpec
from slimoe.offload.model.regrouped import delta_net_inputs
from slimoe.offload.model.spec import ModelSpec
from slimoe.offload.model.tensor_list import AUX_GAIN, AUX_SHIFT, EXPERT_LATENT, layer_tensors
from slimoe.offload.model.tensors import (
    BucketSources,
    LatentSources,
    LayerSources,
    LinearSource,
    ModelSources,
    PostSources,
    RecurrentSources,
    SharedSources,
    Span,
    WeightSource,
    rows_of,
)

_POST = ("post_attention_norm", "post_ffw_norm_2", "post_ffw_norm", "layer_output_scale")
"""The roles of `PostSources`."""
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

    def floats(self, name: str, ne: tuple[int, ...]) -> WeightSource:
        """F32 values that are added or multiplied to activations, of the shape `ne`."""
        info = self.tensor(name)
        if info.type is not GGMLQuantizationType.F32 or info.ne != ne:
            problem = f"tensor {name} is {info.type.name} {info.ne}, but F32 {ne} belongs to this model."
            raise ModelFileError(self.gguf.path, problem, _DOWNLOAD_AGAIN)
        return self.weight(name)

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
        """Raises UnsupportedModelError for a tensor that was not asked for, but for those with a `skipped` prefix."""
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
    norms = {role.suffix: role.name() for role in spec.architecture.tensors if role.role == "output_norm"}
    sources = ModelSources(
        token_embd=token_embd,
        output_norm=LinearSource(
            reader.weight(norms["weight"]), reader.weight(norms["bias"]) if "bias" in norms else None
        ),
        output=reader.linear("output") if has_output else LinearSource(token_embd),
        rope_freqs=divisors("rope_freqs"),
        layers=tuple(_layer_sources(reader, spec, layer, layout) for layer in range(spec.n_layer)),
        rope_factors_short=divisors("rope_factors_short"),
        rope_factors_long=divisors("rope_factors_long"),
    )
    skipped = [f"blk.{spec.n_layer + index}." for index in range(spec.n_layer_nextn)]
    if spec.architecture.has_indexer:
        skipped += [f"blk.{layer}.indexer." for layer in range(spec.n_layer)]
    reader.refuse_unread(tuple(skipped))
    return sources


def read_block(
    gguf: GGUFFile, spec: ModelSpec, layer: int, others: Iterable[str]
) -> tuple[LayerSources, dict[str, WeightSource]]:
    """A block that is no layer of the model that is run, and those of `others` that the file has, by their names.

    Raises as `model_sources` does.
    """
    reader = _Reader(gguf)
    own = {name: found for name in others if (found := reader.optional(name))}
    return _layer_sources(reader, spec, layer, None), own


def _layer_sources(reader: _Reader, spec: ModelSpec, layer: int, layout: NativeLayout | None) -> LayerSources:
    tensors = {tensor.role: tensor for tensor in reversed([*layer_tensors(spec, layer)])}
    names = {role: tensor.name for role, tensor in tensors.items()}
    biases, scales = (
        {tensor.role: tensor.name for tensor in layer_tensors(spec, layer) if tensor.name.endswith(suffix)}
        for suffix in (".bias", ".scale")
    )

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

    shape = spec.layer_shape(layer)
    buckets = _buckets(reader, spec, layout.layers[layer], layer) if layout and shape.n_expert else None
    gate_up, down = _feed_forward(reader, spec, layer, buckets)
    has_attention = "attn_output" in names
    latent = _latent(linear, names) if "attn_kv_a_mqa" in names else None
    is_recurrent = spec.is_recurrent(layer) and shape.has_attention
    return LayerSources(
        attn_norm=vector("attn_norm") if shape.has_attention else None,
        qkv=_qkv(reader, spec, layer) if has_attention else (),
        attn_output=linear("attn_output") if has_attention else None,
        ffn_norm=vector(spec.architecture.ffn_norm) if shape.n_ff else None,
        router=vector("ffn_gate_inp"),
        gate_up=gate_up,
        down=down,
        buckets=buckets,
        q_norm=weight("attn_q_a_norm" if latent else "attn_q_norm"),
        k_norm=weight("attn_kv_a_norm" if latent else "attn_k_norm"),
        choice_bias=weight("exp_probs_b"),
        shared=_shared(spec, layer, linear, weight, names),
        expert_latent=tuple(linear(role) for role in EXPERT_LATENT if role in names),
        latent=latent,
        sinks=weight("attn_sinks"),
        recurrent=_recurrent(reader, spec, layer) if is_recurrent else None,
        expert_biases=_expert_biases(reader, spec, layer, buckets),
        expert_scales=_expert_scales(reader, spec, layer, buckets, n_stacks=len(gate_up)),
        router_scale=reader.floats(scales["ffn_gate_inp"], (spec.n_embd,)) if "ffn_gate_inp" in scales else None,
        post=PostSources(*map(weight, _POST if spec.architecture.has_post_norms else ())),
        aux=tuple(reader.floats(names[role], tensors[role].ne) for role in (AUX_GAIN, AUX_SHIFT) if role in names),
    )


def _feed_forward(
    reader: _Reader, spec: ModelSpec, layer: int, buckets: BucketSources | None
) -> tuple[tuple[LinearSource, ...], LinearSource | None]:
    """The matrices of a dense part, or the stacks of experts as in a stock file, without down and down; none if a
    native file's experts, in `buckets`, do not lie so.
    """
    shape = spec.layer_shape(layer)
    if buckets is not None:
        if not buckets.layout.is_plain:
            return (), None
        *inner, down = map(LinearSource, buckets.buckets[buckets.layout.buckets[0][0]])
    elif shape.n_expert:
        inner, down = [*_gate_up_experts(reader, spec, layer)], reader.experts(layer, "ffn_down", spec.n_expert)
    elif shape.n_ff:
        *inner, down = (reader.linear(f"blk.{layer}.ffn_{part}") for part in spec.architecture.projections)
    else:
        return (), None
    return tuple(inner), down


def _shared(
    spec: ModelSpec,
    layer: int,
    linear: Callable[[str], LinearSource],
    weight: Callable[[str], WeightSource | None],
    names: Collection[str],
) -> SharedSources | None:
    """A layer's shared expert, or its dense part beside the experts, by what finds matrices and vectors by roles."""
    of = spec.architecture.shared
    if of is None or not spec.layer_shape(layer).n_expert or f"ffn_down{of.suffix}" not in names:
        return None
    *gate_up, down = (linear(f"ffn_{projection}{of.suffix}") for projection in spec.architecture.projections)
    norms = (weight("ffn_norm"), weight("post_ffw_norm_1")) if of.width == "dense" else ()
    return SharedSources(tuple(gate_up), down, weight("ffn_gate_inp_shexp"), *norms)


def _latent(linear: Callable[[str], LinearSource], names: Collection[str]) -> LatentSources:
    """The matrices of latent attention by `linear`, which finds one by its role."""
    q = linear("attn_q_b") if "attn_q_b" in names else None
    if "attn_kv_b" in names:
        return LatentSources(q, linear("attn_kv_b"), None)
    k, v = (replace(one, weight=replace(one.weight, is_batched=True)) for one in map(linear, ("attn_k_b", "attn_v_b")))
    return LatentSources(q, k, v)


def _recurrent(reader: _Reader, spec: ModelSpec, layer: int) -> RecurrentSources:
    """A recurrent layer's weights."""
    block = f"blk.{layer}."
    shapes = {tensor.name.removeprefix(block): tensor.ne for tensor in layer_tensors(spec, layer)}

    def linear(role: str) -> LinearSource:
        return LinearSource(reader.weight(f"{block}{role}.weight"))

    def floats(name: str) -> WeightSource:
        return reader.floats(block + name, shapes[name])

    if "shortconv.conv.weight" in shapes:
        in_proj, out_proj = linear("shortconv.in_proj"), linear("shortconv.out_proj")
        return RecurrentSources((in_proj,), floats("shortconv.conv.weight"), out_proj)
    joint = spec.recurrent and _joint_inputs(reader, block, spec.recurrent, shapes)
    roles = ("ssm_in", *(() if joint else ("attn_qkv", "attn_gate")), "ssm_beta", "ssm_alpha", "ssm_ba")
    return RecurrentSources(
        inputs=(*(joint or ()), *(linear(role) for role in roles if f"{role}.weight" in shapes)),
        conv=floats("ssm_conv1d.weight"),
        output=linear("ssm_out"),
        decay=floats("ssm_a"),
        step_bias=floats("ssm_dt.bias"),
        norm=floats("ssm_norm.weight"),
        conv_bias=floats("ssm_conv1d.bias") if "ssm_conv1d.bias" in shapes else None,
        skip=floats("ssm_d") if "ssm_d" in shapes else None,
    )


def _joint_inputs(reader: _Reader, block: str, of: RecurrentSpec, names: Collection[str]) -> tuple[LinearSource, ...]:
    """A delta net's first two matrices, of the one that older files have in their place; none where they are two."""
    has_two = f"{block}attn_qkv.weight" in reader.gguf.tensors
    if has_two or "attn_qkv.weight" not in names or f"{block}ssm_in.weight" not in reader.gguf.tensors:
        return ()
    return tuple(map(LinearSource, delta_net_inputs(reader.weight(f"{block}ssm_in.weight"), block, of)))


def _buckets(reader: _Reader, spec: ModelSpec, native: NativeLayer, layer: int) -> BucketSources:
    """A native layer's experts."""
    stacks = (
        tuple(reader.weight(stack_name(layer, part, bucket)) for part in spec.architecture.projections)
        for bucket in range(native.n_bucket)
    )
    constants = reader.optional(constants_name(layer)) if native.target else None
    return BucketSources(native, tuple(stacks), constants)


def _gate_up_experts(reader: _Reader, spec: ModelSpec, layer: int) -> tuple[LinearSource, ...]:
    """The stacks of gate and up, which some files keep as one whose matrices have gate's rows first, or of up alone."""
    name, inner = f"blk.{layer}.ffn_gate_up_exps.weight", spec.architecture.projections[:-1]
    if name not in reader.gguf.tensors or spec.architecture.has_expert_biases or len(inner) < 2:
        return tuple(reader.experts(layer, f"ffn_{part}", spec.n_expert) for part in inner)
    return (LinearSource(reader.weight(name)),)


def _names_of_experts(spec: ModelSpec, layer: int, suffix: str) -> list[str]:
    return [f"blk.{layer}.ffn_{projection}_exps.{suffix}" for projection in spec.architecture.projections]


def _expert_biases(
    reader: _Reader, spec: ModelSpec, layer: int, buckets: BucketSources | None
) -> tuple[WeightSource, ...]:
    """The biases of all stored experts; narrower experts use the first of each."""
    shape = spec.layer_shape(layer)
    if not spec.architecture.has_expert_biases or not shape.n_expert:
        return ()
    n_stored = len(buckets.layout.buckets) if buckets else shape.n_expert
    names = _names_of_experts(spec, layer, "bias")
    lengths = (*[shape.n_ff] * (len(names) - 1), spec.n_embd_expert)
    return tuple(reader.floats(name, (n, n_stored)) for name, n in zip(names, lengths, strict=True))


def _expert_scales(
    reader: _Reader, spec: ModelSpec, layer: int, buckets: BucketSources | None, *, n_stacks: int
) -> tuple[WeightSource | None, ...]:
    """Factors on the products of all stored experts, of which a file may have any, but of gate and up none where both
    are one of `n_stacks`, that of down not counted.
    """
    n_stored = len(buckets.layout.buckets) if buckets else spec.layer_shape(layer).n_expert
    names = _names_of_experts(spec, layer, "scale")
    is_merged = n_stacks == 1 < len(names) - 1
    has = [name in reader.gguf.tensors and not (is_merged and name != names[-1]) for name in names]
    if spec.layer_shape(layer).n_expert and spec.architecture.has_down_scales:
        has[-1] = True
    scales = [reader.floats(name, (n_stored,)) if is_there else None for name, is_there in zip(names, has, strict=True)]
    return tuple(scales) if any(has) else ()


def _qkv(reader: _Reader, spec: ModelSpec, layer: int) -> tuple[LinearSource, ...]:
    """Q, K and V, which some files keep as one matrix, or the first two matrices of latent attention.

    There is no V where values are the keys.
    """
    block = f"blk.{layer}"
    if latent := spec.attention.latent:
        roles = ("attn_q_a" if latent.n_lora_q else "attn_q", "attn_kv_a_mqa")
        return tuple(reader.linear(f"{block}.{name}") for name in roles)
    attention, has_values = spec.attention_of(layer), True
    if f"{block}.attn_qkv.weight" not in reader.gguf.tensors:
        if any(role.role == "attn_v" and role.is_optional for role in spec.architecture.tensors):
            has_values = f"{block}.attn_v.weight" in reader.gguf.tensors
        names = ("attn_q", "attn_k", "attn_v") if has_values else ("attn_q", "attn_k")
        return tuple(reader.linear(f"{block}.{name}") for name in names)
    fused = reader.linear(f"{block}.attn_qkv")
    parts, begin = [], 0
    n_kv = attention.n_head_kv * attention.n_embd_head
    for name, n_rows in (("attn_q", attention.n_query_rows), ("attn_k", n_kv), ("attn_v", n_kv)):
        end = begin + n_rows
        bias = rows_of(fused.bias, f"{block}.{name}.bias", begin, end) if fused.bias else None
        parts.append(LinearSource(rows_of(fused.weight, f"{block}.{name}.weight", begin, end), bias))
        begin = end
    return tuple(parts)
