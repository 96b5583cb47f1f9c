"""Matrices in compressed-tensors' pack-quantized form: signed integers of 4 or 8 bits, a scale for 128 in a row.

Source: compressed_tensors (vLLM project), compressors/pack_quantized: an integer plus 2^(bits - 1) lies in so many bits
of an int32, the first in the lowest, and a weight is the integer times its group's scale.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from slimoe.converter.quant.quantize import quantize_rows, to_f32

GROUP = 128
"""Weights of a row that share a scale."""
_DIVISORS = {4: (7.0, 7.5, 8.0, 8.6, 9.4, 10.4), 8: (127.0,)}
"""What a group's largest weight is divided by to get a scale, of which the one with the least error counts: with 4 bits
it pays to clip the largest."""
_WORD_BITS = 32
_ROWS_AT_ONCE = 256


def pack(
    weights: NDArray[np.float32], n_bits: int, kind: Type, importance: NDArray[np.float32] | None = None
) -> NDArray[np.uint8]:
    """The bytes of a matrix's packed integers [n_rows, n_per_row * n_bits / 32], and behind them those of its scales
    [n_rows, n_per_row / GROUP], which are of the type `kind`, 16 bits wide.

    `importance` [n_per_row] is what the square of an error of a column costs, if known. Raises BadWeightsError for NaN
    and infinity.
    """
    assert weights.shape[1] % GROUP == 0
    cost = np.ones((1, GROUP), np.float32)
    if importance is not None and importance.any():
        cost = (importance / importance.max()).reshape(-1, GROUP)
    parts = [
        _pack_rows(np.ascontiguousarray(weights[begin : begin + _ROWS_AT_ONCE]), n_bits, kind, cost)
        for begin in range(0, len(weights), _ROWS_AT_ONCE)
    ]
    return np.concatenate([part for parts_of_a_kind in zip(*parts, strict=True) for part in parts_of_a_kind])


def packed_shape(shape: tuple[int, int], n_bits: int) -> tuple[int, int]:
    """The shape of the int32 tensor that holds a matrix [n_rows, n_per_row]."""
    return shape[0], shape[1] * n_bits // _WORD_BITS


def quantization_config(n_bits: int, ignored: Sequence[str]) -> dict[str, Any]:
    """What config.json says of such matrices; modules that match one of `ignored` are not quantised."""
    weights = {
        "num_bits": n_bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": GROUP,
        "dynamic": False,
        "observer": "minmax",
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(ignored),
        "kv_cache_scheme": None,
    }


def _pack_rows(
    weights: NDArray[np.float32], n_bits: int, kind: Type, cost: NDArray[np.float32]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The bytes of some rows' integers, and of their scales."""
    groups, most = weights.reshape(len(weights), -1, GROUP), 1 << (n_bits - 1)
    largest = np.abs(groups).max(-1)
    least = np.full(largest.shape, np.inf, np.float32)
    scales, values = np.zeros_like(largest), np.zeros(groups.shape, np.int8)
    for divisor in _DIVISORS[n_bits]:
        # As it will be stored, so that integers fit the scale that is read.
        tried = to_f32(quantize_rows(largest / np.float32(divisor), kind).reshape(-1), kind.name).reshape(scales.shape)
        factors = np.divide(1.0, tried, out=np.zeros_like(tried), where=tried != 0)
        rounded = np.clip(np.rint(groups * factors[..., None]), -most, most - 1)
        error = (np.square(groups - rounded * tried[..., None]) * cost).sum(-1)
        is_better = error < least
        least[is_better], scales[is_better] = error[is_better], tried[is_better]
        values[is_better] = rounded[is_better]
    n_each = _WORD_BITS // n_bits
    unsigned = (values.astype(np.int16) + most).astype(np.uint32).reshape(len(weights), -1, n_each)
    words = np.bitwise_or.reduce(unsigned << np.arange(0, _WORD_BITS, n_bits, dtype=np.uint32), axis=-1)
    return np.ascontiguousarray(words, "<u4").view(np.uint8).reshape(-1), quantize_rows(scales, kind).reshape(-1)
