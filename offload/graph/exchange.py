"""Tensors that outlive a graph: what the segments of a step, the experts between them and the host pass each other.

They lie in one buffer of the backend that runs the segments, at fixed addresses, big enough for the largest batch.
Where that memory is the host's own, reading one is looking at it. Elsewhere each read waits for an answer, which over
a network takes longer than computing a layer: so a device has all that the host reads of a single token in one piece.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from slimoe.offload.errors import DoesNotFitError
from slimoe.offload.ggml import buffers as ggml_backend
from slimoe.offload.ggml import ops as ggml
from slimoe.offload.ggml.cpu_backend import Backend, CpuBackend

_ALIGNMENT = 256
_DTYPES: dict[int, type[np.generic]] = {
    Type.F32: np.float32,
    Type.F16: np.float16,
    Type.I32: np.int32,
    Type.I64: np.int64,
}


@dataclass(frozen=True, slots=True)
class ExchangeShape:
    """The sizes of the largest step: `n_used` of `n_expert` experts selected, `prefetch_depth` routers asked early.

    The residual stream has `n_embd` values, what experts read and write `n_embd_expert`.
    """

    n_embd: int
    n_embd_expert: int
    n_tokens: int
    n_cells: int
    n_expert: int
    n_used: int
    prefetch_depth: int
    n_window_cells: int = 0
    """Cells of layers with a window, 0 where no layer has one."""
    n_aux: int = 0
    """Experts of a token that are selected only, for which vectors stand."""
    n_state_rows: int = 0
    """Rows of the states of recurrent layers that a step reads and writes."""


_OF_TOKEN = ("normed", "expert_weights", "ranked", "early_logits")
"""What the host reads of a single token."""


class Exchange:
    """The tensors, by purpose; all are one-dimensional, and used through views of the step's shape.

    tokens, positions I32, cells and window_cells I64 and temperatures F32 [n_tokens], mask F16 [n_cells * n_tokens]
    and window_mask [n_window_cells * n_tokens], of one element where no layer has a window: what a step reads.
    residual F32 [n_embd * n_tokens], normed F32 [n_embd_expert * n_tokens]: a block's state before its experts, and
    their input.
    expert_weights F32 [n_used * n_tokens], ranked I32 [n_expert * n_tokens]: the router's selection, best first, and
    aux_weights F32 [n_aux * n_tokens], the weights of those for which vectors stand.
    early_logits F32 [n_expert * prefetch_depth]: what later layers' routers say to this layer's input.
    outputs F32 [n_embd_expert * n_used * n_tokens]: each selected expert's weighted output, in the router's order.

    On a device normed, expert_weights, ranked and early_logits have second tensors for a step of one row, one behind
    the other. Views and arrays of one row are of these, and `fetch_token` reads them all.
    """

    def __init__(self, backend: Backend, shape: ExchangeShape) -> None:
        self._backend, self.shape, self.is_host = backend, shape, backend.is_host
        self.on_cpu = isinstance(backend, CpuBackend)
        n_tokens, n_embd, n_embd_expert = shape.n_tokens, shape.n_embd, shape.n_embd_expert
        wanted = {
            "tokens": (Type.I32, n_tokens),
            "positions": (Type.I32, n_tokens),
            "cells": (Type.I64, n_tokens),
            "window_cells": (Type.I64, n_tokens),
            "temperatures": (Type.F32, n_tokens),
            "mask": (Type.F16, shape.n_cells * n_tokens),
            "window_mask": (Type.F16, max(1, shape.n_window_cells * n_tokens)),
            "residual": (Type.F32, n_embd * n_tokens),
            "normed": (Type.F32, n_embd_expert * n_tokens),
            "expert_weights": (Type.F32, shape.n_used * n_tokens),
            "states_from": (Type.I32, max(1, shape.n_state_rows)),
            "states_to": (Type.I64, max(1, shape.n_state_rows)),
            "states_read": (Type.I32, max(1, shape.n_state_rows)),
            "aux_weights": (Type.F32, max(1, shape.n_aux * n_tokens)),
            "ranked": (Type.I32, shape.n_expert * n_tokens),
            "early_logits": (Type.F32, max(1, shape.n_expert * shape.prefetch_depth)),
            "outputs": (Type.F32, n_embd_expert * shape.n_used * n_tokens),
        }
        if not self.is_host:
            widths = n_embd_expert, shape.n_used, shape.n_expert, wanted["early_logits"][1]
            of_token = zip(_OF_TOKEN, widths, strict=True)
            wanted |= {_token_name(name): (wanted[name][0], width) for name, width in of_token}
        self._ctx = ggml.ggml_init(ggml.InitParams((1 + len(wanted)) * ggml.ggml_tensor_overhead() + 1024, None, True))
        self._tensors = {name: ggml.ggml_new_tensor_1d(self._ctx, *kind) for name, kind in wanted.items()}
        sizes = [-(-ggml.ggml_nbytes(tensor) // _ALIGNMENT) * _ALIGNMENT for tensor in self._tensors.values()]
        self.n_bytes = sum(sizes) + _ALIGNMENT
        try:
            self._buffer = backend.allocate(self.n_bytes)
        except DoesNotFitError:
            ggml.ggml_free(self._ctx)
            raise
        ggml_backend.ggml_backend_buffer_clear(self._buffer, 0)
        base = ggml_backend.ggml_backend_buffer_get_base(self._buffer)
        address = -(-base // _ALIGNMENT) * _ALIGNMENT
        for tensor, size in zip(self._tensors.values(), sizes, strict=True):
            ggml_backend.ggml_backend_tensor_alloc(self._buffer, tensor, address)
            address += size
        self._dtypes = {name: _DTYPES[kind[0]] for name, kind in wanted.items()}
        self._shaped: dict[tuple[str | int, ...], NDArray[Any]] = {}
        self._views: dict[str, NDArray[Any]] = {}
        if backend.is_host:
            data = {name: ggml.ggml_get_data(tensor) for name, tensor in self._tensors.items()}
            self._views = {name: ggml.array_at(data[name], self._dtypes[name], wanted[name][1]) for name in wanted}
        else:
            n_bytes = sum(sizes[-len(_OF_TOKEN) :])
            self._piece = int(ggml.ggml_new_tensor_1d(self._ctx, Type.I8, n_bytes))
            ggml_backend.ggml_backend_tensor_alloc(self._buffer, self._piece, address - n_bytes)
            self._fetched = np.zeros(n_bytes, np.uint8)
            ends = np.cumsum(sizes[-len(_OF_TOKEN) :])[:-1]
            parts = zip(_OF_TOKEN, np.split(self._fetched, ends), strict=True)
            self._of_token = {name: part.view(self._dtypes[name]) for name, part in parts}

    def tensor(self, name: str) -> int:
        """The whole tensor's address, for graphs to take views of."""
        tensor: int = self._tensors[name]
        return tensor

    def view(self, ctx: int, name: str, ne: Sequence[int], begin: int = 0) -> int:
        """A view [width, n_rows] of a tensor from element `begin` on, in a graph's context."""
        tensor, n_bytes = self._tensors[self._named(name, ne[1])], np.dtype(self._dtypes[name]).itemsize
        return int(ggml.ggml_view_2d(ctx, tensor, ne[0], ne[1], ne[0] * n_bytes, begin * n_bytes))

    def fetch_token(self) -> None:
        """Reads all that a device has of a step of one row, which `read` then gives without asking it."""
        if not self.is_host:
            self._backend.get(self._piece, self._fetched)

    def read(self, name: str, *shape: int) -> NDArray[Any]:
        """The beginning of a tensor as an array of a shape (slowest axis first); good until the next graph.

        What a device has in a tensor for one row is as `fetch_token` has found it.
        """
        if self._views:
            view = self._shaped.get((name, *shape))
            if view is None:
                view = self._shaped[name, *shape] = self._views[name][: math.prod(shape)].reshape(shape)
            return view
        if self._named(name, shape[0]) != name:
            return self._of_token[name][: math.prod(shape)].reshape(shape)
        values = np.empty(shape, self._dtypes[name])
        self._backend.get(self._tensors[name], values)
        return values

    def write(self, name: str, values: NDArray[Any], begin: int = 0) -> None:
        """Writes values, [n_rows, width] or flat, from element `begin` on."""
        flat = np.ascontiguousarray(values, self._dtypes[name]).reshape(-1)
        if self._views:
            self._views[name][begin : begin + flat.size] = flat
            return
        own = self._named(name, len(values) if values.ndim == 2 else 0)
        self._backend.set(self._tensors[own], flat, begin * flat.itemsize)
        if own != name:
            self._of_token[name][begin : begin + flat.size] = flat

    def write_rows(self, name: str, numbers: NDArray[np.int64], rows: NDArray[Any]) -> None:
        """Writes rows [n, width] over those of these `numbers`, neighbours together."""
        order = np.argsort(numbers)
        ordered = np.ascontiguousarray(rows[order], self._dtypes[name])
        begins = np.flatnonzero(np.diff(numbers[order], prepend=-2) != 1)
        for begin, part in zip(begins, np.split(ordered, begins[1:]), strict=True):
            self._backend.set_async(self._tensors[name], part, int(numbers[order[begin]]) * ordered.strides[0])
        self._backend.synchronize()

    def _named(self, name: str, n_rows: int) -> str:
        """The tensor that serves so many rows; what later routers say is of one row only."""
        own = _token_name(name)
        return own if own in self._tensors and (n_rows == 1 or name == "early_logits") else name

    def close(self) -> None:
        """Frees the memory."""
        if self._buffer:
            self._views.clear()
            self._shaped.clear()
            ggml_backend.ggml_backend_buffer_free(self._buffer)
            ggml.ggml_free(self._ctx)
            self._buffer = 0


def _token_name(name: str) -> str:
    return f"{name} of a token"
