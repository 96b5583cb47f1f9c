"""ggml's structures as they lie in memory, and the memory behind an address. Importing `ops` checks their layout."""

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray


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
