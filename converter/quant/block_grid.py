"""What the weights of ggml blocks can be while the scales stay: a ladder of values, or entries of a codebook.

A *group* is the columns of one code: 1, or 8 in types of codebooks. Scales are learnt from ggml's own decoder, by
decoding blocks with known codes.
"""

from functools import cache
from typing import Protocol

import gguf.quants
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray
from torch import Tensor

from slimoe.converter.quant.block_layout import BITS, write_codes
from slimoe.converter.quant.quantize import dequantize_rows

_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_LADDERS: dict[Type, tuple[int, ...]] = {
    Type.Q8_0: tuple(range(-127, 128)),
    Type.IQ4_NL: _IQ4,
    Type.IQ4_XS: _IQ4,
} | {kind: tuple(range(1 << BITS[kind].shape[1])) for kind in BITS if kind.name[0] == "Q" and kind is not Type.Q8_0}
_SIGN_OF_8 = {Type.IQ2_XXS: 7, Type.IQ2_XS: 7, Type.IQ3_XXS: 7, Type.IQ2_S: 8, Type.IQ3_S: 8}
"""Bits of signs for 8 weights; with 7 the number of minuses is even."""
_N_NEAR = {1: 4, 2: 4}
"""So many entries are looked at closely, by the number of entries in a code."""
_FAR = 1e30


class Grid(Protocol):
    """The values that some rows of blocks can have, [n_rows, n_columns] in all."""

    width: int
    """Columns of a group."""

    def nearest(self, group: int, target: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        """Codes [n_rows] and values [n_rows, width] for about the least |(target - value) factor|^2, where `target` is
        [n_rows, width] and `factor` [width, width].
        """
        ...


def grid_of(blocks: NDArray[np.uint8], kind: Type, n_rows: int, device: str = "cpu") -> Grid:
    """The grid that the scales of rows of blocks allow; for types with a row in `BITS`."""
    return Ladder(blocks, kind, n_rows, device) if kind in _LADDERS else Codebook(blocks, kind, n_rows, device)


def coded(blocks: NDArray[np.uint8], kind: Type, codes: NDArray[np.int64]) -> NDArray[np.uint8]:
    """The same blocks with other codes [n_rows, n_groups]."""
    n_bytes = GGML_QUANT_SIZES[kind][1]
    return write_codes(blocks.reshape(-1, n_bytes), kind, codes.reshape(-1, len(BITS[kind]))).reshape(-1)


def _decoded(blocks: NDArray[np.uint8], kind: Type, n_rows: int, code: int, device: str) -> Tensor:
    """The values [n_rows, n_columns] if all codes were this one."""
    block, n_bytes = GGML_QUANT_SIZES[kind]
    n_columns = blocks.size // n_bytes * block // n_rows
    codes = np.full((n_rows, n_columns * len(BITS[kind]) // block), code, np.int64)
    return torch.from_numpy(dequantize_rows(coded(blocks, kind, codes), kind, n_columns)).to(device)


class Ladder(Grid):
    """One code a weight: its values are a table's, stretched and moved."""

    width = 1

    def __init__(self, blocks: NDArray[np.uint8], kind: Type, n_rows: int, device: str) -> None:
        ladder = _LADDERS[kind]
        self._table = torch.tensor(ladder, dtype=torch.float32, device=device)
        self._middles = (self._table[1:] + self._table[:-1]) / 2
        self._codes = torch.tensor([step & 255 for step in ladder] if kind is Type.Q8_0 else range(len(ladder)))
        self._codes = self._codes.to(device)
        self._even = float(ladder[1] - ladder[0]) if kind not in (Type.IQ4_NL, Type.IQ4_XS) else 0.0
        ends = [_decoded(blocks, kind, n_rows, int(self._codes[end]), device) for end in (0, -1)]
        self._step = ((ends[1] - ends[0]) / (ladder[-1] - ladder[0])).T.contiguous()
        self._zero = ends[0].T - ladder[0] * self._step
        self._inverse = torch.where(self._step == 0, 0, 1 / self._step)

    def nearest(self, group: int, target: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        """See `Grid`; exact."""
        step, zero = self._step[group], self._zero[group]
        wanted = (target[:, 0] - zero) * self._inverse[group]
        if self._even:
            rank = (wanted - self._table[0]).round().clamp(0, len(self._table) - 1).long()
        else:
            rank = torch.bucketize(wanted, self._middles)
        return self._codes[rank], (zero + step * self._table[rank])[:, None]


@cache
def _entries(kind: Type) -> NDArray[np.float32]:
    """The codebook [n_entries, 4 or 8] over the scale; in IQ1_M both sides of each entry."""
    public = {
        Type.IQ2_XXS: gguf.quants.IQ2_XXS,
        Type.IQ2_XS: gguf.quants.IQ2_XS,
        Type.IQ2_S: gguf.quants.IQ2_S,
        Type.IQ3_XXS: gguf.quants.IQ3_XXS,
        Type.IQ3_S: gguf.quants.IQ3_S,
        Type.IQ1_S: gguf.quants.IQ1_S,
        Type.IQ1_M: gguf.quants.IQ1_M,
    }[kind]
    public.init_grid()
    entries: NDArray[np.float32] = np.array(public.grid, np.float32).reshape(public.grid_shape)
    if kind is Type.IQ1_M:
        return np.concatenate((entries + public.delta, entries - public.delta))
    return entries


class Codebook(Grid):
    """One code for 8 weights: one entry or two, stretched, and signs or a shift."""

    width = 8

    def __init__(self, blocks: NDArray[np.uint8], kind: Type, n_rows: int, device: str) -> None:
        entries = _entries(kind)
        self._entries = torch.from_numpy(entries).to(device)
        self._index_bits = len(entries).bit_length() - 1
        self._halves = 8 // entries.shape[1]
        self._sign_bits = _SIGN_OF_8.get(kind, 0)
        first, last = 0, len(entries) - 1
        if self._sign_bits:
            scale = _decoded(blocks, kind, n_rows, 0, device)[:, ::8] / float(entries[0, 0])
            self._shift = torch.zeros_like(scale).T
        else:
            low, high = (_decoded(blocks, kind, n_rows, code, device)[:, ::8] for code in (first, last))
            scale = (high - low) / float(entries[last, 0] - entries[first, 0])
            self._shift = (low - scale * float(entries[first, 0])).T.contiguous()
        self._scale = scale.T.contiguous()
        self._places = torch.arange(8, device=device)

    def nearest(self, group: int, target: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        """See `Grid`; the best of the entries that are near if errors of columns were independent."""
        scale, shift = self._scale[group][:, None], self._shift[group][:, None]
        wanted = (target - shift) / torch.where(scale == 0, 1, scale)
        minus = wanted < 0 if self._sign_bits else torch.zeros_like(wanted, dtype=torch.bool)
        signs = torch.where(minus, -1.0, 1.0)
        index, values = self._near(wanted * signs, factor.square().sum(1))
        values = values * signs[:, None]
        left = (values - wanted[:, None]) @ factor
        costs = left.square().sum(-1)[..., None]
        if self._sign_bits:
            costs = self._with_flips(costs, values, left, factor, minus)
        best = costs.flatten(1).argmin(1)
        row, near, flip = torch.arange(len(best), device=best.device), best // costs.shape[2], best % costs.shape[2]
        code, value = index[row, near], values[row, near]
        if self._sign_bits:
            turned = self._places == flip[:, None] - 1
            value, minus = torch.where(turned, -value, value), minus ^ turned
            bits = (minus[:, : self._sign_bits].long() << self._places[: self._sign_bits]).sum(1)
            code = code | bits << self._index_bits * self._halves
        return code, value * scale + shift

    def _near(self, wanted: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers and values [n_rows, n_near, 8] for magnitudes: the nearest of each part of the entries."""
        n_near, size = _N_NEAR[self._halves], 8 // self._halves
        found = []
        for half in range(self._halves):
            part = slice(half * size, (half + 1) * size)
            costs = torch.addmm(
                self._entries.square() @ weight[part], wanted[:, part] * weight[part], self._entries.T, alpha=-2
            )
            spread = costs.view(len(costs), -1, n_near).argmin(1)
            found.append(spread * n_near + self._places[:n_near])
        if self._halves == 1:
            return found[0], self._entries[found[0]]
        left, right = found[0].repeat_interleave(n_near, 1), found[1].repeat(1, n_near)
        return left | right << self._index_bits, torch.cat((self._entries[left], self._entries[right]), -1)

    def _with_flips(self, costs: Tensor, values: Tensor, left: Tensor, factor: Tensor, minus: Tensor) -> Tensor:
        """Costs [n_rows, n_near, 9] of the candidates with the wanted signs, and with each one turned.

        Turning a sign moves the error along one row of `factor`, so that the cost follows without a new product.
        """
        turned = costs + 4 * values * (values * factor.square().sum(1) - left @ factor.T)
        costs = torch.cat((costs, turned), -1)
        if self._sign_bits == 7:
            odd = minus.sum(1) % 2 == 1
            costs[..., 0] += torch.where(odd, _FAR, 0.0)[:, None]
            costs[..., 1:] += torch.where(odd, 0.0, _FAR)[:, None, None]
        return costs
