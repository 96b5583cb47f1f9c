"""Copies what a KV store holds of single tokens and sequences: rows of keys and values, and states."""

import itertools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from slimoe.offload.ggml import buffers as ggml_backend
from slimoe.offload.ggml import ops as ggml
from slimoe.offload.ggml.device_backend import waiting_for_tensor
from slimoe.offload.memory.cells import Indices
from slimoe.offload.memory.kv_store import KVStore

Bytes = NDArray[np.uint8]


def row_shape(tensor: int) -> tuple[int, int]:
    """How many heads a tensor of keys or values has, and the bytes of one token in one of them."""
    shape = ggml.tensor_at(tensor)
    return int(shape.ne[2]), int(shape.nb[1])


def read_rows(tensor: int, cells: Indices, heads: range) -> Bytes:
    """The keys or values of the tokens in these cells, U8 [heads, tokens, row_bytes]."""
    rows = np.empty((len(heads), len(cells), row_shape(tensor)[1]), np.uint8)
    with waiting_for_tensor(tensor):
        for sizes in _stretches(tensor, cells, heads, rows):
            ggml_backend.ggml_backend_tensor_get_2d(tensor, *sizes)
    return rows


def write_rows(tensor: int, cells: Indices, heads: range, rows: Bytes) -> None:
    """Gives the tokens in these cells their keys or values, U8 [heads, tokens, row_bytes]."""
    assert rows.shape == (len(heads), len(cells), row_shape(tensor)[1])
    assert rows[:1].flags.c_contiguous
    with waiting_for_tensor(tensor):
        for sizes in _stretches(tensor, cells, heads, rows):
            ggml_backend.ggml_backend_tensor_set_2d(tensor, *sizes)


def state_bytes_of(store: KVStore, tensor: int) -> int:
    """Bytes of one sequence's state in a tensor of a recurrent layer's states."""
    return int(ggml.ggml_nbytes(tensor)) // store.size.n_states


def read_state(store: KVStore, tensor: int, state: int) -> Bytes:
    """What a recurrent layer keeps in one state."""
    row = np.empty(state_bytes_of(store, tensor), np.uint8)
    with waiting_for_tensor(tensor):
        ggml_backend.ggml_backend_tensor_get(tensor, row.ctypes.data, state * row.nbytes, row.nbytes)
    return row


def write_state(store: KVStore, tensor: int, state: int, row: Bytes) -> None:
    """Gives a recurrent layer one state."""
    assert row.nbytes == state_bytes_of(store, tensor)
    assert row.flags.c_contiguous
    with waiting_for_tensor(tensor):
        ggml_backend.ggml_backend_tensor_set(tensor, row.ctypes.data, state * row.nbytes, row.nbytes)


def _stretches(tensor: int, cells: Indices, heads: range, rows: Bytes) -> Iterator[tuple[int, int, int, int, int, int]]:
    """What ggml copies at once, where cells go up one by one: the address in `rows`, and where that is in the tensor.

    That is an offset, bytes of a head, heads, and the strides of heads in the tensor and in `rows`.
    """
    if not len(cells):
        return
    row_bytes, head_bytes = rows.shape[2], int(ggml.tensor_at(tensor).nb[2])
    begins = [0, *(np.flatnonzero(np.diff(cells) != 1) + 1).tolist(), len(cells)]
    for begin, end in itertools.pairwise(begins):
        data, offset = rows.ctypes.data + begin * row_bytes, heads.start * head_bytes + int(cells[begin]) * row_bytes
        yield data, offset, (end - begin) * row_bytes, len(heads), head_bytes, rows.strides[0]
