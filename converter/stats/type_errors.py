"""The errors of ggml types for an expert: squared errors of its output with requantised matrices, on a sample.

Quantisers of few bits take far longer than the pass itself, so only some rows of large matrices are tried: neurons of
gate and up, outputs of down. Neurons that matter more are sampled more likely, and the square of the sum over all
neurons is estimated from the sample without bias (Horvitz and Thompson's estimator, for neurons and for pairs of them).
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray
from torch import Tensor

from slimoe.converter.forward.expert import Expert, Linear, activate
from slimoe.converter.quant.gain import gain_of, has_scales
from slimoe.converter.quant.quantize import BadWeightsError, dequantize_rows, quantize_rows
from slimoe.converter.source.model_source import ModelSource, expert_key
from slimoe.converter.stats.sums import spread_rows
from slimoe.offload.errors import ModelFileError, UsageError

Importance = tuple[NDArray[np.float32], NDArray[np.float32]]
"""The importance of the columns of gate and up [n_embd], and of those of down [n_ff]."""

_FEW_BITS = ("IQ1_S", "IQ2_XXS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K")
DEFAULT_TYPES = (*_FEW_BITS, "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
_ROWS_AT_ONCE = 64
_SAMPLED_WEIGHTS, _FEWEST_ROWS = 1 << 21, 64
_LEAST_WEIGHT = 0.1
_OF_ACTIVATIONS = ("Q8_1", "Q8_K")


def type_by_name(name: str) -> GGMLQuantizationType:
    """The ggml type of a name; raises UsageError, which lists the names, unless weights can be quantised to it."""
    known = {k.name: k for k, (block, _) in GGML_QUANT_SIZES.items() if block > 1 and k.name not in _OF_ACTIVATIONS}
    if name not in known:
        raise UsageError(f"{name!r} is no type that weights are quantised to. Choose from {', '.join(known)}.")
    return known[name]


def sampled_rows(n_rows: int, n_embd: int, n_ff: int) -> int:
    """The number of rows of each matrix to try: `n_rows`, or fewer of large matrices, which would take too long."""
    return min(n_rows, max(_FEWEST_ROWS, _SAMPLED_WEIGHTS // (2 * n_embd + n_ff)))


@dataclass(frozen=True, slots=True)
class _Sample:
    """Some of an expert's tokens, neurons and outputs, and what the expert computes for them.

    `x` [n, n_embd] are the inputs of the tokens and `weights` [n] their expert weights; `products` [n, neurons] are
    those of gate, if there is one, and up, with the sampled neurons, which were sampled with probability `chance`
    [neurons]; `hidden` [n, n_ff] all activations, and `sampled` those of the sampled neurons. `down` has the sampled
    rows of down, and `reduced` these of the sampled neurons only. `expert` has the sampled neurons of gate and up.
    """

    x: Tensor
    weights: Tensor
    products: tuple[Tensor, ...]
    hidden: Tensor
    down: Tensor
    reduced: Tensor
    sampled: Tensor
    chance: Tensor
    expert: Expert


class TypeErrorTable:
    """Measures one layer's `TypeErrors`, expert after expert, on `n_rows` rows of each matrix, fewer of large ones.

    A type's error is infinite for matrices whose rows do not divide into its blocks.
    """

    def __init__(self, source: ModelSource, layer: int, types: Sequence[str], n_rows: int, n_threads: int) -> None:
        self._source, self._layer, self._n_threads = source, layer, n_threads
        self._n_rows = sampled_rows(n_rows, source.spec.n_embd_expert, source.spec.layer_shape(layer).n_ff)
        self.types = tuple(types)
        self.error = np.zeros((len(types), source.layers[layer].n_stored, 4))

    def measure(self, number: int, expert: Expert, x: Tensor, weights: Tensor, importance: Importance) -> float:
        """Sets an expert's errors over tokens of inputs `x` [n, n_embd] and expert weights [n].

        Returns the sum of w^2 |f|^2 over these tokens, by which `scale` can be told how much more all tokens have.
        """
        n_embd, hidden = expert.down.weight.shape[0], expert.hidden(x)
        outputs = torch.from_numpy(spread_rows(n_embd, self._n_rows)).to(x.device)
        # Neurons are sampled in proportion to what they add to the outputs.
        adds = (weights.square() @ hidden.square() * expert.down.weight.square().sum(0)).sqrt().double().cpu().numpy()
        likely = inclusion(adds, self._n_rows)
        taken = np.flatnonzero(np.random.default_rng((self._layer, number)).random(len(likely)) < likely)
        neurons, chance = (torch.from_numpy(one).to(hidden.device) for one in (taken, likely[taken]))
        part = Expert.of([*(_rows(one, neurons) for one in expert.inner), expert.down], expert.activation)
        down = expert.down.weight[outputs]
        reduced, sampled = down[:, neurons], hidden[:, neurons]
        products = tuple(linear(x) for linear in part.inner)
        sample = _Sample(x, weights, products, hidden, down, reduced, sampled, chance, part)
        all_outputs = n_embd / len(outputs)
        for row, name in enumerate(self.types):
            kind = type_by_name(name)
            names = self._source.spec.architecture.projections
            inner = [(name, one.weight, importance[0]) for name, one in zip(names, part.inner, strict=False)]
            changed = [
                self._requantised(kind, number, projection, rows, columns)
                for projection, rows, columns in (*inner, ("down", down, importance[1]))
            ]
            errors = _errors(sample, changed, neurons)
            self.error[row, number] = [all_outputs * error for error in errors]
        return _weighted_square(expert.down(hidden), weights)

    def scale(self, number: int, factor: float) -> None:
        """Multiplies an expert's errors by `factor`, to get from a sample of its tokens to all of them."""
        self.error[:, number] *= factor

    def _requantised(
        self, kind: GGMLQuantizationType, number: int, projection: str, rows: Tensor, columns: NDArray[np.float32]
    ) -> Tensor | None:
        """Rows of a matrix as blocks have them, without the gain; None if they do not divide into the blocks."""
        if rows.shape[1] % GGML_QUANT_SIZES[kind][0]:
            return None
        values = rows.cpu().contiguous().numpy()
        target = np.empty_like(values)
        n_at_once = max(1, min(_ROWS_AT_ONCE, -(-len(values) // self._n_threads)))

        def convert(begin: int) -> None:
            part = slice(begin, begin + n_at_once)
            target[part] = dequantize_rows(quantize_rows(values[part], kind, columns), kind, values.shape[1])

        try:
            with ThreadPoolExecutor(self._n_threads) as pool:
                list(pool.map(convert, range(0, len(values), n_at_once)))
        except BadWeightsError as error:
            key = expert_key(self._layer, projection, number)
            raise ModelFileError(self._source.path, f"tensor {key} {error}.") from None
        if has_scales(kind):
            target /= np.float32(gain_of(values, target, columns))
        return torch.from_numpy(target).to(rows.device)


def _rows(linear: Linear, rows: Tensor) -> Linear:
    return Linear(linear.weight[rows], None if linear.bias is None else linear.bias[rows])


def _errors(sample: _Sample, changed: Sequence[Tensor | None], neurons: Tensor) -> list[float]:
    """The errors over the sampled outputs of changed gate, up and down alone, and of all of them; None is infinite, and
    that of a gate that an expert does not have is 0.
    """
    *inner, down = changed
    others = [
        None if weight is None else replace(linear, weight=weight)(sample.x)
        for linear, weight in zip(sample.expert.inner, inner, strict=True)
    ]
    activated = partial(activate, activation=sample.expert.activation)
    errors = [np.inf] * 4
    if len(others) == 1:
        errors[0] = 0.0
    for place, other in enumerate(others, start=2 - len(others)):
        if other is not None:
            products = list(sample.products)
            products[place - 2 + len(others)] = other
            errors[place] = _estimate(sample, activated(products), sample.reduced)
    if down is not None:
        errors[2] = _weighted_square(sample.hidden @ (down - sample.down).T, sample.weights)
        whole = [other for other in others if other is not None]
        if len(whole) == len(others):
            errors[3] = _estimate(sample, activated(whole), down[:, neurons])
    return errors


def _estimate(sample: _Sample, changed: Tensor, down: Tensor) -> float:
    """Estimates the error with all neurons from the sampled ones, whose activations are `changed` [n, neurons].

    `down` [outputs, neurons] has the sampled columns of down.
    """
    before, after, a, b, chance = (t.double() for t in (sample.reduced, down, sample.sampled, changed, sample.chance))
    found = _weighted_square((b / chance) @ after.T - (a / chance) @ before.T, sample.weights)
    if bool((chance == 1).all()):
        return found
    squares = b.square() * after.square().sum(0) - 2 * a * b * (before * after).sum(0)
    squares += a.square() * before.square().sum(0)
    of_neuron = sample.weights.double().square() @ squares
    estimate = found - float((of_neuron * (1 - chance) / chance.square()).sum())
    return estimate if estimate > 0 else float((of_neuron / chance).sum())


def inclusion(weights: NDArray[np.float64], n_sample: int) -> NDArray[np.float64]:
    """Probabilities [n] of including each element in a sample, which sum to `n_sample`.

    They are in proportion to `weights` [n], but at most 1 and never 0.
    """
    if n_sample >= len(weights):
        return np.ones(len(weights))
    weights = weights + _LEAST_WEIGHT * weights.mean() + np.finfo(np.float64).tiny
    chance = np.zeros(len(weights))
    while True:
        free = chance < 1
        scaled = weights * (n_sample - np.count_nonzero(~free)) / weights[free].sum()
        chance = np.where(free, np.minimum(scaled, 1.0), 1.0)
        if not (chance[free] >= 1).any():
            return chance


def _weighted_square(vectors: Tensor, weights: Tensor) -> float:
    """The sum over rows of w^2 |vector|^2, w being the expert weights [n]."""
    return float((weights.double().square() * vectors.double().square().sum(-1)).sum())
