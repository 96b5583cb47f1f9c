"""Experts of neurons of several: the calibration's tokens are run once more, for what the members' neurons do together.

A mean of weights is no mean of answers, so experts are joined in place of averaged. Of all neurons of a group's members
as many are kept as one expert has, and `down` is the least-squares fit of what the members together say to the tokens
that selected them: neurons that matter little go, and those that are left speak for members that are not their own.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from slimoe.converter.budget.structure import Structure
from slimoe.converter.forward.block import Expert, Routing, read_expert
from slimoe.converter.forward.stream import Observer, Sequences, Stream, rows_by_expert
from slimoe.converter.layout.plan import ExpertPlan
from slimoe.converter.methods.expert_matrices import merged_vectors
from slimoe.converter.methods.hidden_sums import hidden_sums
from slimoe.converter.methods.trim import trim
from slimoe.converter.source.model_source import ModelSource, vectors_key
from slimoe.converter.stats.statistics import Statistics
from slimoe.offload.errors import UnsupportedModelError

Progress = Callable[[str, int, int], None]
"""Called with what is being done, and how much of how much is done."""

_MOST_TOKENS = 32768
_ROWS_AT_ONCE = 4096
_POOL = 2
"""How many times the neurons of an expert the candidates of a group are: each member brings its best ones."""
_HELD_OUT = 4
"""One sequence in so many decides how strong a ridge is."""
_RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
"""Of the mean square of an activation."""


def with_joined_neurons(
    source: ModelSource, statistics: Statistics, structure: Structure, on_progress: Progress
) -> Structure:
    """The structure with chosen neurons in each expert of several members, and a `down` fitted to them.

    Holds residual streams of the tokens, what the experts of one layer read, and for one group about 100 n_ff^2 bytes.
    Raises UnsupportedModelError for experts of different widths, and what reading does.
    """
    layers = {layer.block: layer for layer in structure.layers}
    step = max(1, sum(map(len, statistics.tokens)) // _MOST_TOKENS)
    stream = Stream(source, Sequences(statistics.tokens[::step]))
    try:
        stream.embed()
        for block in range(source.spec.n_layer):
            tokens = _LayerTokens(source, block)
            stream.pass_layer(block, tokens)
            if block in layers:
                joined = (tokens.joined(one) if one.is_joined else one for one in layers[block].experts)
                layers[block] = replace(layers[block], experts=tuple(joined))
            on_progress("joining experts", block + 1, source.spec.n_layer)
    finally:
        stream.close()
    return replace(structure, layers=tuple(layers[layer.block] for layer in structure.layers))


@dataclass(slots=True)
class OutputSums:
    """Sums over tokens: `product` [n, n] of a a^T and `cross` [n, n_embd] of a y^T, both float64.

    Here a [n] are activations times a token's weight, and y [n_embd] is the wanted output. `n_token` counts tokens.
    """

    product: Tensor
    cross: Tensor
    n_token: int = 0

    @classmethod
    def zeros(cls, n: int, n_embd: int) -> "OutputSums":
        """The sums over no tokens."""
        return cls(torch.zeros(n, n, dtype=torch.float64), torch.zeros(n, n_embd, dtype=torch.float64))

    def add(self, activations: Tensor, wanted: Tensor) -> None:
        """Adds tokens: their a [n_token, n] and y [n_token, n_embd]."""
        self.product += activations.T @ activations
        self.cross += activations.T @ wanted
        self.n_token += len(activations)

    def joined(self, other: "OutputSums") -> "OutputSums":
        """The sums over the tokens of both."""
        return OutputSums(self.product + other.product, self.cross + other.cross, self.n_token + other.n_token)

    def error(self, down: Tensor) -> float:
        """The squared error of an expert with `down` [n_embd, n], less the sum of |y|^2."""
        weights = down.double().T
        return float((weights * (self.product @ weights - 2 * self.cross)).sum())


def fit_down(down: Tensor, fit: OutputSums, held: OutputSums) -> Tensor:
    """The matrix [n_embd, n] that gives y with the least squared error, drawn to a multiple of `down` by a ridge.

    The ridge is the one whose fit to the first sums has the least error on those that were held out. If `down` as it is
    has less, as without tokens, it stays.
    """
    least, ridge = held.error(down), None
    for one in _RIDGES:
        error = held.error(_ridge_fit(down, fit, one))
        if error < least:
            least, ridge = error, one
    return down if ridge is None else _ridge_fit(down, fit.joined(held), ridge)


def _ridge_fit(down: Tensor, sums: OutputSums, ridge: float) -> Tensor:
    weights = down.double().T
    along = float((weights * sums.cross).sum()) / max(float((weights * (sums.product @ weights)).sum()), 1e-30)
    strength = ridge * float(sums.product.diagonal().mean()) + 1e-30
    inner = sums.product.clone()
    inner.diagonal().add_(strength)
    return torch.linalg.solve(inner, sums.cross + strength * along * weights).T.float()


@dataclass(slots=True)
class _LayerTokens(Observer):
    """Keeps what the experts of a layer read and what its router says, and joins experts by it."""

    source: ModelSource
    layer: int
    inputs: list[Tensor] = field(default_factory=list)
    routings: list[Routing] = field(default_factory=list)

    def routed(self, layer: int, first_row: int, x: Tensor, routing: Routing) -> None:
        self.inputs.append(x)
        self.routings.append(routing)

    def joined(self, plan: ExpertPlan) -> ExpertPlan:
        """The plan with the neurons that are kept and their `down`; its first member if no token selected any."""
        experts = [read_expert(self.source, self.layer, member) for member in plan.members]
        widths = {len(expert.gate.weight) for expert in experts}
        if len(widths) > 1:
            problem = (
                f"layer {self.layer} has experts of {min(widths)} to {max(widths)} neurons, which cannot be joined."
            )
            raise UnsupportedModelError(self.source.path, problem, "Merge experts of the model that it was made of.")
        n_ff = widths.pop()
        with torch.no_grad():
            weight, wanted = self._answers(plan.members, experts)
            if not weight.any():
                return ExpertPlan(plan.members[:1], plan.types)
            key = vectors_key(self.layer, "down", "bias")
            if key in self.source.shapes:
                bias = torch.from_numpy(merged_vectors(self.source, key, [plan], wanted.shape[1])[0])
                wanted -= weight[:, None] * bias
            candidates = [self._candidates(expert, _POOL * n_ff // len(experts)) for expert in experts]
            sums = self._sums(experts, candidates, weight, wanted)
            # At first every member's neurons speak as loud as the member was used.
            parts = zip(experts, candidates, plan.weights, strict=True)
            start = torch.cat([share * expert.down.weight[:, own] for expert, own, share in parts], 1)
            down = fit_down(start, *sums)
        every = sums[0].joined(sums[1])
        (best,) = trim(down.numpy(), every.product.numpy() / every.n_token, [n_ff])
        numbers = np.concatenate([place * n_ff + own.numpy() for place, own in enumerate(candidates)])
        return replace(plan, kept=numbers[best.kept], down=best.down)

    def _answers(self, members: Collection[int], experts: Collection[Expert]) -> tuple[Tensor, Tensor]:
        """The weights [n_token] that tokens have for members, and what these say to them [n_token, n_embd]."""
        x, by_number = torch.cat(self.inputs), dict(zip(members, experts, strict=True))
        parts = zip(*((r.logits, r.probabilities, r.selected, r.weights) for r in self.routings), strict=True)
        weight, wanted = torch.zeros(len(x)), torch.zeros_like(x)
        routing = Routing(*(torch.cat(part) for part in parts))
        for number, rows, weights in rows_by_expert(self.source.layers[self.layer].target, routing):
            if number in by_number:
                for some, share in zip(rows.split(_ROWS_AT_ONCE), weights.split(_ROWS_AT_ONCE), strict=True):
                    wanted.index_add_(0, some, share[:, None] * by_number[number](x[some]))
                weight.index_add_(0, rows, weights)
        return weight, wanted

    def _candidates(self, expert: Expert, n: int) -> Tensor:
        """The best `n` neurons of an expert by itself, ascending, on any tokens of the layer; all if it has no more."""
        if n >= len(expert.gate.weight):
            return torch.arange(len(expert.gate.weight))
        covariance = hidden_sums(expert, torch.cat(self.inputs)).covariance()
        return torch.from_numpy(trim(expert.down.weight.numpy(), covariance, [n])[0].kept)

    def _sums(
        self, experts: Collection[Expert], candidates: Collection[Tensor], weight: Tensor, wanted: Tensor
    ) -> tuple[OutputSums, OutputSums]:
        """Those over the tokens to fit to, and those over the ones held out."""
        n = sum(map(len, candidates))
        sequence = torch.repeat_interleave(torch.tensor([len(one) for one in self.inputs]))
        is_held, x = sequence % _HELD_OUT == _HELD_OUT - 1, torch.cat(self.inputs)
        found = OutputSums.zeros(n, x.shape[1]), OutputSums.zeros(n, x.shape[1])
        for sums, is_own in zip(found, (~is_held, is_held), strict=True):
            for some in torch.nonzero((weight != 0) & is_own)[:, 0].split(_ROWS_AT_ONCE):
                pairs = zip(experts, candidates, strict=True)
                hidden = torch.cat([expert.hidden(x[some])[:, own] for expert, own in pairs], 1)
                sums.add(weight[some, None] * hidden, wanted[some])
        return found
