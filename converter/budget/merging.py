"""Experts of neurons of several: the calibration's tokens are run once more, for what the members' neurons do together.

A mean of weights is no mean of answers, so experts are joined in place of averaged. Of all neurons of a group's members
as many are kept as one expert has, and `down` is the least-squares fit of what the members together say to the tokens
that selected them: neurons that matter little go, and those that are left speak for members that are not their own.
"""

import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slimoe.converter.forward.block import read_expert
from slimoe.converter.forward.expert import Expert
from slimoe.converter.forward.routing import Routing
from slimoe.converter.forward.stream import Observer, Sequences, Stream, rows_by_expert
from slimoe.converter.layout.plan import MERGED, CompressPlan, ExpertPlan, LayerPlan
from slimoe.converter.methods.constant_experts import variances
from slimoe.converter.methods.expert_matrices import merged_vectors
from slimoe.converter.methods.layer_weight import layer_weight
from slimoe.converter.methods.removal import TOGETHER
from slimoe.converter.neurons.hidden_sums import hidden_sums
from slimoe.converter.neurons.trim import trim
from slimoe.converter.source.model_source import ModelSource, vectors_key
from slimoe.converter.stats.statistics import LayerStatistics, Statistics

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
_STEP = "joining experts"
_BYTES_PER_SQUARE = 300
"""Bytes of sums, equations and their copies for a group of experts, over the square of an expert's neurons."""
_STREAMS = 5
"""Residual streams of all tokens, and what the experts of a layer read."""
_TRIM_STEPS = 6
"""Operations of choosing among n neurons, over n^3."""
_TRIED = 1024
"""Unknowns of the equation that is tried at most."""


def with_joined_neurons(
    source: ModelSource, statistics: Statistics, plan: CompressPlan, on_progress: Progress
) -> CompressPlan:
    """The plan with chosen neurons in each expert of several members that is open, and a `down` fitted to them.

    What these experts are expected to lose is counted where the statistics say what errors of their layers cost. Takes
    `joining_bytes` of memory, and the experts of a group. Raises what reading does.
    """
    layers, n_open = {layer.block: layer for layer in plan.layers if _open(layer)}, _n_open(plan)
    stream, n_done, lost = Stream(source, _sequences(statistics)), 0, 0.0
    on_progress(_STEP, 0, n_open)
    try:
        stream.embed()
        for block in range(max(layers) + 1):
            tokens = _LayerTokens(source, block) if block in layers else Observer()
            stream.pass_layer(block, tokens)
            if not isinstance(tokens, _LayerTokens):
                continue
            experts = []
            for one in layers[block].experts:
                joined, error = tokens.joined(one) if one.is_open else (one, 0.0)
                experts.append(joined)
                lost += _cost(statistics.layers[block], one, error)
                n_done += one.is_open
                on_progress(_STEP, n_done, n_open)
            layers[block] = replace(layers[block], experts=tuple(experts))
    finally:
        stream.close()
    plan = replace(plan, layers=tuple(layers.get(layer.block, layer) for layer in plan.layers))
    if plan.expected_kl is None or not math.isfinite(lost):
        return plan
    uncounted = tuple(what for what in plan.uncounted if what != MERGED)
    return replace(plan, expected_kl=plan.expected_kl + lost, uncounted=uncounted)


def _cost(layer: LayerStatistics, expert: ExpertPlan, error: float) -> float:
    """KL divergence in nats per token of a mean squared error of the layer's output; NaN if it is not known."""
    if layer.outputs is None or layer.sensitivity is None:
        return math.nan
    profile = variances(layer.outputs)[list(expert.members)].mean(0)
    return TOGETHER * layer_weight(layer, profile).cost(error)


def joining_bytes(source: ModelSource) -> int:
    """The memory in which neurons are chosen: for one group of experts, and for the tokens' residual streams."""
    return _BYTES_PER_SQUARE * source.spec.n_ff**2 + _STREAMS * 4 * _MOST_TOKENS * source.spec.n_embd


def joining_seconds(source: ModelSource, statistics: Statistics, plan: CompressPlan) -> float:
    """The seconds that `with_joined_neurons` will take, from products and an equation tried for a moment.

    Counted are the passes of the tokens through layers, the activations of each group's members and their products,
    and what choosing neurons and fitting takes. Raises ModelFileError.
    """
    spec, n_token = source.spec, _sequences(statistics).n_rows
    layers = [layer for layer in plan.layers if _open(layer)]
    if not layers:
        return 0.0
    n_ff, n_embd = spec.n_ff, spec.n_embd_expert
    per_expert, pooled = 6 * n_embd * n_ff, _POOL * n_ff
    reading, multiplying, solving = _speeds(source, layers[0])
    n_layer = max(layer.block for layer in layers) + 1
    n_products = float(n_layer * n_token * per_expert * (spec.n_expert_used + 1))
    n_solved, n_reads = 0.0, 0.0
    for layer in layers:
        outputs = statistics.layers[layer.block].outputs
        uses = outputs.n_pick / statistics.n_tokens if outputs else np.ones(source.layers[layer.block].n_stored)
        n_reads += 2 * source.layers[layer.block].n_stored
        for expert in _open(layer):
            n_member, n_own = len(expert.members), n_token * min(1.0, float(uses[list(expert.members)].sum()))
            n_products += n_own * (n_member * per_expert + 2 * pooled * (pooled + n_embd))
            if n_member > _POOL:
                n_products += n_member * n_token * (per_expert + 2 * n_ff**2)
                n_solved += n_member * _TRIM_STEPS * n_ff**3
            n_solved += _TRIM_STEPS * pooled**3 + len(_RIDGES) * (pooled**3 + 4 * pooled**2 * n_embd)
    return n_reads * reading + n_products * multiplying + n_solved * solving


def _open(layer: LayerPlan) -> list[ExpertPlan]:
    return [expert for expert in layer.experts if expert.is_open]


def _n_open(plan: CompressPlan) -> int:
    return sum(len(_open(layer)) for layer in plan.layers)


def _sequences(statistics: Statistics) -> Sequences:
    """The tokens that are run: so many that none is needed twice."""
    step = max(1, sum(map(len, statistics.tokens)) // _MOST_TOKENS)
    return Sequences(statistics.tokens[::step])


def _speeds(source: ModelSource, layer: LayerPlan) -> tuple[float, float, float]:
    """Seconds to read an expert, for an operation of products in float32, and for one of equations in float64."""
    begin = time.perf_counter()
    expert = read_expert(source, layer.block, layer.experts[0].members[0])
    reading, x = time.perf_counter() - begin, torch.randn(_ROWS_AT_ONCE // 8, source.spec.n_embd_expert)
    begin = time.perf_counter()
    with torch.no_grad():
        expert(x)
    multiplying = (time.perf_counter() - begin) / (6 * len(x) * source.spec.n_embd_expert * source.spec.n_ff)
    n = min(_POOL * source.spec.n_ff, _TRIED)
    inner = torch.eye(n, dtype=torch.float64) + 0.01
    begin = time.perf_counter()
    torch.linalg.solve(inner, inner)
    return reading, multiplying, (time.perf_counter() - begin) / (8 / 3 * n**3)


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

    def of(self, neurons: NDArray[np.int64]) -> "OutputSums":
        """The sums of some of the activations."""
        own = torch.from_numpy(neurons)
        return OutputSums(self.product[own][:, own], self.cross[own], self.n_token)

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

    def routed(self, layer: int, first_row: int, x: Tensor, read: Tensor, routing: Routing) -> None:
        self.inputs.append(read)
        self.routings.append(routing)

    def joined(self, plan: ExpertPlan) -> tuple[ExpertPlan, float]:
        """The plan with the neurons that are kept and their `down`, and the mean squared error per token of the layer.

        It is the first member, without error, if no token selected any.
        """
        experts = [read_expert(self.source, self.layer, member) for member in plan.members]
        n_ff = len(experts[0].up.weight)
        with torch.no_grad():
            weight, wanted = self._answers(plan.members, experts)
            if not weight.any():
                return replace(plan, members=plan.members[:1], weights=(1.0,)), 0.0
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
        error = every.of(best.kept).error(torch.from_numpy(best.down)) + float(wanted.square().sum(dtype=torch.float64))
        return replace(plan, kept=numbers[best.kept], down=best.down), max(0.0, error) / len(wanted)

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
        if n >= len(expert.up.weight):
            return torch.arange(len(expert.up.weight))
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
