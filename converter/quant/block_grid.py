"""What the weights of ggml blocks can be while the scales stay: a ladder of values, or entries of a codebook.

A *group* is the columns of one code: 1, or 8 in types of codebooks. Scales are learnt from ggml's own decoder, by
decoding blocks with known codes. Values lie in [n_columns, n_rows], so that a column's are next to each other.
"""

from functools import cache
from typing import Protocol

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray
from torch import Tensor

from slimoe.converter.quant.block_layout import BITS
from slimoe.converter.quant.codebooks import N_NEAR, SIGN_BITS, entries_of, least_of, near_entries
from slimoe.converter.quant.packing import packed
from slimoe.converter.quant.quantize import dequantize_rows

_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_UNEVEN = {Type.IQ4_NL: _IQ4, Type.IQ4_XS: _IQ4}
_RUN = 16
"""Columns that have one scale in every ladder; in some types 32 have."""
_COSTS_AT_ONCE = 1 << 18
"""Distances to entries that are compared together, as many as the processor's cache holds."""
_FAR = 1e30


class Grid(Protocol):
    """The values that some rows of blocks can have, [n_columns, n_rows] in all."""

    width: int
    """Columns of a group."""
    run: int
    """Columns of a run."""
    shift: Tensor
    """What the values of runs of columns are moved by, [n_runs, n_rows]; `code` knows nothing of it."""

    def code(self, group: int, wanted: Tensor, target: Tensor, factor: Tensor, codes: Tensor, error: Tensor) -> None:
        """Codes a group for about the least |factor^T (wanted - value)|^2.

        Writes `codes` [n_rows] and `error` [width, n_rows], which is target - value. `wanted` is [width, n_rows],
        `factor` [width, width] and upper triangular.
        """
        ...

    def rescale(self, columns: slice, factor: Tensor, offset: Tensor) -> None:
        """Multiplies the values of all codes in whole runs by a factor [n_rows] and adds an offset [n_rows]."""
        ...

    def stored(self, codes: Tensor) -> Tensor:
        """Codes [n_groups, n_rows] as blocks hold them, of those that `code` wrote."""
        ...


def unshifted(grid: Grid, columns: slice, target: Tensor) -> Tensor:
    """The target [n, n_rows] of some of the grid's columns, whole runs, without its shift."""
    shift = grid.shift[columns.start // grid.run : columns.stop // grid.run]
    return (target.view(len(shift), grid.run, -1) - shift[:, None]).view(target.shape)


def grid_of(blocks: NDArray[np.uint8], kind: Type, device: str = "cpu") -> Grid:
    """The grid that the scales of rows of blocks [n_rows, n_bytes] allow; for types with a row in `BITS`."""
    return Codebook(blocks, kind, device) if kind.name in SIGN_BITS else Ladder(blocks, kind, device)


def without_codes(blocks: NDArray[np.uint8], kind: Type) -> NDArray[np.uint8]:
    """Rows of blocks [n_rows, n_bytes] with all bits of codes at 0."""
    return blocks & ~_pattern(kind, -1, blocks.shape[1])


def with_codes(scales: NDArray[np.uint8], kind: Type, codes: Tensor) -> NDArray[np.uint8]:
    """Rows of blocks with codes [n_groups, n_rows], of such that have none."""
    n_bytes, n_codes = GGML_QUANT_SIZES[kind][1], len(BITS[kind])
    by_block = codes.view(-1, n_codes, len(scales)).transpose(0, 1).reshape(n_codes, -1)
    by_row = packed(BITS[kind], by_block, n_bytes).view(n_bytes, -1, len(scales)).permute(2, 1, 0)
    blocks: NDArray[np.uint8] = scales | by_row.reshape(scales.shape).cpu().numpy()
    return blocks


@cache
def _pattern(kind: Type, code: int, n_bytes: int) -> NDArray[np.uint8]:
    """A row of blocks that hold nothing but this code everywhere."""
    codes = torch.full((len(BITS[kind]), 1), code, dtype=torch.int32)
    block = packed(BITS[kind], codes, GGML_QUANT_SIZES[kind][1])[:, 0].numpy()
    return np.tile(block, n_bytes // len(block))


def _decoded(scales: NDArray[np.uint8], kind: Type, code: int, step: int, device: str) -> Tensor:
    """The values [n_columns / step, n_rows] of every `step`th column if all codes were this one."""
    block, n_bytes = GGML_QUANT_SIZES[kind]
    rows = scales | _pattern(kind, code, scales.shape[1])
    values = dequantize_rows(rows.reshape(-1), kind, scales.shape[1] // n_bytes * int(block))
    return torch.from_numpy(np.ascontiguousarray(values[:, ::step].T)).to(device)


class Ladder(Grid):
    """One code a weight, which is a rank: of evenly spaced values, or of a table's, stretched and moved."""

    width, run = 1, _RUN

    def __init__(self, blocks: NDArray[np.uint8], kind: Type, device: str) -> None:
        scales = without_codes(blocks, kind)
        self._least = -127 if kind is Type.Q8_0 else 0
        self._top = 254 if kind is Type.Q8_0 else (1 << BITS[kind].shape[1]) - 1
        low, high = (_decoded(scales, kind, self._least + rank, _RUN, device) for rank in (0, self._top))
        table = torch.tensor(_UNEVEN.get(kind, ()), dtype=torch.float32, device=device)
        self._table, self._middles = table, (table[1:] + table[:-1]) / 2
        first, last = (float(table[0]), float(table[-1])) if len(table) else (0.0, float(self._top))
        step = (high - low) / (last - first)
        self.shift = low - first * step
        self._steps, self._inverses = step, torch.where(step == 0, 0, 1 / step)
        self._step, self._inverse = self._steps.unbind(), self._inverses.unbind()

    def code(self, group: int, wanted: Tensor, target: Tensor, _factor: Tensor, codes: Tensor, error: Tensor) -> None:
        """See `Grid`; exact. Codes are ranks in float32."""
        run = group // _RUN
        torch.mul(wanted[0], self._inverse[run], out=codes)
        if len(self._table):
            rank = torch.bucketize(codes, self._middles)
            torch.addcmul(target[0], self._table[rank], self._step[run], value=-1, out=error[0])
            codes.copy_(rank)
        else:
            codes.round_().clamp_(0, self._top)
            torch.addcmul(target[0], codes, self._step[run], value=-1, out=error[0])

    def rescale(self, columns: slice, factor: Tensor, offset: Tensor) -> None:
        """See `Grid`."""
        runs = slice(columns.start // _RUN, columns.stop // _RUN)
        self.shift[runs] = self.shift[runs] * factor + offset
        step = self._steps[runs].mul_(factor)
        self._inverses[runs] = torch.where(step == 0, 0, 1 / step)

    def stored(self, codes: Tensor) -> Tensor:
        """See `Grid`."""
        ranks = codes.to(torch.int16)
        return (ranks + self._least & 255).to(torch.uint8)


class Codebook(Grid):
    """One code for 8 weights: one entry or two, stretched, and signs or a shift."""

    width = run = 8

    def __init__(self, blocks: NDArray[np.uint8], kind: Type, device: str) -> None:
        scales = without_codes(blocks, kind)
        entries = entries_of(kind)
        self._entries = torch.from_numpy(entries).to(device)
        self._index_bits = len(entries).bit_length() - 1
        self._halves = 8 // entries.shape[1]
        self._sign_bits = SIGN_BITS[kind.name]
        low, high = (_decoded(scales, kind, code, 8, device) for code in (0, len(entries) - 1))
        first, last = float(entries[0, 0]), float(entries[-1, 0])
        self._scale = low / first if self._sign_bits else (high - low) / (last - first)
        self.shift = torch.zeros_like(low) if self._sign_bits else low - self._scale * first
        self._places = torch.arange(8, device=device)[:, None]

    def code(self, group: int, wanted: Tensor, target: Tensor, factor: Tensor, codes: Tensor, error: Tensor) -> None:
        """See `Grid`; the best of the entries that are near if errors of columns were independent."""
        step = max(1, _COSTS_AT_ONCE // len(self._entries))
        for begin in range(0, wanted.shape[1], step):
            rows = slice(begin, begin + step)
            scale = self._scale[group, rows]
            codes[rows], found = self._best(wanted[:, rows] / torch.where(scale == 0, 1, scale), factor)
            torch.addcmul(target[:, rows], found, scale, value=-1, out=error[:, rows])

    def rescale(self, columns: slice, factor: Tensor, offset: Tensor) -> None:
        """See `Grid`."""
        groups = slice(columns.start // self.width, columns.stop // self.width)
        self.shift[groups] = self.shift[groups] * factor + offset
        self._scale[groups] *= factor

    def stored(self, codes: Tensor) -> Tensor:
        """See `Grid`."""
        return codes

    def _best(self, wanted: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        """Codes [n_rows] and values [8, n_rows] over the scales."""
        minus = wanted < 0 if self._sign_bits else torch.zeros_like(wanted, dtype=torch.bool)
        signs = torch.where(minus, -1.0, 1.0)
        own = factor.square().sum(1)
        index, values = self._near(wanted * signs, own)
        values *= signs[:, None]
        left = factor.T @ (values - wanted[:, None]).flatten(1)
        costs = left.square().sum(0).view(1, *index.shape)
        if self._sign_bits:
            # Turning a sign moves the error along one row of the factor: the cost follows without a new product.
            products = (factor @ left).view(values.shape)
            turned = torch.addcmul(-products, values, own[:, None, None]).mul_(values).mul_(4).add_(costs)
            costs = torch.cat((costs, turned))
            if self._sign_bits == 7:
                odd = minus.sum(0) % 2 == 1
                costs[0] += torch.where(odd, _FAR, 0.0)
                costs[1:] += torch.where(odd, 0.0, _FAR)
        best = least_of(costs.flatten(0, 1))[0]
        flip, near, row = best // len(index), best % len(index), torch.arange(len(best), device=best.device)
        code, value = index[near, row], values[:, near, row]
        if self._sign_bits:
            turned_one = self._places == flip - 1
            value, minus = torch.where(turned_one, -value, value), minus ^ turned_one
            bits = (minus[: self._sign_bits].int() << self._places[: self._sign_bits]).sum(0, dtype=torch.int32)
            code = code | bits << self._index_bits * self._halves
        return code, value

    def _near(self, magnitudes: Tensor, cost: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers [n_near, n_rows] and values [8, n_near, n_rows] of entries near to magnitudes [8, n_rows]."""
        parts = zip(magnitudes.chunk(self._halves), cost.chunk(self._halves), strict=True)
        found = [near_entries(self._entries, part, own) for part, own in parts]
        values = [self._entries[one.flatten()].T.reshape(-1, *one.shape) for one in found]
        if self._halves == 1:
            return found[0], values[0]
        left, right = found[0].repeat_interleave(N_NEAR, 0), found[1].repeat(N_NEAR, 1)
        both = torch.cat((values[0].repeat_interleave(N_NEAR, 1), values[1].repeat(1, N_NEAR, 1)))
        return left | right << self._index_bits, both
