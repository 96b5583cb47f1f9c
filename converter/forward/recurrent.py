"""Layers that keep a state in place of attention, in torch as in the engine: short convolutions, delta nets, Mamba-2.

A delta net and Mamba-2 go from chunk to chunk of a sequence, so that there are products of matrices in place of a step
for each token. What the tokens of a chunk write into a delta net's state follows from a triangular system (arXiv
2406.06484); Mamba-2's write what they are (arXiv 2405.21060).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from slimoe.converter.forward.attention_pass import AttentionPass
from slimoe.converter.forward.norms import Norm, rms_norm
from slimoe.offload.model.recurrent_spec import RecurrentSpec
from slimoe.offload.model.spec import ModelSpec

CHUNK = 64
"""The number of tokens of a chunk: all tokens of one are compared with each other."""


@dataclass(frozen=True, slots=True)
class ShortConv:
    """A gated convolution: `inputs` [3 * n_embd, n_embd] makes what is convolved with `taps` [n_embd, n_conv], and what
    that is multiplied with before and after.
    """

    norm: Norm
    inputs: Tensor
    taps: Tensor
    out: Tensor

    def run(self, spec: ModelSpec, h: Tensor) -> AttentionPass:
        """The pass over one sequence [n, n_embd] from its first token on."""
        x = self.norm(h)
        both = x @ self.inputs.T
        before, after, values = both.chunk(3, -1)
        gated = after * convolve(before * values, self.taps)
        output = gated @ self.out.T
        reads = {"shortconv.in_proj": x, "shortconv.out_proj": gated}
        products = {"shortconv.in_proj": both, "shortconv.out_proj": output}
        return AttentionPass(spec.multipliers.residual * output, h.new_zeros(len(h)), reads, products)


@dataclass(frozen=True, slots=True)
class DeltaNet:
    """A gated delta net: its matrices by role, the `taps` [n_channels, n_conv] of its convolution, the factors of its
    decay and what is added before them [n_rank], and the weight [n_state] of its outputs' norm.
    """

    norm: Norm
    inputs: Mapping[str, Tensor]
    taps: Tensor
    decay: Tensor
    step_bias: Tensor
    output_norm: Tensor
    out: Tensor

    def run(self, spec: ModelSpec, h: Tensor) -> AttentionPass:
        """The pass over one sequence [n, n_embd] from its first token on."""
        of, x, n = spec.recurrent, self.norm(h), len(h)
        assert of is not None
        products = {role: x @ weight.T for role, weight in self.inputs.items()}
        mixed = torch.nn.functional.silu(convolve(products["attn_qkv"], self.taps))
        n_key = of.n_group * of.n_state
        queries, keys, values = (
            part.view(n, -1, of.n_state).transpose(0, 1) for part in mixed.split((n_key, n_key, of.n_inner), -1)
        )
        queries, keys = (self._of_value_heads(_unit(one, spec.rms_eps), spec, of) for one in (queries, keys))
        beta, alpha = _beta_and_alpha(products, of)
        decay = self.decay * torch.nn.functional.softplus(alpha + self.step_bias)
        heads = delta_rule(queries * of.n_state**-0.5, keys, values, decay.T, beta.sigmoid().T)
        normed = rms_norm(heads.transpose(0, 1), self.output_norm, spec.rms_eps)
        gated = (normed * torch.nn.functional.silu(products["attn_gate"]).view_as(normed)).flatten(1)
        products["ssm_out"] = gated @ self.out.T
        reads = dict.fromkeys(self.inputs, x) | {"ssm_out": gated}
        return AttentionPass(spec.multipliers.residual * products["ssm_out"], h.new_zeros(n), reads, products)

    def _of_value_heads(self, heads: Tensor, spec: ModelSpec, of: RecurrentSpec) -> Tensor:
        """The key head [n_rank, n, n_state] of each value head: neighbours share one, or those a number apart."""
        n_each = of.n_rank // of.n_group
        return heads.repeat_interleave(n_each, 0) if spec.architecture.groups_heads else heads.repeat(n_each, 1, 1)


@dataclass(frozen=True, slots=True)
class Mamba2:
    """A Mamba-2 mixer: `inputs` makes the gate, what is convolved with `taps` [n_channels, n_conv], and the sizes of
    steps. `decay` and `step_bias` [n_rank], `output_norm` [n_group, n_inner / n_group] and `conv_bias` [n_channels] are
    as in the file; `skip` [n_rank] is the part of the values that passes the state.
    """

    norm: Norm
    inputs: Tensor
    taps: Tensor
    decay: Tensor
    step_bias: Tensor
    output_norm: Tensor
    out: Tensor
    conv_bias: Tensor
    skip: Tensor

    def run(self, spec: ModelSpec, h: Tensor) -> AttentionPass:
        """The pass over one sequence [n, n_embd] from its first token on."""
        of, x, n = spec.recurrent, self.norm(h), len(h)
        assert of is not None
        every = x @ self.inputs.T
        gate, columns, steps = every.split((of.n_inner, of.n_channels, of.n_rank), -1)
        mixed = torch.nn.functional.silu(convolve(columns, self.taps) + self.conv_bias)
        n_key = of.n_group * of.n_state
        values, keys, queries = mixed.split((of.n_inner, n_key, n_key), -1)
        values = values.view(n, of.n_rank, -1).transpose(0, 1)
        keys, queries = (
            part.view(n, of.n_group, -1).transpose(0, 1).repeat_interleave(of.n_rank // of.n_group, 0)
            for part in (keys, queries)
        )
        steps = torch.nn.functional.softplus(steps + self.step_bias).T
        heads = decayed_sums(queries, keys, values * steps[..., None], self.decay[:, None] * steps)
        heads = heads + self.skip[:, None, None] * values
        gated = torch.nn.functional.silu(gate) * heads.transpose(0, 1).flatten(1)
        normed = rms_norm(gated.view(n, of.n_group, -1), self.output_norm, spec.rms_eps).flatten(1)
        output = normed @ self.out.T
        reads, products = {"ssm_in": x, "ssm_out": normed}, {"ssm_in": every, "ssm_out": output}
        return AttentionPass(spec.multipliers.residual * output, h.new_zeros(n), reads, products)


def convolve(columns: Tensor, taps: Tensor) -> Tensor:
    """The causal convolution of each channel [n, n_channels] with its `taps` [n_channels, n_conv]."""
    n_channels, n_conv = taps.shape
    padded = torch.nn.functional.pad(columns.T, (n_conv - 1, 0))
    return torch.nn.functional.conv1d(padded[None], taps[:, None], groups=n_channels)[0].T


def delta_rule(queries: Tensor, keys: Tensor, values: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    """What heads [n_head, n, n_state] read from a state that begins with zeros.

    For each token the state S [n_state, n_state] is multiplied with the exponential of its `decay` [n_head, n], and
    k b (v - S^T k)^T is added for its key k, value v and `beta` b [n_head, n]; its query q then reads S^T q.
    """
    n_head, n, n_state = keys.shape
    state, outputs = values.new_zeros(n_head, n_state, n_state), []
    for begin in range(0, n, CHUNK):
        q, k, v, g, b = (one[:, begin : begin + CHUNK] for one in (queries, keys, values, decay, beta[..., None]))
        lasting, since = _left_of(g)
        system = torch.eye(q.shape[1], device=q.device) + (b * lasting * (k @ k.mT)).tril(-1)
        written = torch.linalg.solve_triangular(system, b * (v - since * (k @ state)), upper=False, unitriangular=True)
        outputs.append(since * (q @ state) + (lasting * (q @ k.mT)) @ written)
        state = since[:, -1:] * state + (lasting[:, -1:].mT * k).mT @ written
    return torch.cat(outputs, 1)


def decayed_sums(queries: Tensor, keys: Tensor, values: Tensor, decay: Tensor) -> Tensor:
    """What heads [n_head, n, n_value] read from a state that begins with zeros.

    For each token the state S [n_state, n_value] is multiplied with the exponential of its `decay` [n_head, n], and
    k v^T is added for its key k [n_state] and value v [n_value]; its query q then reads S^T q.
    """
    n_head, n, n_state = keys.shape
    state, outputs = values.new_zeros(n_head, n_state, values.shape[-1]), []
    for begin in range(0, n, CHUNK):
        q, k, v, g = (one[:, begin : begin + CHUNK] for one in (queries, keys, values, decay))
        lasting, since = _left_of(g)
        outputs.append(since * (q @ state) + (lasting * (q @ k.mT)) @ v)
        state = since[:, -1:] * state + (lasting[:, -1:].mT * k).mT @ v
    return torch.cat(outputs, 1)


def _left_of(decay: Tensor) -> tuple[Tensor, Tensor]:
    """What is left at a token (row) of what one before it (column) wrote, and of the state before the chunk, by the
    `decay` [n_head, n] of a chunk's tokens: [n_head, n, n] and [n_head, n, 1].
    """
    # Their differences are small where the sums are large.
    passed = decay.double().cumsum(1)
    lasting = (passed[..., None] - passed[:, None]).tril().exp().tril().float()
    return lasting, passed.exp()[..., None].float()


def _unit(heads: Tensor, eps: float) -> Tensor:
    """Heads scaled to length 1."""
    return heads * torch.rsqrt(heads.square().sum(-1, keepdim=True) + eps)


def _beta_and_alpha(products: Mapping[str, Tensor], of: RecurrentSpec) -> tuple[Tensor, Tensor]:
    """What says how much of a value is taken in, and what decay depends on, [n, n_rank] each."""
    if "ssm_ba" not in products:
        return products["ssm_beta"], products["ssm_alpha"]
    beta, alpha = products["ssm_ba"].unflatten(1, (of.n_group, 2, -1)).unbind(2)
    return beta.flatten(1), alpha.flatten(1)
