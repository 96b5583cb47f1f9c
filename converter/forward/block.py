"""A transformer block and the head in torch, from a model's matrices by their GGUF names: what calibration observes.

Meanings are those of llama.cpp's graph of the model's architecture, and of our native format where a layer lacks parts,
means one expert by several rows of its router, or has constant experts. Everything is float32; tokens of one sequence
are rows [n, n_embd].
"""

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from slimoe.converter.forward.attention_pass import AttentionPass
from slimoe.converter.forward.block_end import BlockEnd
from slimoe.converter.forward.expert import AuxVectors, Expert, LatentSpace, Linear, SharedExpert
from slimoe.converter.forward.latent_heads import Heads, LatentMatrices
from slimoe.converter.forward.norms import Norm, rms_norm
from slimoe.converter.forward.recurrent import DeltaNet, Mamba2, ShortConv
from slimoe.converter.forward.rotation import angles_of, rotate
from slimoe.converter.forward.routing import Router
from slimoe.converter.forward.tensor_source import TensorSource
from slimoe.converter.source.model_source import (
    MatrixKey,
    ModelSource,
    block_key,
    choice_bias_key,
    expert_key,
    vectors_key,
)
from slimoe.offload.model.spec import ModelSpec
from slimoe.offload.model.tensor_list import AUX_GAIN, AUX_SHIFT, EXPERT_LATENT


@dataclass(frozen=True, slots=True)
class Attention:
    """A block's attention: norm, projections, and what not all models have: divisors of the angles [n_rot / 2], others
    for sequences longer than the original context, norms of queries and keys, a logit of each head to no token
    [n_head], and a window of so many tokens, 0 for all, with a frequency base of its own. With `latent` attention `k`
    and `v` are the same matrix, of low-rank rows of both and what rotates of keys. Without `v` the products with `k`
    are values too. Heads have `n_embd_head` values, of which `n_rot` rotate, or with 0 the model's. `post_norm`, if
    any, is of what is added to the stream.
    """

    norm: Norm
    q: Linear
    k: Linear
    v: Linear | None
    out: Linear
    rope_factors: Tensor | None = None
    long_factors: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    latent: LatentMatrices | None = None
    sinks: Tensor | None = field(default=None, kw_only=True)
    n_window: int = field(default=0, kw_only=True)
    n_embd_head: int = field(default=0, kw_only=True)
    n_rot: int = field(default=0, kw_only=True)
    post_norm: Norm | None = field(default=None, kw_only=True)


Mixer = Attention | DeltaNet | Mamba2 | ShortConv
"""What mixes the tokens of a sequence in a layer."""


def read_tensor(source: ModelSource, key: MatrixKey, device: str = "cpu") -> Tensor:
    """One of the model's matrices; raises ModelFileError."""
    if isinstance(source, TensorSource):
        return source.tensor(key)
    return torch.from_numpy(source.read(key)).to(device)


def _linear(source: ModelSource, layer: int, role: str, device: str) -> Linear:
    bias = block_key(layer, role, "bias")
    weight = read_tensor(source, block_key(layer, role), device)
    return Linear(weight, read_tensor(source, bias, device) if bias in source.shapes else None)


def read_attention(source: ModelSource, layer: int, device: str = "cpu") -> Mixer | None:
    """A layer's attention, or the recurrence in its place; None where it has neither. Raises ModelFileError."""
    if not source.layers[layer].has_attention:
        return None
    if source.spec.is_recurrent(layer):
        return _read_recurrent(source, layer, device)
    if source.spec.attention.latent:
        return _read_latent(source, layer, device)
    q, k, out = (_linear(source, layer, f"attn_{role}", device) for role in ("q", "k", "output"))
    v = _linear(source, layer, "attn_v", device) if block_key(layer, "attn_v") in source.shapes else None
    whole, short, long = (
        _optional(source, MatrixKey(f"{name}.weight"), device)
        for name in ("rope_freqs", "rope_factors_short", "rope_factors_long")
    )
    norms = [_optional(source, block_key(layer, role), device) for role in ("attn_q_norm", "attn_k_norm")]
    factors = (short, long) if whole is None else (whole, whole)
    if source.spec.architecture.has_window_heads and source.spec.window(layer):
        factors = None, None
    norm, sinks = _norm(source, layer, "attn_norm", device), _optional(source, block_key(layer, "attn_sinks"), device)
    return Attention(
        norm,
        *(q, k, v, out),
        *factors,
        *norms,
        sinks=sinks,
        n_window=source.spec.window(layer),
        n_embd_head=source.spec.attention_of(layer).n_embd_head,
        n_rot=source.spec.n_rot(layer),
        post_norm=_post_norm(source, layer, "post_attention_norm", device),
    )


def _read_recurrent(source: ModelSource, layer: int, device: str) -> DeltaNet | Mamba2 | ShortConv:
    def read(role: str, kind: str = "weight") -> Tensor:
        return read_tensor(source, block_key(layer, role, kind), device)

    norm = _norm(source, layer, "attn_norm", device)
    if source.spec.architecture.recurrence == "short_conv":
        return ShortConv(norm, *(read(f"shortconv.{role}") for role in ("in_proj", "conv", "out_proj")))
    common = read("ssm_conv1d"), read("ssm_a", "").flatten(), read("ssm_dt", "bias"), read("ssm_norm"), read("ssm_out")
    if source.spec.architecture.recurrence == "mamba2":
        return Mamba2(norm, read("ssm_in"), *common, read("ssm_conv1d", "bias"), read("ssm_d", "").flatten())
    roles = ("attn_qkv", "attn_gate", "ssm_beta", "ssm_alpha", "ssm_ba")
    inputs = {role: read(role) for role in roles if block_key(layer, role) in source.shapes}
    return DeltaNet(norm, inputs, *common)


def _read_latent(source: ModelSource, layer: int, device: str) -> Attention:
    q_norm, q_b, kv_b, k_b, v_b = (
        _optional(source, block_key(layer, f"attn_{role}"), device)
        for role in ("q_a_norm", "q_b", "kv_b", "k_b", "v_b")
    )
    q, kv, out = (
        _linear(source, layer, f"attn_{role}", device) for role in ("q" if q_b is None else "q_a", "kv_a_mqa", "output")
    )
    k = k_b if kv_b is None else kv_b
    assert k is not None
    latent = LatentMatrices(q_b, k, v_b, q_norm, read_tensor(source, block_key(layer, "attn_kv_a_norm"), device))
    return Attention(_norm(source, layer, "attn_norm", device), q, kv, kv, out, latent=latent)


def _optional(source: ModelSource, key: MatrixKey, device: str) -> Tensor | None:
    return read_tensor(source, key, device) if key in source.shapes else None


def read_router(source: ModelSource, layer: int, device: str = "cpu") -> Router | None:
    """A layer's norm and router, None where it has no experts; raises ModelFileError."""
    if not source.layers[layer].target:
        return None
    weight = read_tensor(source, block_key(layer, "ffn_gate_inp"), device)
    keys = choice_bias_key(layer), block_key(layer, "ffn_gate_inp", "bias")
    choice_bias, bias = (_optional(source, key, device) for key in keys)
    norm, scale = (
        read_ffn_norm(source, layer, device),
        _optional(source, block_key(layer, "ffn_gate_inp", "scale"), device),
    )
    if scale is not None:
        scale = _instead_of(norm, scale / math.sqrt(source.spec.n_embd))
    return Router(norm, weight, choice_bias, bias, scale)


def _instead_of(norm: Norm, weight: Tensor) -> Tensor:
    """What takes rows with the weights of `norm` to rows with a `weight` [n_embd]; 0 where the norm's are 0."""
    return torch.where(norm.weight == 0, torch.zeros_like(weight), weight / norm.weight)


def _post_norm(source: ModelSource, layer: int, role: str, device: str) -> Norm | None:
    """A norm of what a part adds to the stream, where the model has some and the layer the part."""
    is_there = source.spec.architecture.has_post_norms and block_key(layer, role) in source.shapes
    return _norm(source, layer, role, device) if is_there else None


def read_end(source: ModelSource, layer: int, device: str = "cpu") -> BlockEnd | None:
    """What a layer's update passes, None where it is added as it is; raises ModelFileError."""
    if block_key(layer, EXPERT_LATENT[1]) in source.shapes:
        return BlockEnd()
    if not source.spec.architecture.has_post_norms:
        return None
    experts, ffn = (_post_norm(source, layer, role, device) for role in ("post_ffw_norm_2", "post_ffw_norm"))
    return BlockEnd(experts, ffn, _optional(source, block_key(layer, "layer_output_scale"), device))


def _norm(source: ModelSource, layer: int, role: str, device: str) -> Norm:
    weight = read_tensor(source, block_key(layer, role), device)
    return Norm(weight, source.spec.rms_eps, _optional(source, block_key(layer, role, "bias"), device))


def read_ffn_norm(source: ModelSource, layer: int, device: str = "cpu") -> Norm:
    """The norm before a layer's feed-forward part; raises ModelFileError."""
    return _norm(source, layer, source.spec.architecture.ffn_norm, device)


def read_output_norm(source: ModelSource, device: str = "cpu") -> Norm:
    """The norm behind the last layer; raises ModelFileError."""
    stem = next(one.stored_as or one.role for one in source.spec.architecture.tensors if one.role == "output_norm")
    bias = _optional(source, MatrixKey(f"{stem}.bias"), device)
    return Norm(read_tensor(source, MatrixKey(f"{stem}.weight"), device), source.spec.rms_eps, bias)


def read_expert(source: ModelSource, layer: int, expert: int, device: str = "cpu") -> Expert:
    """A stored expert; raises ModelFileError."""
    architecture = source.spec.architecture
    linears = [_expert_linear(source, layer, name, expert, device) for name in architecture.projections]
    return Expert.of(linears, architecture.activation)


def _expert_linear(source: ModelSource, layer: int, projection: str, expert: int, device: str) -> Linear:
    """A matrix of an expert, times its scale, and as much of its bias as it has rows."""
    weight = read_tensor(source, expert_key(layer, projection, expert), device)
    scales, biases = (_optional(source, vectors_key(layer, projection, kind), device) for kind in ("scale", "bias"))
    bias = None if biases is None else biases[expert, : len(weight)]
    return Linear(weight if scales is None else scales[expert] * weight, bias)


def read_dense(source: ModelSource, layer: int, device: str = "cpu") -> tuple[Norm, Expert]:
    """A dense layer's norm and feed-forward part; raises ModelFileError."""
    architecture = source.spec.architecture
    linears = [_linear(source, layer, f"ffn_{name}", device) for name in architecture.projections]
    return read_ffn_norm(source, layer, device), Expert.of(linears, architecture.activation)


def read_shared(source: ModelSource, layer: int, device: str = "cpu") -> SharedExpert | None:
    """The expert that every token of a layer passes beside those it selects, None without; raises ModelFileError."""
    of = source.spec.architecture.shared
    if of is None or block_key(layer, f"ffn_down{of.suffix}") not in source.shapes:
        return None
    architecture = source.spec.architecture
    linears = [_linear(source, layer, f"ffn_{name}{of.suffix}", device) for name in architecture.projections]
    expert = Expert.of(linears, architecture.activation)
    if of.width != "dense":
        return SharedExpert(expert, _optional(source, block_key(layer, "ffn_gate_inp_shexp"), device))
    own = _norm(source, layer, "ffn_norm", device).weight
    scale = _instead_of(read_ffn_norm(source, layer, device), own)
    return SharedExpert(expert, None, scale, _norm(source, layer, "post_ffw_norm_1", device))


def read_latent_space(source: ModelSource, layer: int, device: str = "cpu") -> LatentSpace | None:
    """The matrices around a layer's experts, None where there are none; raises ModelFileError."""
    if block_key(layer, EXPERT_LATENT[0]) not in source.shapes:
        return None
    return LatentSpace(*(_linear(source, layer, role, device) for role in EXPERT_LATENT))


def read_aux_vectors(source: ModelSource, layer: int, device: str = "cpu") -> AuxVectors | None:
    """What stands for selected experts that are not computed, None where all are; raises ModelFileError."""
    if not source.spec.n_expert_aux:
        return None
    return AuxVectors(*(read_tensor(source, block_key(layer, role), device) for role in (AUX_GAIN, AUX_SHIFT)))


def attend(block: Mixer, spec: ModelSpec, h: Tensor) -> AttentionPass:
    """Causal attention of one sequence [n, n_embd] from its first token on; `update` is still to be added to `h`.

    It goes from one group of heads to the next, so that the attention weights of one group are held at a time.
    """
    if not isinstance(block, Attention):
        return block.run(spec, h)
    n = h.shape[0]
    x = block.norm(h)
    factors = block.long_factors if n > spec.rope.n_ctx_orig else block.rope_factors
    is_own = block.n_window and spec.rope.window_freq_base
    freq_base = spec.rope.window_freq_base if is_own else spec.rope.freq_base
    rope = replace(spec.rope, freq_base=freq_base, n_rot=block.n_rot or spec.rope.n_rot)
    heads = _heads_of(block, spec, x, angles_of(rope, n, h.device, factors))
    is_unseen = torch.ones(n, n, dtype=torch.bool, device=h.device).triu(1)
    if block.n_window:
        is_unseen |= torch.ones_like(is_unseen).tril(-block.n_window)
    outputs, received, group = [], torch.zeros(n, device=h.device), spec.n_head // len(heads.keys)
    sinks = (None,) * len(heads.keys) if block.sinks is None else block.sinks.split(group)
    for queries, key, value, sink in zip(heads.queries.split(group, 1), heads.keys, heads.values, sinks, strict=True):
        products = (queries.transpose(0, 1) @ key.T * spec.attention_scale).masked_fill(is_unseen, -math.inf)
        if sink is not None:
            products = torch.cat((products, sink[:, None, None].expand(-1, n, 1)), -1)
        weights = products.softmax(-1)[..., :n]
        received = received + weights.sum((0, 1))
        outputs.append((weights @ value).transpose(0, 1))
    output, reads, products_of = torch.cat(outputs, 1), dict(heads.reads), dict(heads.products)
    if block.latent is not None and block.latent.v is not None:
        reads["attn_v_b"] = output
        output = products_of["attn_v_b"] = torch.einsum("nhr,hvr->nhv", output, block.latent.v)
    if heads.gates is not None:
        output = output * heads.gates.sigmoid()
    reads["attn_output"] = output.flatten(1)
    last = products_of["attn_output"] = block.out(reads["attn_output"])
    last = last if block.post_norm is None else block.post_norm(last)
    return AttentionPass(spec.multipliers.residual * last, received, reads, products_of)


def _heads_of(block: Attention, spec: ModelSpec, x: Tensor, angles: tuple[Tensor, Tensor]) -> Heads:
    """The heads of the normalised input [n, n_embd]."""
    q, k = block.q(x), block.k(x)
    if block.latent is not None:
        heads, role = block.latent.heads(spec, q, k, angles), "attn_q" if block.latent.q is None else "attn_q_a"
        reads, products = {role: x, "attn_kv_a_mqa": x}, {role: q, "attn_kv_a_mqa": k}
        return replace(heads, reads=reads | dict(heads.reads), products=products | dict(heads.products))
    v, rows, gates, width = None if block.v is None else block.v(x), q, None, block.n_embd_head or spec.n_embd_head
    if spec.attention.is_gated:
        both = q.view(len(q), spec.n_head, 2, spec.n_embd_head)
        rows, gates = both[:, :, 0].flatten(1), both[:, :, 1]
    queries, keys = (
        _normed_heads(rotate(_heads(part, norm, spec, width), *angles, spec.architecture.rope), norm, spec)
        for part, norm in ((rows, block.q_norm), (k, block.k_norm))
    )
    values = (k if v is None else v).view(len(x), -1, width)
    if spec.architecture.norms_values:
        values = rms_norm(values, torch.ones_like(values[0, 0]), spec.rms_eps)
    products = {"attn_q": q, "attn_k": k} | ({} if v is None else {"attn_v": v})
    return Heads(queries, keys.unbind(1), values.unbind(1), dict.fromkeys(products, x), products, gates)


def _heads(rows: Tensor, norm: Tensor | None, spec: ModelSpec, width: int) -> Tensor:
    """Rows [n, n_head * width] as heads [n, n_head, width], normalised where there is a `norm`."""
    if norm is not None and spec.architecture.qk_norm == "row":
        rows = rms_norm(rows, norm, spec.rms_eps)
    heads = rows.view(len(rows), -1, width)
    return rms_norm(heads, norm, spec.rms_eps) if norm is not None and spec.architecture.qk_norm == "head" else heads


def _normed_heads(heads: Tensor, norm: Tensor | None, spec: ModelSpec) -> Tensor:
    """Heads [n, n_head, n_embd_head] that are normalised after the rotation."""
    is_later = norm is not None and spec.architecture.qk_norm == "head_after_rope"
    return rms_norm(heads, norm, spec.rms_eps) if is_later else heads
