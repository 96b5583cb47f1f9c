"""Quantising with error feedback: what rounding spoils in a column is made up for in the columns after it.

The error that counts is tr(E H E^T) with E = W - W_q and H the sum of x x^T over inputs. With H = R R^T, R upper
triangular, it is |E R|^2, whose column j knows errors of columns up to j only: rounding left to right against what is
left over is GPTQ (arXiv 2210.17323), without inverses. The scales of each block of columns are chosen from weights that
make up for the blocks before; then codes are chosen column by column, or codebook entry by entry, on the grid that
these scales span. Then, run after run of columns, scales are fitted to the codes that there are, and codes chosen once
more given all others (coordinate descent, arXiv 2309.01885).

All values lie in [n_columns, n_rows], some thousand rows at once. What runs owe each other is one product of matrices,
and what a run works on stays in the processor's cache.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray
from torch import Tensor

from slimoe.converter.quant.block_grid import Grid, grid_of, unshifted, with_codes
from slimoe.converter.quant.block_scales import fitted_scales
from slimoe.converter.quant.quantize import check_values, dequantize_rows
from slimoe.converter.quant.scale_refit import RunScales, can_refit
from slimoe.offload.ggml.cpu_features import processor_features

_DAMP = 0.03
"""Of the Hessian's mean diagonal, added to its diagonal."""
_N_COLUMNS = 256
_RUN = 32
_FEWEST_ROWS = 1024
"""With fewer for each, threads spend their time on waiting for each other's turn with the interpreter."""
_ROUNDS, _CODEBOOK_ROUNDS = 3, 2
"""Times that scales and codes are fitted to each other: the search in codebooks takes far longer."""
_MOST_ROWS = 4096
"""A part's, which bounds memory: the more there are, the less a column costs the interpreter."""


@dataclass(frozen=True, slots=True)
class Curvature:
    """A damped Hessian, factorised: all that matrices need which read the same inputs.

    `factor` [n_in, n_in]: on its diagonal R's blocks of 256 columns, above each of them R's rows so far times the
    block's inverse: what the block's weights want to change by for each unit of error before. `mean` is what the
    Hessian was divided by. `between` is the transposed factor, in what products between blocks are computed in.
    """

    factor: Tensor
    mean: float
    between: Tensor

    @classmethod
    def of(cls, hessian: NDArray[np.float32], device: str = "cpu") -> "Curvature":
        """Of the sum of x x^T [n_in, n_in]; holds three more matrices of that size while it works."""
        mean = float(hessian.diagonal().mean(dtype=np.float64))
        factor = upper_factor(damped(torch.from_numpy(hessian).to(device), _DAMP))
        for begin, end in _spans(len(factor)):
            own, above = factor[begin:end, begin:end], factor[:begin, begin:end]
            factor[:begin, begin:end] = torch.linalg.solve_triangular(own, above, upper=True, left=False)
        return cls(factor, mean if mean > 0 else 1.0, factor.T.to(product_type(factor.device)).contiguous())

    def solve(self, products: Tensor) -> Tensor:
        """The weights [n_out, n_in] whose products with the damped Hessian are these [n_out, n_in]."""
        found, spans = products.T / self.mean, list(_spans(len(self.factor)))
        for begin, end in reversed(spans):
            found[:begin].addmm_(self.factor[:begin, begin:end], found[begin:end], alpha=-1)
            own = self.factor[begin:end, begin:end]
            half = torch.linalg.solve_triangular(own, found[begin:end], upper=True)
            found[begin:end] = torch.linalg.solve_triangular(own.T, half, upper=False)
        for begin, end in spans:
            found[begin:end].addmm_(self.factor[:begin, begin:end].T, found[:begin], alpha=-1)
        return found.T.contiguous()


def upper_factor(matrix: Tensor) -> Tensor:
    """The upper triangular R with R R^T = `matrix`, which is symmetric and positive definite."""
    return torch.linalg.cholesky(matrix.flip(0, 1)).flip(0, 1)


def damped(hessian: Tensor, damp: float) -> Tensor:
    """H over its mean diagonal, with `damp` added to the diagonal; the identity if it knows nothing.

    Then H is invertible whatever its rank, and a column never seen costs `damp` of the mean one.
    """
    assert torch.isfinite(hessian).all()
    mean = float(hessian.diagonal().mean())
    eye = torch.eye(len(hessian), device=hessian.device)
    return (hessian + hessian.T) / (2 * mean) + damp * eye if mean > 0 else eye


def quantize_with_feedback(
    weight: NDArray[np.float32], curvature: Curvature, kind: Type, n_threads: int = 1
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Blocks of `weight` [n_out, n_in] and the values [n_out, n_in] that they have.

    For types with a row in `block_layout.BITS`. Works on the curvature's device; rows do not know of each other and are
    shared out between threads of the processor. Holds four more matrices of the weight's size. Raises as
    `quantize_rows` does.
    """
    check_values(weight, kind)
    n_parts = 1
    if curvature.factor.device.type == "cpu":
        n_parts = min(n_threads * -(-len(weight) // (n_threads * _MOST_ROWS)), max(1, len(weight) // _FEWEST_ROWS))
    parts = np.array_split(weight, n_parts)
    if n_parts == 1:
        found = [_fit_rows(weight, curvature, kind)]
    else:
        # torch's own threads would have a row's few thousand numbers to share, again and again.
        with ThreadPoolExecutor(min(n_threads, n_parts), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            found = list(pool.map(lambda part: _fit_rows(part, curvature, kind), parts))
    blocks = np.concatenate(found).reshape(-1)
    return blocks, dequantize_rows(blocks, kind, weight.shape[1])


def _fit_rows(weight: NDArray[np.float32], curvature: Curvature, kind: Type) -> NDArray[np.uint8]:
    """Rows of blocks [n_rows, n_bytes]."""
    factor = curvature.factor
    with torch.inference_mode():
        w = torch.from_numpy(weight).to(factor.device).T.contiguous()
        error, blocks = torch.zeros_like(w, dtype=curvature.between.dtype), []
        for begin, end in _spans(len(w)):
            target = w[begin:end] + (curvature.between[begin:end, :begin] @ error[:begin]).float()
            found, left = _fit_block(target, factor[begin:end, begin:end], kind)
            error[begin:end] = w[begin:end] - target + left
            blocks.append(found)
    return np.concatenate(blocks, 1)


def _spans(n_columns: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, n_columns, _N_COLUMNS):
        yield begin, min(begin + _N_COLUMNS, n_columns)


def _fit_block(target: Tensor, factor: Tensor, kind: Type) -> tuple[NDArray[np.uint8], Tensor]:
    """Rows of blocks [n_rows, n_bytes] for about the least |E^T R|^2, and the errors E [n_columns, n_rows].

    E is what is left of `target` [n_columns, n_rows], and `factor` R that of columns which no others follow.
    """
    metric = factor @ factor.T
    scales = fitted_scales(target, metric.diagonal(), kind)
    grid = grid_of(scales, kind, str(target.device))
    fit = BlockFit(grid, target, RunScales(scales, kind, str(target.device)) if can_refit(kind) else None)
    fit.feed_back(factor)
    fit.improve(metric, _ROUNDS if grid.width == 1 else _CODEBOOK_ROUNDS)
    return with_codes(scales if fit.scales is None else fit.scales.blocks(), kind, grid.stored(fit.codes)), fit.error


class BlockFit:
    """Codes for rows of one block each, on a `grid` whose `scales` move with them if they are there.

    `target` is [n_columns, n_rows], `error` what `codes` [n_groups, n_rows] leave of it. Columns are taken run by run.
    """

    def __init__(self, grid: Grid, target: Tensor, scales: RunScales | None = None) -> None:
        self.scales = scales
        self._grid, self._target = grid, target
        self._size = _RUN if scales is None else scales.size
        self.error = torch.zeros_like(target)
        dtype = torch.float32 if grid.width == 1 else torch.int32
        self.codes = torch.empty((len(target) // grid.width, target.shape[1]), dtype=dtype, device=target.device)
        # What products between runs take, which are most of the work.
        self._rounded = torch.zeros_like(target, dtype=product_type(target.device))

    def feed_back(self, factor: Tensor) -> None:
        """Chooses codes run after run, for about the least |error^T factor|^2."""
        own = _group_blocks(factor, self._grid.width)
        mixing = _mixing(factor, own)
        between = mixing.to(self._rounded.dtype)
        for run in self._runs():
            owed = (between[run, : run.start] @ self._rounded[: run.start]).float()
            self._code(run, owed, mixing, own)

    def improve(self, metric: Tensor, n_rounds: int) -> None:
        """Fits each run's scales to its codes, and chooses these again given all others, for a smaller e^T `metric` e.

        `n_rounds` times one run after the other.
        """
        own = _group_blocks(metric, self._grid.width)
        mixing, factors = _mixing(metric, own), torch.linalg.cholesky(own.flip(1, 2)).flip(1, 2)
        between = mixing.to(self._rounded.dtype, copy=True)
        runs = list(self._runs())
        for run in runs:
            between[run, run] = 0
        whole = metric.to(between.dtype)
        for _ in range(n_rounds):
            if self.scales is not None:
                self._stretch(self.scales, runs, whole)
            for number, run in enumerate(runs):
                owed = (between[run] @ self._rounded).float()
                if self.scales is not None:
                    here = metric[run, run]
                    slope = torch.addmm(_blocks_times(own[_groups(run, self._grid.width)], owed), here, self.error[run])
                    change = self.scales.refit(number, self._target[run], self.error[run], slope, here)
                    self._grid.rescale(run, *change)
                self._code(run, owed, mixing, factors)

    def _stretch(self, scales: RunScales, runs: list[slice], metric: Tensor) -> None:
        """Fits what all runs' scales are multiples of."""
        factor, offsets = scales.stretch(
            self._target, self.error, lambda values: (metric @ values.to(metric.dtype)).float()
        )
        for run, offset in zip(runs, offsets, strict=True):
            self._grid.rescale(run, factor, offset)
        self._rounded.copy_(self.error)

    def _runs(self) -> Iterator[slice]:
        for begin in range(0, len(self._target), self._size):
            yield slice(begin, begin + self._size)

    def _code(self, run: slice, owed: Tensor, mixing: Tensor, factors: Tensor) -> None:
        """Codes the groups of a run for what each wants: `owed` [n, n_rows] to other runs, the rest to its own."""
        width, error = self._grid.width, self.error[run]
        goal = unshifted(self._grid, run, self._target[run])
        parts = (one.split(width) for one in (owed.add_(goal), mixing[run, run], goal, error))
        numbers = range(run.start // width, run.stop // width)
        for group, wanted, inner, own_goal, left in zip(numbers, *parts, strict=True):
            wanted.addmm_(inner, error)
            self._grid.code(group, wanted, own_goal, factors[group], self.codes[group], left)
        self._rounded[run] = error


@cache
def product_type(device: torch.device) -> torch.dtype:
    """What products between many columns are computed in: BF16 where the processor multiplies it, some times as fast.

    They say what codes should make up for, and what is then left is known exactly.
    """
    is_fast = device.type == "cpu" and "AVX512_BF16" in (processor_features() or ())
    return torch.bfloat16 if is_fast else torch.float32


def _groups(run: slice, width: int) -> slice:
    return slice(run.start // width, run.stop // width)


def _blocks_times(blocks: Tensor, values: Tensor) -> Tensor:
    """Blocks [n, width, width] times the rows of values [n * width, n_rows] that belong to each."""
    if blocks.shape[1] == 1:
        return blocks.view(-1, 1) * values
    return (blocks @ values.view(len(blocks), -1, values.shape[1])).view(values.shape)


def _group_blocks(matrix: Tensor, width: int) -> Tensor:
    """The blocks [n_groups, width, width] on the diagonal."""
    n = len(matrix) // width
    group = torch.arange(n, device=matrix.device)
    return matrix.view(n, width, n, width)[group, :, group]


def _mixing(matrix: Tensor, own: Tensor) -> Tensor:
    """What a group's columns want to change by for each unit of error in others: [n, n], 0 within groups.

    Row by row of the result: the columns of a group times the inverse of its block of the matrix.
    """
    n_groups, width = own.shape[:2]
    rows = matrix.T.reshape(n_groups, width, -1)
    mixing = (rows / own if width == 1 else torch.linalg.solve(own.mT, rows)).reshape(matrix.shape)
    group = torch.arange(len(matrix), device=matrix.device) // width
    return torch.where(group[:, None] == group, 0, mixing)
