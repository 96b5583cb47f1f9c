"""The scales of blocks, chosen for the least weighted squared error of rounding, for many rows at once.

Of K types, scales are tried that stretch a run of 16 or 32 weights over a little more or less than the codes there
are, each is fitted to the codes that it leads to by least squares, and the best is kept, as in make_qkx3_quants and
make_qx_quants of ggml-quants.c. Then a block's scales are rounded to multiples of one half-precision number; minima
make up for what that spoils. Of all other types they are those that ggml's quantiser finds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray
from torch import Tensor

from slimoe.converter.quant.block_grid import without_codes
from slimoe.converter.quant.block_layout import BITS, HALVES, SCALES
from slimoe.converter.quant.packing import packed
from slimoe.converter.quant.quantize import F16_MAX, quantize_rows

_STEPS = {
    Type.Q2_K: (-1.0, -0.6, -0.2, 0.2, 0.6, 1.0, 1.4, 1.8),
    Type.Q3_K: (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5),
    Type.Q4_K: (-2.4, -1.9, -1.4, -0.9, -0.4, 0.1, 0.6, 1.1),
    Type.Q5_K: (-4.0, -3.3, -2.6, -1.9, -1.2, -0.5, 0.2, 0.9),
    Type.Q6_K: (-5.0, -4.0, -3.0, -2.0, -1.0, 0.0),
}
"""Codes more than there are that a run's weights are stretched over: with fewer, what weights have to make up for still
finds codes beyond them."""
_ROUNDED_STEPS = {4: (-1.0, -0.5, 0.0, 0.5, 1.0), 6: (-8.0, -6.0, -4.0, -2.0, 0.0, 2.0)}
"""The same of a block's scales, by their bits."""


@dataclass(frozen=True, slots=True)
class _Runs:
    """Runs of columns of some rows: weights `x` [n_runs, n_columns, n_rows], and both of them multiplied.

    `cost` [n_runs, 1, n_columns] is what a column's squared error costs.
    """

    x: Tensor
    cost: Tensor
    weighted: Tensor
    kind: Type

    @property
    def n_bits(self) -> int:
        """Of a code."""
        return int(BITS[self.kind].shape[1])

    def sum_of(self, values: Tensor) -> Tensor:
        """Over the columns, by what they cost: [n_runs, n_rows]."""
        return torch.bmm(self.cost, values)[:, 0]


@dataclass(frozen=True, slots=True)
class _Fit:
    """The loss that codes save, and the scale that weights are then multiples of (and more or less), [n_runs, n_rows].

    `sum_q` and `sum_qq` are the weighted sums of the codes, and of their squares.
    """

    saved: Tensor
    scale: Tensor
    sum_q: Tensor
    sum_qq: Tensor


def fitted_scales(target: Tensor, importance: Tensor, kind: Type) -> NDArray[np.uint8]:
    """Rows of blocks [n_rows, n_bytes] with scales and no codes, for `target` [n_columns, n_rows].

    `importance` [n_columns] is what a column's squared error costs. For types with a row in `BITS`.
    """
    if kind not in _STEPS:
        weight = target.T.contiguous().cpu().numpy()
        found_by_ggml = quantize_rows(weight, kind, importance.cpu().numpy().copy())
        return without_codes(found_by_ggml.reshape(len(weight), -1), kind)
    block, n_bytes = GGML_QUANT_SIZES[kind]
    found = []
    for columns, costs in zip(target.split(block), importance.split(block), strict=True):
        x, cost = columns.view(len(SCALES[kind][0]), -1, target.shape[1]), costs.view(len(SCALES[kind][0]), 1, -1)
        runs = _Runs(x, cost, x * cost.mT, kind)
        numbers, halves = _with_minima(runs) if len(SCALES[kind]) > 1 else _around_zero(runs)
        packs = [packed(places, one.int(), n_bytes) for places, one in zip(SCALES[kind], numbers, strict=True)]
        rows = torch.stack(packs).sum(0, dtype=torch.uint8).T.contiguous()
        for place, half in zip(HALVES[kind], halves, strict=True):
            rows[:, place : place + 2] = half[:, None].view(torch.uint8)
        found.append(rows)
    blocks: NDArray[np.uint8] = torch.cat(found, 1).cpu().numpy()
    return blocks


def _with_minima(runs: _Runs) -> tuple[list[Tensor], list[Tensor]]:
    """Integer scales and minima, and the halves [n_rows] that they are multiples of."""
    low, high = runs.x.amin(1).clamp_(max=0), runs.x.amax(1)
    top = (1 << runs.n_bits) - 1
    reach = (high - low).clamp_(min=1e-30)
    fit = _best([(top + step) / reach for step in _STEPS[runs.kind]], lambda inverse: _affine(runs, low, inverse))
    n_bits = SCALES[runs.kind][0].shape[1]
    scale, half = _rounded(fit.scale, fit.sum_qq, n_bits)
    one = runs.cost.sum(2)
    least = (scale * half.float() * fit.sum_q - runs.weighted.sum(1)) / one
    minimum, half_minimum = _rounded(least.clamp_(min=0), one, n_bits)
    return [scale, minimum], [half, half_minimum]


def _around_zero(runs: _Runs) -> tuple[list[Tensor], list[Tensor]]:
    """Integer scales as blocks hold them, and the half [n_rows] that they are multiples of."""
    n, top = 1 << runs.n_bits - 1, 1 << SCALES[runs.kind][0].shape[1] - 1
    most = _outermost(runs.x, 1)
    inverses = [(-(n + step) / most).nan_to_num_(0, 0, 0) for step in _STEPS[runs.kind]]
    scale = _best(inverses, lambda inverse: _linear(runs, n, inverse)).scale
    half = (_outermost(scale, 0) / -top).clamp_(-F16_MAX, F16_MAX).half()
    number = (scale / half.float()).nan_to_num_(0, 0, 0).round_().clamp_(-top, top - 1)
    return [number + top if runs.kind is Type.Q3_K else number], [half]


def _best(inverses: Sequence[Tensor], fitted: Callable[[Tensor], _Fit]) -> _Fit:
    """The fit that saves most of those that `inverses` of scales lead to, for each run of each row."""
    best = inverses[0]
    most = fitted(best).saved
    for inverse in inverses[1:]:
        saved = fitted(inverse).saved
        best = torch.where(saved > most, inverse, best)
        most = torch.maximum(most, saved)
    return fitted(best)


def _affine(runs: _Runs, low: Tensor, inverse: Tensor) -> _Fit:
    """By least squares, with minima of at least 0."""
    q = torch.addcmul((-low * inverse)[:, None], runs.x, inverse[:, None]).round_().clamp_(0, (1 << runs.n_bits) - 1)
    one, sum_x = runs.cost.sum(2), runs.weighted.sum(1)
    sum_q, sum_xq, sum_qq = runs.sum_of(q), (runs.weighted * q).sum(1), runs.sum_of(q.square_())
    determinant = one * sum_qq - sum_q.square()
    scale = (one * sum_xq - sum_x * sum_q) / determinant
    minimum = (sum_q * sum_xq - sum_qq * sum_x) / determinant
    is_free = minimum > 0
    scale = torch.where(is_free, scale, sum_xq / sum_qq).nan_to_num_(0, 0, 0)
    return _Fit(scale * sum_xq - torch.where(is_free, minimum * sum_x, 0), scale, sum_q, sum_qq)


def _linear(runs: _Runs, n: int, inverse: Tensor) -> _Fit:
    """By least squares, for codes of at least -n and below n."""
    q = torch.mul(runs.x, inverse[:, None]).round_().clamp_(-n, n - 1)
    sum_q, sum_xq, sum_qq = runs.sum_of(q), (runs.weighted * q).sum(1), runs.sum_of(q.square_())
    scale = (sum_xq / sum_qq).nan_to_num_(0, 0, 0)
    return _Fit(scale * sum_xq, scale, sum_q, sum_qq)


def _outermost(values: Tensor, dim: int) -> Tensor:
    """The value that is farthest from 0, with its sign."""
    low, high = values.amin(dim), values.amax(dim)
    return torch.where(-low > high, low, high)


def _rounded(values: Tensor, cost: Tensor, n_bits: int) -> tuple[Tensor, Tensor]:
    """Integers [n_runs, n_rows] for values of at least 0, and the halves [n_rows] that they are multiples of.

    `cost` is what squared errors cost.
    """
    top, most = (1 << n_bits) - 1, values.amax(0)
    halves = [(most / (top + step)).clamp_(max=F16_MAX).half() for step in _ROUNDED_STEPS[n_bits]]
    numbers = [(values / half.float()).nan_to_num_(0, 0, 0).round_().clamp_(0, top) for half in halves]
    losses = [
        ((values - number * half.float()).square_() * cost).sum(0) for number, half in zip(numbers, halves, strict=True)
    ]
    best = torch.stack(losses).argmin(0)
    row = torch.arange(len(best), device=best.device)
    return torch.stack(numbers).transpose(0, 1)[:, best, row], torch.stack(halves)[best, row]
