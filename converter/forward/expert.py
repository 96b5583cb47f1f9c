"""Experts in torch, and parts that every token passes: their matrices, and what joins their products.

Vectors stand for those experts that a token of a model with compressed experts selects, but does not compute. Source:
arXiv 2503.00634. Of the experts that a token selects the first are computed, the main ones. Each of the others, the
auxiliary ones, changes what the main ones say: it has a `gain` on their sum, and a `shift` that is added to it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from slimoe.converter.forward.norms import Norm
from slimoe.offload.model.architecture import Activation

LEAST_SUM = 2.0**-14
"""What the weights of a token's auxiliary experts are divided by at least, as in the engine."""


@dataclass(frozen=True, slots=True)
class Linear:
    """A matrix [n_out, n_in] and its bias [n_out], if any."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """The product with rows [n, n_in]."""
        return torch.nn.functional.linear(x, self.weight, self.bias)


_OAI_ALPHA, _OAI_LIMIT = 1.702, 7.0
"""The factor within the sigmoid of OpenAI's SwiGLU, and where its inputs are clamped."""


def activate(products: Sequence[Tensor], activation: Activation = "swiglu") -> Tensor:
    """The activations [n, n_ff] of an expert from its products with gate and up, or with up alone."""
    if activation == "relu2":
        (up,) = products
        return torch.nn.functional.relu(up).square()
    gate, up = products
    if activation == "swiglu":
        return torch.nn.functional.silu(gate) * up
    if activation == "geglu":
        return torch.nn.functional.gelu(gate, approximate="tanh") * up
    gate, up = gate.clamp(max=_OAI_LIMIT), up.clamp(-_OAI_LIMIT, _OAI_LIMIT)
    return gate * (_OAI_ALPHA * gate).sigmoid() * (up + 1)


@dataclass(frozen=True, slots=True)
class Expert:
    """The matrices of one expert, or of a dense feed-forward part, and what joins gate and up; some have no gate."""

    gate: Linear | None
    up: Linear
    down: Linear
    activation: Activation = field(default="swiglu", kw_only=True)

    @classmethod
    def of(cls, linears: Sequence[Linear], activation: Activation = "swiglu") -> "Expert":
        """The expert of its matrices in the order of use."""
        *gate, up, down = linears
        return cls(gate[0] if gate else None, up, down, activation=activation)

    @property
    def inner(self) -> tuple[Linear, ...]:
        """The matrices that read the expert's input."""
        return (self.up,) if self.gate is None else (self.gate, self.up)

    def hidden(self, x: Tensor) -> Tensor:
        """The activations [n, n_ff] that `down` reads."""
        return activate([linear(x) for linear in self.inner], self.activation)

    def __call__(self, x: Tensor) -> Tensor:
        """The output [n, n_embd]."""
        return self.down(self.hidden(x))


@dataclass(frozen=True, slots=True)
class SharedExpert:
    """An expert that every token passes. The product of `gate` [n_embd], if any, and the input gates its output.

    One that does not read what the experts read has a `scale` [n_embd] of these inputs, `post_norm` is of its output.
    """

    expert: Expert
    gate: Tensor | None = None
    scale: Tensor | None = None
    post_norm: Norm | None = None

    def reads(self, x: Tensor) -> Tensor:
        """Its input [n, n_embd] of that of the experts."""
        return x if self.scale is None else x * self.scale

    def output(self, x: Tensor, down: Tensor) -> Tensor:
        """The output [n, n_embd] of its product with down, and the input that made it."""
        output = self.weights(x) * down
        return output if self.post_norm is None else self.post_norm(output)

    def weights(self, x: Tensor) -> Tensor:
        """What its output is multiplied with [n, 1]: 1 without a gate."""
        return x.new_ones(len(x), 1) if self.gate is None else (x @ self.gate).sigmoid()[:, None]

    def __call__(self, x: Tensor) -> Tensor:
        """The output [n, n_embd] for the experts' input."""
        read = self.reads(x)
        return self.output(read, self.expert(read))


@dataclass(frozen=True, slots=True)
class LatentSpace:
    """The matrices around experts that read and write fewer values than the residual stream has: `down` makes what they
    read of the router's input, `up` what is added to the stream of their sum.
    """

    down: Linear
    up: Linear

    def taken_back(self, update: Tensor) -> Tensor:
        """The sums [n, n_embd_expert] of experts that make what is nearest to an `update` [n, n_embd] of the stream."""
        return torch.linalg.lstsq(self.up.weight, update.T).solution.T


@dataclass(frozen=True, slots=True)
class AuxVectors:
    """The vectors of all rows of a router, `gain` and `shift` [n_row, n_embd]."""

    gain: Tensor
    shift: Tensor

    def gains(self, selected: Tensor, weights: Tensor) -> Tensor:
        """What the sum of the main experts is multiplied with [n, n_embd], by auxiliary experts [n, n_aux]."""
        return 1 + _mixed(self.gain, selected, aux_shares(weights))

    def shifts(self, selected: Tensor, weights: Tensor) -> Tensor:
        """What is added to it after that [n, n_embd]."""
        return _mixed(self.shift, selected, weights)


def aux_shares(weights: Tensor) -> Tensor:
    """The weights [n, n_aux] of a token's auxiliary experts over their sum."""
    return weights / weights.sum(-1, keepdim=True).clamp(min=LEAST_SUM)


def _mixed(vectors: Tensor, selected: Tensor, factors: Tensor) -> Tensor:
    """The sums [n, n_embd] of selected vectors times their factors, one rank after the other."""
    selected, factors = selected.to(vectors.device), factors.to(vectors.device)
    total = torch.zeros(len(selected), vectors.shape[1], device=vectors.device)
    for rank in range(selected.shape[1]):
        total += factors[:, rank, None] * vectors[selected[:, rank]]
    return total
