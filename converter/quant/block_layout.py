"""Which bits of a ggml block are the weights' codes and which are scales, so that either can be written by itself.

Source: the structures of ggml-common.h and the decoders of ggml-quants.c (ggml 0.25.3). What scales mean is left to
ggml's decoder; see `block_grid`.
"""

import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

Bits = NDArray[np.int64]
"""[n_codes, n_bits]: where the bits of each code of a block are, from the lowest on, counted from the block's first
byte's lowest bit."""


def _run(first_bit: Bits, width: int) -> Bits:
    """Codes of `width` bits in a row."""
    return first_bit[:, None] + np.arange(width)


def _index(n: int = 256) -> Bits:
    return np.arange(n, dtype=np.int64)


def _bytes(first: int, n: int) -> Bits:
    return _run(8 * (first + _index(n)), 8)


def _nibbles(first: int, run: int, n: int = 256) -> Bits:
    """Runs of 2 * `run` codes in `run` bytes: first all low halves, then all high ones."""
    i = _index(n)
    return _run(8 * (first + i // (2 * run) * run + i % run) + i // run % 2 * 4, 4)


def _crumbs(first: int) -> Bits:
    """Runs of 128 codes in 32 bytes: first the lowest two bits of all, then the next."""
    i = _index()
    return _run(8 * (first + i // 128 * 32 + i % 32) + i // 32 % 4 * 2, 2)


def _planes(first: int) -> Bits:
    """A bit of each code in 32 bytes: first the lowest of all bytes, then the next."""
    i = _index()
    return _run(8 * (first + i % 32) + i // 32, 1)


def _single(first: int) -> Bits:
    return _run(8 * first + _index(32), 1)


def _joined(*parts: Bits) -> Bits:
    """Codes whose lower bits are in the first part, higher ones in the next."""
    return np.concatenate(parts, axis=1)


def _signs7(first: int) -> Bits:
    """Four times seven bits in every fourth to eighth byte after `first`; the caller says the stride."""
    i = _index(32)
    stride = 8 if first == 6 else 4
    return _run(8 * (first + i // 4 * stride) + i % 4 * 7, 7)


def _scales_and_minima(first: int) -> tuple[Bits, Bits]:
    """Eight scales and eight minima of 6 bits in 12 bytes: four and four, then of the others 4 bits, and on top 2."""
    i = _index(4)
    scales = _run(8 * (first + i), 6), _joined(_run(8 * (first + 8 + i), 4), _run(8 * (first + i) + 6, 2))
    minima = _run(8 * (first + 4 + i), 6), _joined(_run(8 * (first + 8 + i) + 4, 4), _run(8 * (first + 4 + i) + 6, 2))
    return np.concatenate(scales), np.concatenate(minima)


_I, _I32 = _index(), _index(32)
_FOURS, _FOURS_9 = _bytes(2, 64), _joined(_bytes(2, 64), _run(8 * 66 + _index(64), 1))
"""The numbers of entries of 4 weights, of 8 and of 9 bits."""
BITS: dict[Type, Bits] = {
    Type.Q4_0: _nibbles(2, 16, 32),
    Type.Q4_1: _nibbles(4, 16, 32),
    Type.Q5_0: _joined(_nibbles(6, 16, 32), _single(2)),
    Type.Q5_1: _joined(_nibbles(8, 16, 32), _single(4)),
    Type.Q8_0: _bytes(2, 32),
    Type.Q2_K: _crumbs(16),
    Type.Q3_K: _joined(_crumbs(32), _planes(0)),
    Type.Q4_K: _nibbles(16, 32),
    Type.Q5_K: _joined(_nibbles(48, 32), _planes(16)),
    Type.Q6_K: _joined(_run(8 * (_I // 128 * 64 + _I % 64) + _I // 64 % 2 * 4, 4), _crumbs(128)),
    Type.IQ4_NL: _nibbles(2, 16, 32),
    Type.IQ4_XS: _nibbles(8, 16),
    Type.IQ1_S: _joined(_bytes(2, 32), _run(8 * 34 + _I32 // 4 * 16 + _I32 % 4 * 3, 3)),
    Type.IQ1_M: _joined(_bytes(0, 32), _run(8 * 32 + 4 * _index(32), 4)),
    Type.IQ2_XXS: _joined(_run(8 * (2 + _I32 // 4 * 8 + _I32 % 4), 8), _signs7(6)),
    Type.IQ2_XS: _run(8 * 2 + 16 * _index(32), 16),
    Type.IQ2_S: _joined(_bytes(2, 32), _run(8 * 66 + 2 * _I32, 2), _bytes(34, 32)),
    Type.IQ3_XXS: _joined(_FOURS[0::2], _FOURS[1::2], _signs7(66)),
    Type.IQ3_S: _joined(_FOURS_9[0::2], _FOURS_9[1::2], _bytes(74, 32)),
}
"""A code is for one weight, or in the types of codebooks for 8: the entry's number, or those of two entries of 4
weights, then signs (or in IQ1_M the side to which the entry is moved)."""
SCALES: dict[Type, tuple[Bits, ...]] = {
    Type.Q2_K: (_run(8 * _index(16), 4), _run(8 * _index(16) + 4, 4)),
    Type.Q3_K: (
        _joined(
            _run(8 * (96 + _index(16) % 8) + _index(16) // 8 * 4, 4),
            _run(8 * (104 + _index(16) % 4) + _index(16) // 4 * 2, 2),
        ),
    ),
    Type.Q4_K: _scales_and_minima(4),
    Type.Q5_K: _scales_and_minima(4),
    Type.Q6_K: (_run(8 * (192 + _index(16)), 8),),
    Type.IQ4_XS: (_joined(_run(8 * 4 + 4 * _index(8), 4), _run(8 * 2 + 2 * _index(8), 2)),),
    Type.IQ1_S: (_run(8 * 34 + 16 * _index(8) + 12, 3),),
    Type.IQ2_XXS: (_run(8 * (6 + 8 * _index(8)) + 28, 4),),
    Type.IQ2_XS: (_run(8 * 66 + 4 * _index(16), 4),),
    Type.IQ2_S: (_run(8 * 74 + 4 * _index(16), 4),),
    Type.IQ3_XXS: (_run(8 * (66 + 4 * _index(8)) + 28, 4),),
    Type.IQ3_S: (_run(8 * 106 + 4 * _index(8), 4),),
}
"""The integer scales of the runs of 16 or 32 columns that a block has, and of their minima where the type has some."""
MULTIPLES: dict[Type, tuple[float, float]] = (
    dict.fromkeys((Type.Q2_K, Type.Q4_K, Type.Q5_K, Type.Q6_K), (0.0, 1.0))
    | dict.fromkeys((Type.Q3_K, Type.IQ4_XS), (-32.0, 1.0))
    | dict.fromkeys((Type.IQ2_XXS, Type.IQ2_XS, Type.IQ2_S), (0.125, 0.25))
    | dict.fromkeys((Type.IQ1_S, Type.IQ3_S), (1.0, 2.0))
    | {Type.IQ3_XXS: (0.25, 0.5)}
)
"""What a run's scale is over the block's F16 number for an integer of 0, and what each more adds. Integers of 8 bits
are signed."""
HALVES: dict[Type, tuple[int, ...]] = {
    Type.Q2_K: (80, 82),
    Type.Q3_K: (108,),
    Type.Q4_K: (0, 2),
    Type.Q5_K: (0, 2),
    Type.Q6_K: (208,),
} | dict.fromkeys((Type.IQ4_XS, Type.IQ1_S, Type.IQ2_XXS, Type.IQ2_XS, Type.IQ2_S, Type.IQ3_XXS, Type.IQ3_S), (0,))
"""The byte of the F16 number that the scales are multiples of, and of that of the minima."""
