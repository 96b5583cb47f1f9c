"""Writes integers into the bits of blocks that are theirs, and reads them, many blocks at once."""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from slimoe.converter.quant.block_layout import Bits


@dataclass(frozen=True, slots=True)
class _Piece:
    """Bits of numbers that lie next to each other in a byte: `n` of each of `numbers`, from bit `first` on."""

    bytes: Tensor
    numbers: Tensor
    first: Tensor
    mask: Tensor
    place: Tensor


def packed(places: Bits, numbers: Tensor, n_bytes: int) -> Tensor:
    """Bytes [n_bytes, n] of blocks that hold nothing but integers `numbers` [n_numbers, n] at `places`."""
    found = torch.zeros((n_bytes, numbers.shape[1]), dtype=torch.uint8, device=numbers.device)
    for piece in _pieces(places.tobytes(), places.shape, str(numbers.device)):
        bits = (numbers[piece.numbers] >> piece.first & piece.mask) << piece.place
        found[piece.bytes] |= bits.to(torch.uint8)
    return found


def unpacked(places: Bits, blocks: Tensor) -> Tensor:
    """The integers [n_numbers, n] that blocks [n_bytes, n] hold at `places`."""
    found = torch.zeros((len(places), blocks.shape[1]), dtype=torch.int32, device=blocks.device)
    for piece in _pieces(places.tobytes(), places.shape, str(blocks.device)):
        bits = (blocks[piece.bytes].to(torch.int32) >> piece.place & piece.mask) << piece.first
        found.index_add_(0, piece.numbers, bits)
    return found


@cache
def _pieces(places: bytes, shape: tuple[int, int], device: str) -> list[_Piece]:
    """The pieces of all bytes, each list of them with at most one in a byte."""
    by_byte: dict[int, list[list[int]]] = {}
    for number, row in enumerate(np.frombuffer(places, np.int64).reshape(shape).tolist()):
        for bit, place in enumerate(row):
            pieces = by_byte.setdefault(place // 8, [])
            if pieces and pieces[-1][0] == number and place % 8 == pieces[-1][2] + bit - pieces[-1][1]:
                pieces[-1][3] = pieces[-1][3] << 1 | 1
            else:
                pieces.append([number, bit, place % 8, 1])
    found = []
    for rank in range(max(map(len, by_byte.values()))):
        some = [(byte, *pieces[rank]) for byte, pieces in by_byte.items() if rank < len(pieces)]
        which, numbers, first, place, mask = torch.tensor(some, device=device).T
        found.append(_Piece(which, numbers, *(part.to(torch.int32)[:, None] for part in (first, mask, place))))
    return found
