"""What experts would lose if they were narrower, measured while their tokens pass by.

Neurons are chosen, and `down` is fitted to them, by one half of an expert's tokens; errors are those on the other half.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slimoe.converter.neurons.hidden_sums import HiddenSums
from slimoe.converter.neurons.trim import TrimmedExpert, trim

_STEP, _BLOCK = 32, 256
"""Weights in the blocks of the smallest types and of most: a width that these divide can have them."""
_RUN = 256
"""Tokens in a row that belong to the same half: neighbours are too much alike to tell what others lose."""
_WORK = 1 << 35
"""The cubes of widths that are trimmed in a layer: of experts of 2048 neurons 4, of those of 4096 none."""


def narrower_widths(n_ff: int) -> tuple[int, ...]:
    """The widths that are tried for experts of `n_ff` neurons, ascending: from an eighth on, as blocks divide them."""
    eighths = {round(n_ff * part / 8 / _STEP) * _STEP for part in range(1, 8)}
    whole = set(range(_BLOCK, n_ff, _BLOCK)) if n_ff <= 8 * _BLOCK else set()
    return tuple(sorted(width for width in eighths | whole if n_ff / 8 <= width < n_ff))


def n_measured(n_expert: int, n_ff: int) -> int:
    """How many of a layer's experts of `n_ff` neurons are measured."""
    return min(n_expert, _WORK // n_ff**3) if narrower_widths(n_ff) else 0


class WidthErrorTable:
    """Measures one layer's errors of narrower experts, which have `n_ff` neurons, expert after expert.

    `error` [W, E] are sums over an expert's tokens of w^2 |change of the output|^2, w being the expert weight.
    `type_share` [W, E] is what the same relative error of each weight costs the narrower expert, over what it costs the
    whole one. Of large experts only some are measured, none that are not wanted, and NaN stands for the others until
    `finish`.
    """

    def __init__(self, n_expert: int, n_ff: int, *, is_wanted: bool = True) -> None:
        n_tried = n_measured(n_expert, n_ff) if is_wanted else 0
        self.widths = narrower_widths(n_ff)
        self.error, self.type_share = np.full((2, len(self.widths), n_expert), np.nan)
        self._measured = {number * n_expert // n_tried for number in range(n_tried)}
        self._expert, self._halves = -1, list[_Half]()

    def begin(self, number: int, n_ff: int) -> None:
        """The next tokens are those of an expert of `n_ff` neurons."""
        self._expert = number if number in self._measured and n_ff > max(self.widths) else -1
        self._halves = [_Half(n_ff), _Half(n_ff)] if self._expert >= 0 else []

    def add(self, rows: Tensor, hidden: Tensor, weights: Tensor) -> None:
        """Adds tokens: their numbers [n], activations [n, n_ff] and expert weights [n]."""
        for half, sums in enumerate(self._halves):
            own = (rows // _RUN % 2 == half).to(hidden.device)
            sums.add(hidden[own], weights[own])

    def end(self, down: Tensor) -> None:
        """Measures the expert whose tokens have been added, and whose `down` [n_embd, n_ff] this is."""
        if self._expert < 0:
            return
        fit, held = (half.sums() for half in self._halves)
        if fit.n_token and held.n_token:
            whole, covariance = down.cpu().numpy(), held.covariance()
            trimmed = trim(whole, fit.covariance(), self.widths)
            errors = [output_error(whole, one, covariance) for one in trimmed]
            self.error[:, self._expert] = (fit.weight_square + held.weight_square) * np.array(errors)
            squares = covariance.diagonal()
            magnitudes = [_magnitude(one.down, squares[one.kept]) for one in trimmed]
            self.type_share[:, self._expert] = np.array(magnitudes) / max(_magnitude(whole, squares), 1e-30)
        self._expert, self._halves = -1, []

    def finish(self, norm_square: NDArray[np.float64]) -> None:
        """Gives experts that were not measured the means of the layer: `norm_square` [E] are the sums of w^2 |f|^2.

        Of errors their share of the outputs is meant. All are zeros if nothing was measured.
        """
        known = np.isfinite(self.error).all(0) & (norm_square > 0)
        total = norm_square[known].sum()
        error = self.error[:, known].sum(1) / total if total > 0 else np.zeros(len(self.widths))
        share = self.type_share[:, known] @ norm_square[known] / total if total > 0 else error
        self.error = np.where(np.isnan(self.error), error[:, None] * norm_square, self.error)
        self.type_share = np.where(np.isnan(self.type_share), share[:, None], self.type_share)


class _Half:
    """Sums over half of an expert's tokens."""

    def __init__(self, n_ff: int) -> None:
        self._product: Tensor | None = None
        self._n_ff, self._weight_square, self._n_token = n_ff, 0.0, 0

    def add(self, hidden: Tensor, weights: Tensor) -> None:
        if self._product is None:
            self._product = torch.zeros(self._n_ff, self._n_ff, device=hidden.device)
        weighted = hidden * weights[:, None]
        self._product.addmm_(weighted.T, weighted)
        self._weight_square += float(weights.double().square().sum())
        self._n_token += len(weights)

    def sums(self) -> HiddenSums:
        product = torch.zeros(self._n_ff, self._n_ff) if self._product is None else self._product
        return HiddenSums(product.cpu().numpy(), self._weight_square, self._n_token)


def output_error(down: NDArray[np.float32], trimmed: TrimmedExpert, covariance: NDArray[np.float64]) -> float:
    """The mean of |change of the output|^2 of an expert whose activations have that covariance [n_ff, n_ff]."""
    change = down.astype(np.float64)
    change[:, trimmed.kept] -= trimmed.down
    return max(0.0, float(np.einsum("ij,ij->", change @ covariance, change)))


def _magnitude(down: NDArray[np.float32], squares: NDArray[np.float64]) -> float:
    """The sum of the squares of what each neuron alone says, by the mean squares [n] of their activations."""
    return float(np.square(down, dtype=np.float64).sum(0) @ squares)
