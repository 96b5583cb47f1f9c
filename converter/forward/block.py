"""A transformer block and the head in torch, from a model's matrices by their GGUF names: what calibration observes.

Meanings are those of llama.cpp's graph of the model's architecture, and of our native format where a layer lacks parts,
means one expert by several rows of its router, or has constant experts. Everything is float32; tokens of one sequence
are rows [n, n_embd].
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from slimoe.converter.forward.latent_heads import (
    LatentMatrices,
    latent_keys_and_values,
    latent_queries,
    split_keys_and_values,
)
from slimoe.converter.forward.rotation import angles_of, rotate
from slimoe.converter.source.model_source import (
    PROJECTIONS,
    MatrixKey,
    ModelSource,
    block_key,
    choice_bias_key,
    expert_key,
    vectors_key,
)
from slimoe.offload.model.architecture import Activation
from slimoe.offload.model.expert_spec import ExpertSpec
from slimoe.offload.model.spec import ModelSpec

_LEAST_SUM = 2.0**-14
"""llama.cpp's lower bound of what the probabilities of the selected experts are divided by."""


@dataclass(frozen=True, slots=True)
class Linear:
    """A matrix [n_out, n_in] and its bias [n_out], if any."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """The product with rows [n, n_in]."""
        return torch.nn.functional.linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class Norm:
    """Divides rows by their root mean square, multiplies them with `weight` [n] and adds the bias [n], if any."""

    weight: Tensor
    eps: float
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """The normalised rows."""
        normed = rms_norm(x, self.weight, self.eps)
        return normed if self.bias is None else normed + self.bias


@dataclass(frozen=True, slots=True)
class Attention:
    """A block's attention: norm, projections, and what not all models have: divisors of the angles [n_rot / 2], others
    for sequences longer than the original context, norms of queries and keys, a logit of each head to no token
    [n_head], and a window of so many tokens, 0 for all, with a frequency base of its own. With `latent` attention `k`
    and `v` are the same matrix, of low-rank rows of both and what rotates of keys, and the norms those of low ranks.
    """

    norm: Norm
    q: Linear
    k: Linear
    v: Linear
    out: Linear
    rope_factors: Tensor | None = None
    long_factors: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    latent: LatentMatrices | None = None
    sinks: Tensor | None = field(default=None, kw_only=True)
    n_window: int = field(default=0, kw_only=True)


@dataclass(frozen=True, slots=True)
class AttentionPass:
    """One pass of attention over a sequence of n tokens.

    `x` [n, n_embd] is its normalised input, `output` [n, n_head * n_embd_head] the joined output of the heads, `update`
    [n, n_embd] what is added to the residual stream. `received` [n] are the attention weights that each token gets from
    itself and all later ones, summed over heads. `q`, `k` and `v` [n, n_out] are those before norms and rotation.
    """

    x: Tensor
    output: Tensor
    update: Tensor
    received: Tensor
    q: Tensor
    k: Tensor
    v: Tensor


@dataclass(frozen=True, slots=True)
class Router:
    """The feed-forward part's norm, and the router `weight` [n_row, n_embd].

    `bias` [n_row], if any, is that of its logits, and `choice_bias` [n_row] is added to the scores to select experts,
    but not to their weights.
    """

    norm: Norm
    weight: Tensor
    choice_bias: Tensor | None = None
    bias: Tensor | None = None

    def with_rows(self, rows: Sequence[int]) -> "Router":
        """The router with only some of its rows."""
        own = torch.tensor(rows, device=self.weight.device)
        choice_bias, bias = (None if one is None else one[own] for one in (self.choice_bias, self.bias))
        return Router(self.norm, self.weight[own], choice_bias, bias)


@dataclass(frozen=True, slots=True)
class Routing:
    """What a router answers to n tokens: logits and probabilities for all its rows [n, n_row], each by itself if the
    score is a sigmoid; the rows that are selected and their expert weights [n, n_used], the likeliest first.
    """

    logits: Tensor
    probabilities: Tensor
    selected: Tensor
    weights: Tensor


_OAI_ALPHA, _OAI_LIMIT = 1.702, 7.0
"""The factor within the sigmoid of OpenAI's SwiGLU, and where its inputs are clamped."""


def activate(gate: Tensor, up: Tensor, activation: Activation = "swiglu") -> Tensor:
    """The activations [n, n_ff] of an expert from its products with gate and up."""
    if activation == "swiglu":
        return torch.nn.functional.silu(gate) * up
    gate, up = gate.clamp(max=_OAI_LIMIT), up.clamp(-_OAI_LIMIT, _OAI_LIMIT)
    return gate * (_OAI_ALPHA * gate).sigmoid() * (up + 1)


@dataclass(frozen=True, slots=True)
class Expert:
    """The matrices of one expert, or of a dense feed-forward part, and what joins gate and up."""

    gate: Linear
    up: Linear
    down: Linear
    activation: Activation = field(default="swiglu", kw_only=True)

    def hidden(self, x: Tensor) -> Tensor:
        """The activations [n, n_ff] that `down` reads."""
        return activate(self.gate(x), self.up(x), self.activation)

    def __call__(self, x: Tensor) -> Tensor:
        """The output [n, n_embd]."""
        return self.down(self.hidden(x))


@dataclass(frozen=True, slots=True)
class SharedExpert:
    """An expert that every token passes. The product of `gate` [n_embd], if any, and the input gates its output."""

    expert: Expert
    gate: Tensor | None = None

    def weights(self, x: Tensor) -> Tensor:
        """What its output is multiplied with [n, 1]: 1 without a gate."""
        return x.new_ones(len(x), 1) if self.gate is None else (x @ self.gate).sigmoid()[:, None]

    def __call__(self, x: Tensor) -> Tensor:
        """The output [n, n_embd]."""
        return self.weights(x) * self.expert(x)


def read_tensor(source: ModelSource, key: MatrixKey, device: str = "cpu") -> Tensor:
    """One of the model's matrices; raises ModelFileError."""
    return torch.from_numpy(source.read(key)).to(device)


def _linear(source: ModelSource, layer: int, role: str, device: str) -> Linear:
    bias = block_key(layer, role, "bias")
    weight = read_tensor(source, block_key(layer, role), device)
    return Linear(weight, read_tensor(source, bias, device) if bias in source.shapes else None)


def read_attention(source: ModelSource, layer: int, device: str = "cpu") -> Attention | None:
    """A layer's attention, None where it has none; raises ModelFileError."""
    if not source.layers[layer].has_attention:
        return None
    if source.spec.attention.latent:
        return _read_latent(source, layer, device)
    q, k, v, out = (_linear(source, layer, f"attn_{role}", device) for role in ("q", "k", "v", "output"))
    whole, short, long = (
        _optional(source, MatrixKey(f"{name}.weight"), device)
        for name in ("rope_freqs", "rope_factors_short", "rope_factors_long")
    )
    norms = [_optional(source, block_key(layer, role), device) for role in ("attn_q_norm", "attn_k_norm")]
    factors = (short, long) if whole is None else (whole, whole)
    norm, sinks = _norm(source, layer, "attn_norm", device), _optional(source, block_key(layer, "attn_sinks"), device)
    return Attention(norm, q, k, v, out, *factors, *norms, sinks=sinks, n_window=source.spec.window(layer))


def _read_latent(source: ModelSource, layer: int, device: str) -> Attention:
    parts = {
        role: _optional(source, block_key(layer, f"attn_{role}"), device)
        for role in ("q_a_norm", "kv_a_norm", "q_b", "kv_b")
    }
    if (both := parts["kv_b"]) is not None:
        k_b, v_b = split_keys_and_values(both, source.spec)
    else:
        k_b, v_b = (read_tensor(source, block_key(layer, f"attn_{role}"), device) for role in ("k_b", "v_b"))
    q, kv, out = (
        _linear(source, layer, f"attn_{role}", device)
        for role in ("q" if parts["q_b"] is None else "q_a", "kv_a_mqa", "output")
    )
    norm, latent = _norm(source, layer, "attn_norm", device), LatentMatrices(parts["q_b"], k_b, v_b)
    return Attention(norm, q, kv, kv, out, q_norm=parts["q_a_norm"], k_norm=parts["kv_a_norm"], latent=latent)


def _optional(source: ModelSource, key: MatrixKey, device: str) -> Tensor | None:
    return read_tensor(source, key, device) if key in source.shapes else None


def read_router(source: ModelSource, layer: int, device: str = "cpu") -> Router | None:
    """A layer's norm and router, None where it has no experts; raises ModelFileError."""
    if not source.layers[layer].target:
        return None
    weight = read_tensor(source, block_key(layer, "ffn_gate_inp"), device)
    keys = choice_bias_key(layer), block_key(layer, "ffn_gate_inp", "bias")
    choice_bias, bias = (_optional(source, key, device) for key in keys)
    return Router(read_ffn_norm(source, layer, device), weight, choice_bias, bias)


def _norm(source: ModelSource, layer: int, role: str, device: str) -> Norm:
    weight = read_tensor(source, block_key(layer, role), device)
    return Norm(weight, source.spec.rms_eps, _optional(source, block_key(layer, role, "bias"), device))


def read_ffn_norm(source: ModelSource, layer: int, device: str = "cpu") -> Norm:
    """The norm before a layer's feed-forward part; raises ModelFileError."""
    return _norm(source, layer, source.spec.architecture.ffn_norm, device)


def read_output_norm(source: ModelSource, device: str = "cpu") -> Norm:
    """The norm behind the last layer; raises ModelFileError."""
    bias = _optional(source, MatrixKey("output_norm.bias"), device)
    return Norm(read_tensor(source, MatrixKey("output_norm.weight"), device), source.spec.rms_eps, bias)


def read_expert(source: ModelSource, layer: int, expert: int, device: str = "cpu") -> Expert:
    """A stored expert; raises ModelFileError."""
    gate, up, down = (_expert_linear(source, layer, name, expert, device) for name in PROJECTIONS)
    return Expert(gate, up, down, activation=source.spec.architecture.activation)


def _expert_linear(source: ModelSource, layer: int, projection: str, expert: int, device: str) -> Linear:
    """A matrix of an expert, times its scale, and as much of its bias as it has rows."""
    weight = read_tensor(source, expert_key(layer, projection, expert), device)
    scales, biases = (_optional(source, vectors_key(layer, projection, kind), device) for kind in ("scale", "bias"))
    bias = None if biases is None else biases[expert, : len(weight)]
    return Linear(weight if scales is None else scales[expert] * weight, bias)


def read_dense(source: ModelSource, layer: int, device: str = "cpu") -> tuple[Norm, Expert]:
    """A dense layer's norm and feed-forward part; raises ModelFileError."""
    ffn = Expert(*(_linear(source, layer, f"ffn_{name}", device) for name in PROJECTIONS))
    return read_ffn_norm(source, layer, device), ffn


def read_shared(source: ModelSource, layer: int, device: str = "cpu") -> SharedExpert | None:
    """The expert that every token of a layer passes beside those it selects, None without; raises ModelFileError."""
    if block_key(layer, "ffn_down_shexp") not in source.shapes:
        return None
    expert = Expert(*(_linear(source, layer, f"ffn_{name}_shexp", device) for name in PROJECTIONS))
    return SharedExpert(expert, _optional(source, block_key(layer, "ffn_gate_inp_shexp"), device))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Rows divided by their root mean square, times `weight`."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def attend(block: Attention, spec: ModelSpec, h: Tensor) -> AttentionPass:
    """Causal attention of one sequence [n, n_embd] from its first token on; `update` is still to be added to `h`.

    It goes from one key head to the next, so that the attention weights of one group of heads are held at a time.
    """
    n = h.shape[0]
    x = block.norm(h)
    factors = block.long_factors if n > spec.rope.n_ctx_orig else block.rope_factors
    is_own = block.n_window and spec.rope.window_freq_base
    rope = replace(spec.rope, freq_base=spec.rope.window_freq_base) if is_own else spec.rope
    cos, sin = angles_of(rope, n, h.device, factors)
    q, k, v = block.q(x), block.k(x), block.v(x)
    queries, keys, values = (_heads_of if block.latent is None else _latent_heads)(block, spec, (q, k, v), (cos, sin))
    is_unseen = torch.ones(n, n, dtype=torch.bool, device=h.device).triu(1)
    if block.n_window:
        is_unseen |= torch.ones_like(is_unseen).tril(-block.n_window)
    outputs, received, group = [], torch.zeros(n, device=h.device), spec.n_head // keys.shape[1]
    for head in range(keys.shape[1]):
        of_group = queries[:, head * group : (head + 1) * group].transpose(0, 1)
        products = (of_group @ keys[:, head].T * spec.attention_scale).masked_fill(is_unseen, -math.inf)
        if block.sinks is not None:
            own = block.sinks[head * group : (head + 1) * group, None, None].expand(-1, n, 1)
            products = torch.cat((products, own), -1)
        weights = products.softmax(-1)[..., :n]
        received = received + weights.sum((0, 1))
        outputs.append((weights @ values[:, head]).transpose(0, 1).reshape(n, -1))
    output = torch.cat(outputs, -1)
    return AttentionPass(x, output, spec.multipliers.residual * block.out(output), received, q, k, v)


_Three = tuple[Tensor, Tensor, Tensor]


def _heads_of(block: Attention, spec: ModelSpec, rows: _Three, angles: tuple[Tensor, Tensor]) -> _Three:
    """Heads of queries [n, n_head, n_embd_head] and of keys and values [n, n_head_kv, n_embd_head]."""
    q, k, v = rows
    queries, keys = (
        _normed_heads(rotate(_heads(part, norm, spec), *angles, spec.architecture.rope), norm, spec)
        for part, norm in ((q, block.q_norm), (k, block.k_norm))
    )
    return queries, keys, v.view(len(v), spec.n_head_kv, spec.n_embd_head)


def _latent_heads(block: Attention, spec: ModelSpec, rows: _Three, angles: tuple[Tensor, Tensor]) -> _Three:
    """The same with latent attention, where all heads have keys and values of their own."""
    (q, both, _), latent, kind = rows, block.latent, spec.architecture.rope
    assert latent is not None
    assert block.k_norm is not None
    q = q if block.q_norm is None else rms_norm(q, block.q_norm, spec.rms_eps)
    plain, turning = latent_queries(latent, spec, q)
    queries = torch.cat((plain, rotate(turning, *angles, kind)), -1)
    if temperature := spec.attention.temperature:
        factors = temperature.factors(np.arange(len(q), dtype=np.int32))
        queries = queries * torch.from_numpy(factors).to(q.device)[:, None, None]
    row, turning = both.split((both.shape[1] - spec.rope.n_rot, spec.rope.n_rot), -1)
    row = rms_norm(row, block.k_norm, spec.rms_eps)
    return queries, *latent_keys_and_values(latent, row, rotate(turning[:, None], *angles, kind))


def _heads(rows: Tensor, norm: Tensor | None, spec: ModelSpec) -> Tensor:
    """Rows [n, n_head * n_embd_head] as heads [n, n_head, n_embd_head], normalised where there is a `norm`."""
    if norm is not None and spec.architecture.qk_norm == "row":
        rows = rms_norm(rows, norm, spec.rms_eps)
    heads = rows.view(len(rows), -1, spec.n_embd_head)
    return rms_norm(heads, norm, spec.rms_eps) if norm is not None and spec.architecture.qk_norm == "head" else heads


def _normed_heads(heads: Tensor, norm: Tensor | None, spec: ModelSpec) -> Tensor:
    """Heads [n, n_head, n_embd_head] that are normalised after the rotation."""
    is_later = norm is not None and spec.architecture.qk_norm == "head_after_rope"
    return rms_norm(heads, norm, spec.rms_eps) if is_later else heads


def route(router: Router, spec: ModelSpec, x: Tensor) -> Routing:
    """The experts that a router selects for normalised rows `x` [n, n_embd], the likeliest first."""
    logits = torch.nn.functional.linear(x, router.weight, router.bias)
    probabilities = logits.sigmoid() if spec.router_score == "sigmoid" else logits.softmax(-1)
    scores = logits if spec.router_score == "softmax_of_selected" else probabilities
    choice = scores if router.choice_bias is None else scores + router.choice_bias
    selected = _of_best_groups(choice, spec.experts).topk(spec.n_expert_used, -1).indices
    weights = scores.gather(-1, selected)
    if spec.router_score == "softmax_of_selected":
        weights = weights.softmax(-1)
    if spec.renormalises:
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=_LEAST_SUM)
    return Routing(logits, probabilities, selected, weights * spec.expert_weights_scale)


def _of_best_groups(choice: Tensor, experts: ExpertSpec) -> Tensor:
    """The scores [n, n_row] with -inf in the groups that are not selected, whose two best add up to less."""
    if experts.n_group < 2:
        return choice
    groups = choice.unflatten(-1, (experts.n_group, -1))
    best = groups.topk(2, -1).values.sum(-1).topk(experts.n_group_used, -1).indices
    is_other = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(-1, best, value=False)
    return groups.masked_fill(is_other[..., None], -math.inf).flatten(-2)
