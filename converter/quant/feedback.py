"""Quantising with error feedback: what rounding spoils in a column is made up for in the columns after it.

The error that counts is tr(E H E^T) with E = W - W_q and H the sum of x x^T over inputs. With H = R R^T, R upper
triangular, it is |E R|^2, whose column j knows errors of columns up to j only: rounding left to right against what is
left over is GPTQ (arXiv 2210.17323), without inverses. The scales of each block of columns are chosen from weights that
make up for the blocks before; then codes are chosen column by column, or codebook entry by entry, on the grid that
these scales span. Then scales are fitted to the codes that there are, and codes chosen once more given all others
(coordinate descent, arXiv 2309.01885), some times in turn.

All values lie in [n_columns, n_rows], some thousand rows at once. Columns are coded in small runs: what runs owe each
other is one product of matrices, and what a run works on stays in the processor's cache.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray
from torch import Tensor

from slimoe.converter.quant.block_grid import Grid, grid_of, with_codes
from slimoe.converter.quant.block_scales import fitted_scales
from slimoe.converter.quant.quantize import check_values, dequantize_rows
from slimoe.converter.quant.scale_refit import can_refit, refitted

_DAMP = 0.03
"""Of the Hessian's mean diagonal, added to its diagonal."""
_N_COLUMNS = 256
_RUN = 32
_FEWEST_ROWS = 64
"""With fewer for each, a thread spends its time on asking for its turn."""
_ROUNDS, _CODEBOOK_ROUNDS = 3, 2
"""Times that scales and codes are fitted to each other: the search in codebooks takes far longer."""
_MOST_ROWS = 2048
"""More at once do not fit into the processor's cache."""


@dataclass(frozen=True, slots=True)
class Curvature:
    """A damped Hessian, factorised: all that matrices need which read the same inputs.

    `factor` [n_in, n_in]: on its diagonal R's blocks of 256 columns, above each of them R's rows so far times the
    block's inverse: what the block's weights want to change by for each unit of error before. `mean` is what the
    Hessian was divided by.
    """

    factor: Tensor
    mean: float

    @classmethod
    def of(cls, hessian: NDArray[np.float32], device: str = "cpu") -> "Curvature":
        """Of the sum of x x^T [n_in, n_in]; holds three more matrices of that size while it works."""
        mean = float(hessian.diagonal().mean(dtype=np.float64))
        factor = upper_factor(damped(torch.from_numpy(hessian).to(device), _DAMP))
        for begin, end in _spans(len(factor)):
            own, above = factor[begin:end, begin:end], factor[:begin, begin:end]
            factor[:begin, begin:end] = torch.linalg.solve_triangular(own, above, upper=True, left=False)
        return cls(factor, mean if mean > 0 else 1.0)

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
        error, blocks = torch.zeros_like(w), []
        for begin, end in _spans(len(w)):
            target = torch.addmm(w[begin:end], factor[:begin, begin:end].T, error[:begin])
            found, left = _fit_block(target, factor[begin:end, begin:end], kind)
            torch.add(w[begin:end] - target, left, out=error[begin:end])
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
    grid, moved = _moved_to_grid(scales, kind, target)
    error = torch.zeros_like(target)
    dtype = torch.float32 if grid.width == 1 else torch.int32
    codes = torch.empty((len(target) // grid.width, target.shape[1]), dtype=dtype, device=target.device)
    feed_back(grid, moved, factor, codes, error)
    own = _group_blocks(metric, grid.width)
    factors, mixing = torch.linalg.cholesky(own.flip(1, 2)).flip(1, 2), _mixing(metric, own)
    for _ in range(_ROUNDS if grid.width == 1 else _CODEBOOK_ROUNDS):
        if can_refit(kind):
            scales, error = refitted(scales, kind, target, error, metric)
            grid, moved = _moved_to_grid(scales, kind, target)
        _code(grid, moved, mixing, factors, codes, error)
    return with_codes(scales, kind, grid.stored(codes)), error


def _moved_to_grid(scales: NDArray[np.uint8], kind: Type, target: Tensor) -> tuple[Grid, Tensor]:
    """The grid of these scales, and the target without the grid's shift."""
    grid = grid_of(scales, kind, str(target.device))
    return grid, (target.view(len(grid.shift), -1, target.shape[1]) - grid.shift[:, None]).view(target.shape)


def feed_back(grid: Grid, target: Tensor, factor: Tensor, codes: Tensor, error: Tensor) -> None:
    """Chooses codes [n_groups, n_rows] group after group; writes them and what they leave of the target.

    The errors, 0 before, are for about the least |error^T factor|^2.
    """
    own = _group_blocks(factor, grid.width)
    _code(grid, target, _mixing(factor, own), own, codes, error)


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


def _code(grid: Grid, target: Tensor, mixing: Tensor, factors: Tensor, codes: Tensor, error: Tensor) -> None:
    """Codes each group for what it wants given the errors of all others, which are 0 before they are coded."""
    width, all_codes = grid.width, codes.unbind()
    for begin in range(0, len(target), _RUN):
        end = begin + _RUN
        owed = mixing[begin:end]
        wanted = torch.addmm(target[begin:end], owed[:, :begin], error[:begin])
        wanted.addmm_(owed[:, end:], error[end:])
        errors, first = error[begin:end], begin // width
        groups = (one.split(width) for one in (owed[:, begin:end], target[begin:end], errors))
        parts = zip(wanted.split(width), *groups, strict=True)
        for group, (part, inner, goal, left) in enumerate(parts, first):
            part.addmm_(inner, errors)
            grid.code(group, part, goal, factors[group], all_codes[group], left)
