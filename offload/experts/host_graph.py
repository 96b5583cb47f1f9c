"""Computes selected experts that lie anywhere in host memory.

An expert's pairs are gathered, multiplied and written to their columns of the outputs. Each expert is a stack of one
for `mul_mat_id`, whose ids are then all 0: nothing negative, stale or repeated can reach it, and its kernels, unlike
those of `mul_mat`, are the ones the uncut graph takes. The matrices' addresses are set before each run, so that a graph
serves every expert of its types and shapes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slimoe.offload.experts.pair_graph import PairBuilder, PairInputs
from slimoe.offload.ggml import buffers as ggml_backend
from slimoe.offload.ggml import ops as ggml
from slimoe.offload.ggml.cpu_backend import CpuBackend
from slimoe.offload.graph.exchange import Exchange
from slimoe.offload.graph.graph_pool import BuiltGraph, GraphPool
from slimoe.offload.model.experts import SlotClass

_MAX_GRAPHS = 48
_NODES_PER_EXPERT = 16


@dataclass(frozen=True, slots=True, eq=False)
class ExpertWork:
    """One expert in host memory and its pairs: `addresses` of gate, up and down, `tokens` I32 and `columns` I64 [n]."""

    slot_class: SlotClass
    addresses: tuple[int, int, int]
    tokens: NDArray[np.int32]
    columns: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Shape:
    slot_class: SlotClass
    n_pairs: tuple[int, ...]
    n_tokens: int


class _Expert:
    """One expert of an allocated graph: the structures of its matrices' tensors, and the inputs to fill."""

    __slots__ = ("columns", "matrices", "tokens", "weight_rows")

    def __init__(self, matrices: Sequence[int], pairs: PairInputs, n_pairs: int) -> None:
        self.matrices = [ggml.tensor_at(matrix) for matrix in matrices]
        self.tokens: NDArray[Any] | None = None
        if pairs.tokens:
            self.tokens = ggml.array_at(ggml.ggml_get_data(pairs.tokens), np.int32, n_pairs)
        self.columns = ggml.array_at(ggml.ggml_get_data(pairs.columns), np.int64, n_pairs)
        self.weight_rows = ggml.array_at(ggml.ggml_get_data(pairs.weight_rows), np.int32, n_pairs)


@dataclass(frozen=True, slots=True, eq=False)
class _Prepared:
    graph: int
    experts: list[_Expert]


class ExpertGraphs:
    """Graphs by shape, in one buffer that is sized for the largest batch at the start."""

    def __init__(self, backend: CpuBackend, exchange: Exchange, classes: set[SlotClass]) -> None:
        self._backend, self._exchange = backend, exchange
        self._graphs = GraphPool(backend.buft, self._build, _MAX_GRAPHS)
        # Where a matrix lies before its first run; never read, but the allocator must take it for allocated.
        self._nowhere = backend.allocate(256)
        n_tokens = exchange.shape.n_tokens
        for slot_class in classes:
            self._graphs.reserve(_Shape(slot_class, (n_tokens,), n_tokens))
            self._graphs.reserve(_Shape(slot_class, (1,) * exchange.shape.n_used, 1))

    @property
    def compute_bytes(self) -> int:
        """Size of the buffer that the graphs share."""
        return self._graphs.n_bytes

    def run(self, works: Sequence[ExpertWork], n_tokens: int, is_cancelled: Callable[[], bool] | None = None) -> None:
        """Fills the columns of all pairs. Raises EngineAbortedError."""
        if n_tokens == 1:  # a single token's experts of one class go into one graph, a batch's one by one
            groups = [list(group) for _, group in groupby(works, lambda work: work.slot_class)]
        else:
            groups = [[work] for work in works]
        for group in groups:
            shape = _Shape(group[0].slot_class, tuple([len(work.columns) for work in group]), n_tokens)
            prepared = self._graphs.get(shape)
            for expert, work in zip(prepared.experts, group, strict=True):
                gate, up, down = expert.matrices
                gate.data, up.data, down.data = work.addresses
                if expert.tokens is not None:
                    expert.tokens[:] = work.tokens
                expert.columns[:] = work.columns
                expert.weight_rows[:] = work.columns
            if is_cancelled is None:
                self._backend.compute(prepared.graph)
            else:
                self._backend.compute_until(prepared.graph, is_cancelled)

    def _build(self, shape: _Shape) -> BuiltGraph[_Prepared]:
        n_nodes = 8 + 2 * _NODES_PER_EXPERT * len(shape.n_pairs)
        n_bytes = n_nodes * ggml.ggml_tensor_overhead() + ggml.ggml_graph_overhead_custom(n_nodes, False)
        ctx = ggml.ggml_init(ggml.InitParams(n_bytes, None, True))
        graph = ggml.ggml_new_graph_custom(ctx, n_nodes, False)
        builder = PairBuilder(ctx, graph, self._exchange, shape.n_tokens)
        experts = []
        for n_pairs in shape.n_pairs:
            matrices = [int(ggml.ggml_new_tensor_3d(ctx, kind, ne[0], ne[1], 1)) for kind, ne in shape.slot_class]
            for matrix in matrices:
                structure = ggml.tensor_at(matrix)
                structure.buffer = self._nowhere
                structure.data = ggml_backend.ggml_backend_buffer_get_base(self._nowhere)
            ids = self._exchange.view(ctx, "zeros", (1, n_pairs))
            pairs = builder.add(matrices, ids, n_pairs, gathers=shape.n_tokens > 1 or n_pairs > 1)
            experts.append((matrices, pairs, n_pairs))
        return BuiltGraph(ctx, graph, lambda: _Prepared(graph, [_Expert(*expert) for expert in experts]))

    def close(self) -> None:
        """Frees graphs and buffer."""
        self._graphs.close()
        if self._nowhere:
            ggml_backend.ggml_backend_buffer_free(self._nowhere)
            self._nowhere = 0
