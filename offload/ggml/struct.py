"""ggml's structures in memory, and its types of weights: their names and sizes, and quantising to them.

Opening the library checks the types. Source: ggml.h of ggml 0.25.3.
"""

# mypy: disable-error-code="empty-body"

import ctypes
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from slimoe.offload.errors import LibraryError
from slimoe.offload.ggml.library import I32, I64, Ptr, Size, Str, c_function, chosen, open_library


class InitParams(ctypes.Structure):
    """`struct ggml_init_params`."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class Tensor(ctypes.Structure):
    """`struct ggml_tensor`, read only through `tensor_at`."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
        ("extra", ctypes.c_void_p),
        ("padding", ctypes.c_char * 8),
    )


def tensor_at(address: int) -> Tensor:
    """The tensor structure at `address`."""
    return Tensor.from_address(address)


def array_at(address: int, dtype: type[np.generic], *shape: int) -> NDArray[Any]:
    """The host memory at `address` as an array; whoever owns the memory must outlive it."""
    n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory: Any = (ctypes.c_uint8 * n_bytes).from_address(address)
    array: NDArray[Any] = np.frombuffer(memory, dtype).reshape(shape)
    return array


_BASE = open_library("ggml-base")

_NEVER_STORED = (GGMLQuantizationType.Q8_1, GGMLQuantizationType.Q8_K)  # only ever activations, never in a file


@c_function(_BASE)
def ggml_type_name(kind: I32) -> Str: ...  # noqa: D103 (ggml's, as all here)


@c_function(_BASE)
def ggml_blck_size(kind: I32) -> I64: ...  # noqa: D103


@c_function(_BASE)
def ggml_type_size(kind: I32) -> Size: ...  # noqa: D103


@c_function(_BASE)
def ggml_quantize_chunk(  # noqa: D103
    kind: I32, source: Ptr, target: Ptr, start: I64, n_rows: I64, n_per_row: I64, importance: Ptr
) -> Size: ...


def check_types() -> None:
    """Raises LibraryError for a type whose name or block is not the one that this program knows."""
    for kind in set(GGMLQuantizationType).difference(_NEVER_STORED):
        name = (ggml_type_name(kind) or b"").decode().upper()
        sizes = (ggml_blck_size(kind), ggml_type_size(kind))
        if name and (name != kind.name or sizes != tuple(GGML_QUANT_SIZES[kind])):
            n, n_bytes = GGML_QUANT_SIZES[kind]
            found = f"{name} of {sizes[0]} weights in {sizes[1]} bytes"
            raise LibraryError(f"{chosen()} has as type {kind.value} {found}, not {kind.name} of {n} in {n_bytes}")
