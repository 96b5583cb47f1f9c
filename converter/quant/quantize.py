"""Turns weights into ggml blocks and back: bytes of a checkpoint in, bytes of a GGUF tensor out.

*Importance* is what a column's squared error costs: the mean (or sum) of squares of what the column is multiplied with,
as in llama.cpp's imatrix. All functions release the GIL, so threads add up.
"""
# mypy: disable-error-code="empty-body"

import ctypes
from collections.abc import Callable
from functools import cache

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from slimoe.offload.errors import UsageError
from slimoe.offload.ggml.library import I32, I64, Bool, Ptr, Size, c_function, open_library
from slimoe.offload.ggml.struct import ggml_quantize_chunk, ggml_type_name

_BASE = open_library("ggml-base")
_CPU = open_library("ggml-cpu")
F16_MAX = 65504.0
"""The largest half, which all blocks have their scales in: beyond it some types overflow, some become zero without a
word, and some stop the process."""
_WIDE = (GGMLQuantizationType.F32, GGMLQuantizationType.BF16)
_SAFE_EXPONENT = 32
"""Importance beyond 2 to plus or minus this could leave float32's range in ggml's sums of products."""
_NEVER_WITHOUT_IMPORTANCE = tuple(
    GGMLQuantizationType[name] for name in ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS")
)


@c_function(_CPU)
def ggml_cpu_fp16_to_fp32(source: Ptr, target: Ptr, n: I64) -> None: ...  # noqa: D103 (ggml's)


@c_function(_CPU)
def ggml_cpu_bf16_to_fp32(source: Ptr, target: Ptr, n: I64) -> None: ...  # noqa: D103 (ggml's)


@c_function(_BASE)
def ggml_validate_row_data(kind: I32, data: Ptr, n_bytes: Size) -> Bool: ...  # noqa: D103 (ggml's)


@c_function(_BASE)
def ggml_get_type_traits(kind: I32) -> Ptr: ...  # noqa: D103 (ggml's)


class _TypeTraits(ctypes.Structure):
    """The first fields of `struct ggml_type_traits`."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


_TO_F32 = {"F16": ggml_cpu_fp16_to_fp32, "BF16": ggml_cpu_bf16_to_fp32}


class BadWeightsError(ValueError):
    """Some weights are not numbers, or too large for the target type; the message says which."""


def to_f32(raw: NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
    """Stored values of a safetensors dtype as float32; a view when they are that already."""
    if dtype == "F32":
        return raw.view(np.float32)
    if dtype == "F64":
        with np.errstate(over="ignore"):
            return raw.view(np.float64).astype(np.float32)
    n_values = raw.size // 2
    values = np.empty(n_values, np.float32)
    _TO_F32[dtype](raw.ctypes.data, values.ctypes.data, n_values)
    return values


def needs_importance(kind: GGMLQuantizationType) -> bool:
    """Whether the type is garbage without importance: the codebooks of 1 to 3 bits, as llama.cpp has it."""
    return kind in _NEVER_WITHOUT_IMPORTANCE


def quantize_rows(
    values: NDArray[np.float32], kind: GGMLQuantizationType, importance: NDArray[np.float32] | None = None
) -> NDArray[np.uint8]:
    """Blocks of `values` [n_rows, n_per_row], row by row; `importance` [n_per_row] of the columns, if known.

    With llama.cpp's imatrix as importance the bytes are those of its quantizer; columns never seen (zeros), which
    could mislead it, count like the mean column. Raises UsageError for a type that needs importance and has none, and
    BadWeightsError for rows that do not divide into blocks, for NaN and infinity, on which ggml's quantisers give
    garbage or loop, and for weights that the type cannot express.
    """
    assert values.flags.c_contiguous
    assert values.dtype == np.float32
    check_values(values, kind)
    n_rows, n_per_row = values.shape
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if importance is None and needs_importance(kind):
        raise UsageError(f"{kind.name} needs to know which weights matter. Give --imatrix, or use IQ3_S or larger.")
    weights = None if importance is None else usable_importance(importance)
    assert weights is None or weights.shape == (n_per_row,)
    target = np.empty(values.size // block * block_bytes, np.uint8)
    at = None if weights is None else weights.ctypes.data
    n_bytes = ggml_quantize_chunk(kind, values.ctypes.data, target.ctypes.data, 0, n_rows, n_per_row, at)
    assert n_bytes == target.size
    if not ggml_validate_row_data(kind, target.ctypes.data, target.size):
        raise BadWeightsError(f"holds weights beyond what {kind.name} can express; use BF16 or F32")
    return target


def check_values(values: NDArray[np.float32], kind: GGMLQuantizationType) -> None:
    """Raises BadWeightsError for `values` [n_rows, n_per_row] that no quantiser of the type takes."""
    n_per_row, block = values.shape[1], GGML_QUANT_SIZES[kind][0]
    if n_per_row % block:
        raise BadWeightsError(
            f"has rows of {n_per_row}, which do not divide into blocks of {block}, as {kind.name} has"
        )
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise BadWeightsError("holds NaN or infinity; the checkpoint is damaged")
    if kind not in _WIDE and max(-low, high) > F16_MAX:
        raise BadWeightsError(f"holds weights beyond 65504, which {kind.name} cannot express; use BF16 or F32")


def usable_importance(importance: NDArray[np.float32]) -> NDArray[np.float32]:
    """Importance that any quantiser takes: unseen columns have the mean of the seen ones, all-zero becomes uniform.

    Scaled by a power of two, which changes no result, where it is so large or small that products would overflow.
    """
    assert np.isfinite(importance).all()
    assert importance.min() >= 0
    weights = np.ascontiguousarray(importance, np.float32)
    seen = weights > 0
    if not seen.any():
        return np.ones_like(weights)
    mean = float(weights.mean(dtype=np.float64, where=seen))
    if not seen.all():
        weights = np.where(seen, weights, np.float32(mean))
    exponent = int(np.round(np.log2(mean)))
    return np.ldexp(weights, -exponent) if abs(exponent) > _SAFE_EXPONENT else weights


@cache
def _decoder(kind: GGMLQuantizationType) -> Callable[[int, int, int], None]:
    """ggml's own function for (blocks, values, number of values)."""
    address = ggml_get_type_traits(kind)
    traits = _TypeTraits.from_address(address)
    expected = (ggml_type_name(kind), *GGML_QUANT_SIZES[kind])
    assert (traits.type_name, traits.blck_size, traits.type_size) == expected
    decode: Callable[[int, int, int], None] = traits.to_float
    return decode


def dequantize_rows(blocks: NDArray[np.uint8], kind: GGMLQuantizationType, n_per_row: int) -> NDArray[np.float32]:
    """The values [n_rows, n_per_row] of whole rows of blocks, by ggml's own decoder."""
    assert blocks.flags.c_contiguous
    block, block_bytes = GGML_QUANT_SIZES[kind]
    n_values = blocks.size // block_bytes * block
    assert blocks.size % block_bytes == 0
    assert n_values % n_per_row == 0
    if kind is GGMLQuantizationType.F32:
        return blocks.reshape(-1).view(np.float32).reshape(-1, n_per_row)
    values = np.empty((n_values // n_per_row, n_per_row), np.float32)
    _decoder(kind)(blocks.ctypes.data, values.ctypes.data, n_values)
    return values
