"""Computes selected experts that lie in slots of host memory, all those of one class in one graph.

A bank of slots is a stack of matrices for `mul_mat_id`, whose ids are numbers of slots that are filled: nothing
negative or stale can reach it, and no token has an id twice. Its kernels, unlike those of `mul_mat`, are the ones the
uncut graph takes. Where a bank begins is set before each run, so that a graph serves the experts of every layer. An
expert that is not at hand yet, or whose matrices do not lie as the others' do, is a bank of its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from slimoe.offload.cache.host_slots import Bank
from slimoe.offload.experts.pair_graph import PairBuilder, PairInputs, add_input
from slimoe.offload.ggml import buffers as ggml_backend
from slimoe.offload.ggml import ops as ggml
from slimoe.offload.ggml.cpu_backend import CpuBackend
from slimoe.offload.graph.exchange import Exchange
from slimoe.offload.graph.graph_pool import BuiltGraph, GraphPool
from slimoe.offload.model.experts import SlotClass

_MAX_GRAPHS = 48
_N_NODES = 48
_MAPPING_BYTES = 8
"""What `mul_mat_id` sets aside for each slot and pair."""
_MOST_MAPPING = 8 << 20


@dataclass(frozen=True, slots=True, eq=False)
class BankWork:
    """Pairs of one class: `slots` in a bank, and `columns` (token * n_expert_used + rank), both I64 [n].

    `is_one_row` says that all are pairs of one token, each with an expert of its own.
    """

    slot_class: SlotClass
    bank: Bank
    slots: NDArray[np.int64]
    columns: NDArray[np.int64]
    is_one_row: bool = False


@dataclass(frozen=True, slots=True)
class _Shape:
    slot_class: SlotClass
    n_pairs: int
    n_tokens: int
    is_one_row: bool


class _Prepared:
    """An allocated graph: the structures of its stacks' tensors, and the inputs to fill."""

    __slots__ = ("columns", "graph", "slots", "stacks", "tokens", "weight_rows")

    def __init__(self, graph: int, stacks: Sequence[int], slots: int, pairs: PairInputs, n_pairs: int) -> None:
        self.graph, self.stacks = graph, [ggml.tensor_at(stack) for stack in stacks]
        self.slots = ggml.array_at(ggml.ggml_get_data(slots), np.int32, n_pairs)
        self.tokens: NDArray[Any] | None = None
        if pairs.tokens:
            self.tokens = ggml.array_at(ggml.ggml_get_data(pairs.tokens), np.int32, n_pairs)
        self.columns = ggml.array_at(ggml.ggml_get_data(pairs.columns), np.int64, n_pairs)
        self.weight_rows = ggml.array_at(ggml.ggml_get_data(pairs.weight_rows), np.int32, n_pairs)


class ExpertGraphs:
    """Graphs by shape, in one buffer that is sized for the largest batch at the start."""

    def __init__(self, backend: CpuBackend, exchange: Exchange, classes: set[SlotClass]) -> None:
        self._backend, self._exchange = backend, exchange
        self._graphs = GraphPool(backend.buft, self._build, _MAX_GRAPHS)
        # Where a stack lies before its first run; never read, but the allocator must take it for allocated.
        self._nowhere = backend.allocate(256)
        n_tokens, n_used = exchange.shape.n_tokens, exchange.shape.n_used
        for slot_class in classes:
            self._graphs.reserve(_Shape(slot_class, n_tokens, n_tokens, is_one_row=False))
            self._graphs.reserve(_Shape(slot_class, n_used, 1, is_one_row=True))
            self._graphs.reserve(_Shape(slot_class, n_used, 1, is_one_row=False))

    @property
    def compute_bytes(self) -> int:
        """Size of the buffer that the graphs share."""
        return self._graphs.n_bytes

    def most_pairs(self, bank: Bank) -> int:
        """Pairs that one graph should do at most, for its memory to stay within what one expert's batch takes."""
        return min(self._exchange.shape.n_tokens, max(1, _MOST_MAPPING // (_MAPPING_BYTES * bank.n_slots)))

    def run(self, work: BankWork, n_tokens: int, is_cancelled: Callable[[], bool] | None = None) -> None:
        """Fills the columns of all pairs. Raises EngineAbortedError."""
        bank = work.bank
        prepared = self._graphs.get(_Shape(work.slot_class, len(work.columns), n_tokens, work.is_one_row))
        for stack, address in zip(prepared.stacks, bank.addresses, strict=True):
            stack.data, stack.ne[2], stack.nb[2] = address, bank.n_slots, bank.stride
            stack.nb[3] = bank.stride * bank.n_slots
        prepared.slots[:] = work.slots
        prepared.columns[:] = work.columns
        prepared.weight_rows[:] = work.columns
        if prepared.tokens is not None:
            prepared.tokens[:] = work.columns // self._exchange.shape.n_used
        if is_cancelled is None:
            self._backend.compute(prepared.graph)
        else:
            self._backend.compute_until(prepared.graph, is_cancelled)

    def _build(self, shape: _Shape) -> BuiltGraph[_Prepared]:
        n_bytes = 2 * _N_NODES * ggml.ggml_tensor_overhead() + ggml.ggml_graph_overhead_custom(_N_NODES, False)
        ctx = ggml.ggml_init(ggml.InitParams(n_bytes, None, True))
        graph = ggml.ggml_new_graph_custom(ctx, _N_NODES, False)
        stacks = [int(ggml.ggml_new_tensor_3d(ctx, kind, ne[0], ne[1], 1)) for kind, ne in shape.slot_class]
        for stack in stacks:
            structure = ggml.tensor_at(stack)
            structure.buffer = self._nowhere
            structure.data = ggml_backend.ggml_backend_buffer_get_base(self._nowhere)
        slots = add_input(ctx, Type.I32, shape.n_pairs)
        builder = PairBuilder(ctx, graph, self._exchange, shape.n_tokens)
        pairs = builder.add(stacks, slots, shape.n_pairs, gathers=not shape.is_one_row)
        return BuiltGraph(ctx, graph, lambda: _Prepared(graph, stacks, slots, pairs, shape.n_pairs))

    def close(self) -> None:
        """Frees graphs and buffer."""
        self._graphs.close()
        if self._nowhere:
            ggml_backend.ggml_backend_buffer_free(self._nowhere)
            self._nowhere = 0
