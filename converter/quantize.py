"""Turns stored weights into ggml blocks: bytes of a checkpoint in, bytes of a GGUF tensor out."""
# mypy: disable-error-code="empty-body"

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from offload.ggml import ggml_quantize_chunk
from offload.library import I64, Ptr, c_function, open_library

_CPU = open_library("ggml-cpu")
_F16_MAX = 65504.0


@c_function(_CPU)
def ggml_cpu_fp16_to_fp32(source: Ptr, target: Ptr, n: I64) -> None: ...  # noqa: D103


@c_function(_CPU)
def ggml_cpu_bf16_to_fp32(source: Ptr, target: Ptr, n: I64) -> None: ...  # noqa: D103


_TO_F32 = {"F16": ggml_cpu_fp16_to_fp32, "BF16": ggml_cpu_bf16_to_fp32}


class BadWeightsError(ValueError):
    """Some weights are not numbers, or too large for the target type; the message says which."""


def to_f32(raw: NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
    """Stored values of a safetensors dtype as float32; a view when they are that already."""
    if dtype == "F32":
        return raw.view(np.float32)
    n_values = raw.size // 2
    values = np.empty(n_values, np.float32)
    _TO_F32[dtype](raw.ctypes.data, values.ctypes.data, n_values)
    return values


def quantize_rows(values: NDArray[np.float32], kind: GGMLQuantizationType) -> NDArray[np.uint8]:
    """Blocks of `values` [n_rows, n_per_row], row by row.

    Raises BadWeightsError for NaN and infinity, on which ggml's quantisers give garbage or loop, and for weights
    that F16 cannot hold. Releases the GIL, so threads add up.
    """
    assert values.flags.c_contiguous
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise BadWeightsError("holds NaN or infinity; the checkpoint is damaged")
    if kind is GGMLQuantizationType.F16 and max(-low, high) > _F16_MAX:
        raise BadWeightsError("holds weights beyond 65504, which F16 cannot express; use BF16 or F32")
    n_rows, n_per_row = values.shape
    block, block_bytes = GGML_QUANT_SIZES[kind]
    target = np.empty(values.size // block * block_bytes, np.uint8)
    n_bytes = ggml_quantize_chunk(kind, values.ctypes.data, target.ctypes.data, 0, n_rows, n_per_row, None)
    assert n_bytes == target.size
    return target
