"""Multiplies picks with experts that lie anywhere in host memory.

A *pair* is one token and one of the experts chosen for it. An expert's pairs are gathered, multiplied and written to
their columns of the outputs. Each expert is a stack of one for `mul_mat_id`, whose ids are then all 0: nothing
negative, stale or repeated can reach it, and its kernels, unlike those of `mul_mat`, are the ones the uncut graph
takes. The matrices' addresses are set before each run, so that a graph serves every expert of its types and shapes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from slimoe.offload.ggml import buffers as ggml_backend
from slimoe.offload.ggml import ops as ggml
from slimoe.offload.ggml.cpu_backend import CpuBackend
from slimoe.offload.graph.exchange import Exchange
from slimoe.offload.graph.expert_ffn import add_expert_ffn
from slimoe.offload.graph.graph_pool import BuiltGraph, GraphPool
from slimoe.offload.model.experts import SlotClass

_MAX_GRAPHS = 48
_NODES_PER_EXPERT = 16


@dataclass(frozen=True, slots=True, eq=False)
class ExpertWork:
    """One expert in host memory and its pairs: `addresses` of gate, up and down, `tokens` I32 and `columns` I64 [n].

    A column is the pair's place in the outputs: token * n_expert_used + rank.
    """

    slot_class: SlotClass
    addresses: tuple[int, int, int]
    tokens: NDArray[np.int32]
    columns: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Shape:
    slot_class: SlotClass
    n_pairs: tuple[int, ...]
    n_tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """One expert of a graph: the structures of its matrices' tensors, and the inputs to fill."""

    matrices: tuple[ggml.Tensor, ggml.Tensor, ggml.Tensor]
    tokens: NDArray[Any] | None
    columns: NDArray[Any]
    shares: NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class _Prepared:
    graph: int
    parts: tuple[_Part, ...]


class ExpertGraphs:
    """Graphs by shape, in one buffer that is sized for the largest batch at the start."""

    def __init__(
        self, backend: CpuBackend, exchange: Exchange, n_embd: int, n_used: int, n_batch: int, classes: set[SlotClass]
    ) -> None:
        self._backend, self._exchange = backend, exchange
        self._n_embd, self._n_used = n_embd, n_used
        self._graphs = GraphPool(backend.buft, self._build, _MAX_GRAPHS)
        # Where a matrix lies before its first run; never read, but the allocator must take it for allocated.
        self._nowhere = backend.allocate(256)
        for slot_class in classes:
            self._graphs.reserve(_Shape(slot_class, (n_batch,), n_batch))
            self._graphs.reserve(_Shape(slot_class, (1,) * n_used, 1))

    @property
    def compute_bytes(self) -> int:
        """Size of the buffer that the graphs share."""
        return self._graphs.n_bytes

    def run(self, works: Sequence[ExpertWork], n_tokens: int, is_cancelled: Callable[[], bool] | None = None) -> None:
        """Fills the columns of all pairs. Raises EngineAbortedError."""
        for shape, group in _grouped(works, n_tokens):
            prepared = self._graphs.get(shape)
            for part, work in zip(prepared.parts, group, strict=True):
                gate, up, down = part.matrices
                gate.data, up.data, down.data = work.addresses
                if part.tokens is not None:
                    part.tokens[:] = work.tokens
                part.columns[:] = work.columns
                part.shares[:] = work.columns
            if is_cancelled is None:
                self._backend.compute(prepared.graph)
            else:
                self._backend.compute_until(prepared.graph, is_cancelled)

    def _build(self, shape: _Shape) -> BuiltGraph[_Prepared]:
        builder = _Builder(shape, self._exchange, self._n_embd, self._n_used, self._nowhere)
        parts = builder.build()
        return BuiltGraph(builder.ctx, builder.graph, lambda: _Prepared(builder.graph, tuple(parts())))

    def close(self) -> None:
        """Frees graphs and buffer."""
        self._graphs.close()
        if self._nowhere:
            ggml_backend.ggml_backend_buffer_free(self._nowhere)
            self._nowhere = 0


def _grouped(works: Sequence[ExpertWork], n_tokens: int) -> Iterator[tuple[_Shape, list[ExpertWork]]]:
    """A single token's experts of one class go into one graph; a batch's one by one."""
    if n_tokens > 1:
        for work in works:
            yield _Shape(work.slot_class, (len(work.columns),), n_tokens), [work]
        return
    for slot_class, group in groupby(works, lambda work: work.slot_class):
        members = list(group)
        yield _Shape(slot_class, tuple(len(work.columns) for work in members), 1), members


class _Builder:
    """Builds the graph of one shape."""

    def __init__(self, shape: _Shape, exchange: Exchange, n_embd: int, n_used: int, nowhere: int) -> None:
        self._shape, self._exchange, self._n_embd, self._nowhere = shape, exchange, n_embd, nowhere
        n_nodes = 8 + 2 * _NODES_PER_EXPERT * len(shape.n_pairs)
        n_bytes = n_nodes * ggml.ggml_tensor_overhead() + ggml.ggml_graph_overhead_custom(n_nodes, False)
        self.ctx = ggml.ggml_init(ggml.InitParams(n_bytes, None, True))
        self.graph = ggml.ggml_new_graph_custom(self.ctx, n_nodes, False)
        self._normed = exchange.view(self.ctx, "normed", (n_embd, shape.n_tokens))
        self._shares = exchange.view(self.ctx, "shares", (1, n_used * shape.n_tokens))
        self._outputs = exchange.view(self.ctx, "outputs", (n_embd, n_used * shape.n_tokens))

    def build(self) -> Callable[[], Iterator[_Part]]:
        """Adds all operations; the parts can be had when the graph is allocated."""
        tensors = [self._expert(n_pairs) for n_pairs in self._shape.n_pairs]

        def parts() -> Iterator[_Part]:
            for matrices, tokens, columns, shares in tensors:
                n = int(ggml.tensor_at(columns).ne[0])
                gate, up, down = matrices
                yield _Part(
                    (ggml.tensor_at(gate), ggml.tensor_at(up), ggml.tensor_at(down)),
                    ggml.array_at(ggml.ggml_get_data(tokens), np.int32, n) if tokens else None,
                    ggml.array_at(ggml.ggml_get_data(columns), np.int64, n),
                    ggml.array_at(ggml.ggml_get_data(shares), np.int32, n),
                )

        return parts

    def _expert(self, n_pairs: int) -> tuple[tuple[int, int, int], int, int, int]:
        ctx = self.ctx
        gate, up, down = (self._matrix(*kind) for kind in self._shape.slot_class)
        columns, shares = self._input(Type.I64, n_pairs), self._input(Type.I32, n_pairs)
        ids = self._exchange.view(ctx, "zeros", (1, n_pairs))
        tokens = self._input(Type.I32, n_pairs) if self._shape.n_tokens > 1 or n_pairs > 1 else 0
        gathered = ggml.ggml_get_rows(ctx, self._normed, tokens) if tokens else self._normed
        rows = ggml.ggml_reshape_3d(ctx, gathered, self._n_embd, 1, n_pairs)
        result = add_expert_ffn(ctx, (gate, up), down, rows, ids)
        share = ggml.ggml_reshape_3d(ctx, ggml.ggml_get_rows(ctx, self._shares, shares), 1, 1, n_pairs)
        weighted = ggml.ggml_reshape_2d(ctx, ggml.ggml_mul(ctx, result, share), self._n_embd, n_pairs)
        ggml.ggml_build_forward_expand(self.graph, ggml.ggml_set_rows(ctx, self._outputs, weighted, columns))
        return (gate, up, down), tokens, columns, shares

    def _matrix(self, kind: Type, ne: tuple[int, ...]) -> int:
        tensor: int = ggml.ggml_new_tensor_3d(self.ctx, kind, ne[0], ne[1], 1)
        structure = ggml.tensor_at(tensor)
        structure.buffer = self._nowhere
        structure.data = ggml_backend.ggml_backend_buffer_get_base(self._nowhere)
        return tensor

    def _input(self, kind: Type, *ne: int) -> int:
        make = ggml.ggml_new_tensor_1d if len(ne) == 1 else ggml.ggml_new_tensor_2d
        tensor: int = make(self.ctx, kind, *ne)
        ggml.ggml_set_input(tensor)
        ggml.ggml_set_output(tensor)
        return tensor
