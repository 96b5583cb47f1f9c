"""Quantising with error feedback: what rounding spoils in a column is made up for in the columns after it.

The error that counts is tr(E H E^T) with E = W - W_q and H the sum of x x^T over inputs. With H = R R^T, R upper
triangular, it is |E R|^2, whose column j knows errors of columns up to j only: rounding left to right against what is
left over is GPTQ (arXiv 2210.17323), without inverses. ggml chooses the scales of each block of columns, from weights
that make up for the blocks before; then codes are chosen column by column, or codebook entry by entry, on the grid that
these scales span, and once more one at a time given all others (coordinate descent, arXiv 2309.01885).
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray
from torch import Tensor

from slimoe.converter.quant.block_grid import Grid, coded, grid_of
from slimoe.converter.quant.block_layout import SCALES
from slimoe.converter.quant.quantize import dequantize_rows, quantize_rows

_N_COLUMNS = 256
_FEWEST_ROWS = 64
"""With fewer for each, a thread spends its time on asking for its turn."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How hard to try. `damp`: added to the Hessian's diagonal, times its mean. `sweeps`: rounds of coordinate descent
    in each block of columns. `rescale`: rounds of fitting a block's scales to its codes. `starts`: scales to begin
    with, 1 or 2, of which each row keeps the better. `passes`: rounds over all blocks after the first, each as long as
    that.
    """

    damp: float = 0.01
    sweeps: int = 2
    rescale: int = 1
    starts: int = 2
    passes: int = 0


@dataclass(frozen=True, slots=True)
class Fit:
    """Rows of blocks [n_rows, n_bytes], and the values [n_rows, n_columns] that they have."""

    blocks: NDArray[np.uint8]
    values: Tensor


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
    weight: NDArray[np.float32],
    hessian: NDArray[np.float32],
    kind: Type,
    effort: Effort = Effort(),
    device: str = "cpu",
    n_threads: int = 1,
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Blocks of `weight` [n_out, n_in] and the values that they have; `hessian` [n_in, n_in] is the sum of x x^T.

    For types with a row in `block_layout.BITS`. Rows do not know of each other and are shared out between threads of
    the processor. Holds three more matrices of the Hessian's size and four of the weight's. Raises as `quantize_rows`
    does.
    """
    h = damped(torch.from_numpy(hessian).to(device), effort.damp)
    factor = upper_factor(h)
    n_parts = max(1, min(n_threads, len(weight) // _FEWEST_ROWS)) if device == "cpu" else 1
    parts = np.array_split(weight, n_parts)
    if n_parts == 1:
        found = [_fit_rows(weight, h, factor, kind, effort)]
    else:
        # torch's own threads would have a row's few thousand numbers to share, again and again.
        with ThreadPoolExecutor(n_parts, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            found = list(pool.map(lambda part: _fit_rows(part, h, factor, kind, effort), parts))
    blocks = np.concatenate([one.blocks for one in found])
    return blocks.reshape(-1), torch.cat([one.values for one in found]).cpu().numpy()


def _fit_rows(weight: NDArray[np.float32], h: Tensor, factor: Tensor, kind: Type, effort: Effort) -> Fit:
    w = torch.from_numpy(weight).to(h.device)
    error, parts = torch.zeros_like(w), []
    for begin, end in _spans(w.shape[1]):
        own = factor[begin:end, begin:end]
        carried = error[:, :begin] @ factor[:begin, begin:end]
        target = w[:, begin:end] + torch.linalg.solve_triangular(own, carried, upper=True, left=False)
        fit = fit_block(target, own @ own.T, kind, effort)
        error[:, begin:end] = w[:, begin:end] - fit.values
        parts.append(fit.blocks)
    for n, (begin, end) in list(enumerate(_spans(w.shape[1]))) * effort.passes:
        # Each block of columns again, given the errors of all others.
        own = h[begin:end, begin:end]
        old = Fit(parts[n], w[:, begin:end] - error[:, begin:end])
        target = old.values + torch.linalg.solve(own, error @ h[:, begin:end], left=False)
        fit = better(fit_block(target, own, kind, effort), old, target, own)
        error[:, begin:end] = w[:, begin:end] - fit.values
        parts[n] = fit.blocks
    return Fit(np.concatenate(parts, 1), w - error)


def _spans(n_columns: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, n_columns, _N_COLUMNS):
        yield begin, min(begin + _N_COLUMNS, n_columns)


def row_costs(error: Tensor, metric: Tensor) -> Tensor:
    """e M e^T of each row."""
    return ((error @ metric) * error).sum(1)


def better(one: Fit, other: Fit, target: Tensor, metric: Tensor) -> Fit:
    """Of each row the better one."""
    wins = row_costs(target - one.values, metric) < row_costs(target - other.values, metric)
    values = torch.where(wins[:, None], one.values, other.values)
    return Fit(np.where(wins.cpu().numpy()[:, None], one.blocks, other.blocks), values)


def fit_block(target: Tensor, metric: Tensor, kind: Type, effort: Effort) -> Fit:
    """About the least tr((T - Q) M (T - Q)^T) for columns that no others follow: `target` T [n_rows, n], `metric` M."""
    factor = upper_factor(metric)
    best = None
    for importance in (metric.diagonal(), factor.diagonal().square())[: effort.starts]:
        rows = target.contiguous().cpu().numpy()
        plain = _fit(quantize_rows(rows, kind, importance.cpu().numpy()), kind, target)
        fit = better(_recoded(plain, target, metric, factor, kind, effort), plain, target, metric)
        for _ in range(effort.rescale):
            scaled = _rescaled(fit, target, metric, kind)
            fit = better(_recoded(scaled, target, metric, factor, kind, effort), fit, target, metric)
        best = fit if best is None else better(fit, best, target, metric)
    assert best is not None
    return best


def _fit(blocks: NDArray[np.uint8], kind: Type, like: Tensor) -> Fit:
    values = dequantize_rows(np.ascontiguousarray(blocks).reshape(-1), kind, like.shape[1])
    return Fit(blocks.reshape(len(like), -1), torch.from_numpy(values).to(like.device))


def _recoded(start: Fit, target: Tensor, metric: Tensor, factor: Tensor, kind: Type, effort: Effort) -> Fit:
    """Other codes with the same scales: feedback, then coordinate descent."""
    grid = grid_of(start.blocks.reshape(-1), kind, len(target), str(target.device))
    codes, values = feed_back(grid, target, factor)
    if effort.sweeps:
        _descend(grid, target, metric, codes, values, effort.sweeps)
    return _fit(coded(start.blocks.reshape(-1), kind, codes.cpu().numpy()), kind, target)


def _group_blocks(matrix: Tensor, width: int) -> Tensor:
    """The blocks [n_groups, width, width] on the diagonal."""
    n = len(matrix) // width
    group = torch.arange(n, device=matrix.device)
    return matrix.view(n, width, n, width)[group, :, group]


def feed_back(grid: Grid, target: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [n_rows, n_groups] and values, group after group, for about the least |(target - values) factor|^2."""
    width = grid.width
    wanted = target.T.contiguous()
    own = _group_blocks(factor, width)
    spread = torch.linalg.solve_triangular(own, torch.eye(width, device=own.device).expand_as(own), upper=True)
    left, values, codes = torch.zeros_like(wanted), torch.empty_like(wanted), []
    for group in range(len(own)):
        part, rest = slice(group * width, (group + 1) * width), slice((group + 1) * width, None)
        code, value = grid.nearest(group, (wanted[part] + spread[group].T @ left[part]).T, own[group])
        codes.append(code)
        values[part] = value.T
        left[rest].addmm_(factor[part, rest].T, wanted[part] - values[part])
    return torch.stack(codes, 1), values.T


def _descend(grid: Grid, target: Tensor, metric: Tensor, codes: Tensor, values: Tensor, n_sweeps: int) -> None:
    """Chooses each group's code again, given all others; changes `codes` and `values`."""
    width, by_column = grid.width, values.T
    own = _group_blocks(metric, width)
    factors = torch.linalg.cholesky(own.flip(1, 2)).flip(1, 2)
    inverses = torch.linalg.inv(own)
    pull = metric @ (target - values).T
    for group in list(range(len(own))) * n_sweeps:
        part = slice(group * width, (group + 1) * width)
        wanted = by_column[part] + inverses[group] @ pull[part]
        code, value = grid.nearest(group, wanted.T, factors[group])
        old, new = (factors[group].T @ (one - wanted) for one in (by_column[part], value.T))
        wins = new.square().sum(0) < old.square().sum(0)
        change = torch.where(wins, value.T - by_column[part], 0)
        pull.addmm_(metric[:, part], change, alpha=-1)
        by_column[part] += change
        codes[:, group] = torch.where(wins, code, codes[:, group])


def _rescaled(fit: Fit, target: Tensor, metric: Tensor, kind: Type) -> Fit:
    """Other scales with the same codes: for each block of a row the F16 numbers that its scales are multiples of."""
    block, n_bytes = GGML_QUANT_SIZES[kind]
    places = SCALES[kind]
    blocks = fit.blocks.reshape(len(target), -1, n_bytes).copy()
    if not places:
        return fit
    values = fit.values.clone()
    for n in range(blocks.shape[1]):
        part = slice(n * block, (n + 1) * block)
        pieces = _pieces(blocks[:, n], kind, places, values.device)
        pull = (target - values) @ metric[:, part] + values[:, part] @ metric[part, part]
        right = torch.einsum("prc,rc->rp", pieces, pull)
        left = torch.einsum("prc,cd,qrd->rpq", pieces, metric[part, part], pieces)
        left += 1e-6 * torch.diag_embed(left.diagonal(dim1=1, dim2=2) + 1e-20)
        factor = torch.linalg.solve(left, right).nan_to_num(1.0).clamp(0.5, 2.0).cpu().numpy()
        for place, times in zip(places, factor.T, strict=True):
            old = blocks[:, n, place : place + 2].copy().view(np.float16)[:, 0]
            new = (old.astype(np.float32) * times).astype(np.float16)
            blocks[:, n, place : place + 2] = new[:, None].view(np.uint8)
        values[:, part] = _fit(blocks[:, n], kind, target[:, part]).values
    return Fit(blocks.reshape(len(target), -1), values)


def _pieces(blocks: NDArray[np.uint8], kind: Type, places: tuple[int, ...], device: torch.device) -> Tensor:
    """What each of the F16 numbers contributes to the values of one block a row: [n_places, n_rows, n_columns]."""
    found = []
    for place in places:
        alone = blocks.copy()
        for other in set(places) - {place}:
            alone[:, other : other + 2] = 0
        found.append(dequantize_rows(alone.reshape(-1), kind, int(GGML_QUANT_SIZES[kind][0])))
    return torch.from_numpy(np.stack(found)).to(device)
