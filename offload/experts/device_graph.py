"""Multiplies picks with experts in a device's slots.

Each pair of a token and an expert is a row of its own with a single id, so that no token ever repeats one, and every
id is the number of a slot that is filled.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from slimoe.offload.cache.device_pool import Pools
from slimoe.offload.errors import DeviceError, DoesNotFitError
from slimoe.offload.ggml import ops as ggml
from slimoe.offload.ggml.device_backend import DeviceBackend
from slimoe.offload.graph.exchange import Exchange
from slimoe.offload.graph.expert_ffn import add_expert_ffn
from slimoe.offload.graph.graph_pool import BuiltGraph, GraphPool
from slimoe.offload.model.experts import SlotClass

_MAX_GRAPHS = 32
_N_NODES = 48


@dataclass(frozen=True, slots=True, eq=False)
class SlotWork:
    """Pairs of one class: `tokens` I32, `slots` I32 and `columns` I64 (token * n_expert_used + rank), all [n]."""

    slot_class: SlotClass
    tokens: NDArray[np.int32]
    slots: NDArray[np.int32]
    columns: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Shape:
    slot_class: SlotClass
    n_pairs: int
    n_tokens: int


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A graph and the inputs to fill."""

    graph: int
    tokens: int
    slots: int
    shares: int
    columns: int


class SlotGraphs:
    """Graphs by shape over one device's pools, in one buffer that is sized for the largest batch at the start."""

    def __init__(
        self, backend: DeviceBackend, exchange: Exchange, pools: Pools, n_embd: int, n_used: int, n_batch: int
    ) -> None:
        self._backend, self._exchange, self._pools = backend, exchange, pools
        self._n_embd, self._n_used = n_embd, n_used
        self._inputs: list[NDArray[Any]] = []
        self._graphs = GraphPool(backend.buft, self._build, _MAX_GRAPHS, backend.check)
        try:
            for slot_class in pools:
                self._graphs.reserve(_Shape(slot_class, n_batch * n_used, n_batch))
        except (DeviceError, DoesNotFitError):
            self.close()
            raise

    @property
    def compute_bytes(self) -> int:
        """Size of the buffer that the graphs share."""
        return self._graphs.n_bytes

    def begin(self, works: Sequence[SlotWork], n_tokens: int) -> None:
        """Begins to fill the columns of all pairs; later work of the backend comes after it."""
        self._backend.synchronize()  # the inputs of the last time have been read, too
        self._inputs.clear()
        for work in works:
            assert work.slots.size
            assert 0 <= work.slots.min() <= work.slots.max() < self._pools[work.slot_class].n_slots
            prepared = self._graphs.get(_Shape(work.slot_class, len(work.slots), n_tokens))
            self._give(prepared.tokens, work.tokens)
            self._give(prepared.slots, work.slots)
            self._give(prepared.shares, work.columns.astype(np.int32))
            self._give(prepared.columns, work.columns)
            self._backend.compute_async(prepared.graph)

    def _give(self, tensor: int, values: NDArray[Any]) -> None:
        """Sets an input without waiting for the graph before, which would keep the host from its own work."""
        self._inputs.append(values)
        self._backend.set_async(tensor, values)

    def _build(self, shape: _Shape) -> BuiltGraph[_Prepared]:
        n_bytes = 2 * _N_NODES * ggml.ggml_tensor_overhead() + ggml.ggml_graph_overhead_custom(_N_NODES, False)
        ctx = ggml.ggml_init(ggml.InitParams(n_bytes, None, True))
        graph = ggml.ggml_new_graph_custom(ctx, _N_NODES, False)
        exchange, n_pairs, n_embd = self._exchange, shape.n_pairs, self._n_embd
        tokens, slots, shares = (_input(ctx, Type.I32, n_pairs) for _ in range(3))
        columns = _input(ctx, Type.I64, n_pairs)
        gathered = ggml.ggml_get_rows(ctx, exchange.view(ctx, "normed", (n_embd, shape.n_tokens)), tokens)
        rows = ggml.ggml_reshape_3d(ctx, gathered, n_embd, 1, n_pairs)
        ids = ggml.ggml_reshape_2d(ctx, slots, 1, n_pairs)
        gate, up, down = self._pools[shape.slot_class].stacks
        result = add_expert_ffn(ctx, (gate, up), down, rows, ids)
        n_columns = self._n_used * shape.n_tokens
        share = ggml.ggml_get_rows(ctx, exchange.view(ctx, "shares", (1, n_columns)), shares)
        weighted = ggml.ggml_mul(ctx, result, ggml.ggml_reshape_3d(ctx, share, 1, 1, n_pairs))
        flat = ggml.ggml_reshape_2d(ctx, weighted, n_embd, n_pairs)
        outputs = exchange.view(ctx, "outputs", (n_embd, n_columns))
        ggml.ggml_build_forward_expand(graph, ggml.ggml_set_rows(ctx, outputs, flat, columns))
        return BuiltGraph(ctx, graph, lambda: _Prepared(graph, tokens, slots, shares, columns))

    def close(self) -> None:
        """Frees graphs and buffer."""
        self._graphs.close()


def _input(ctx: int, kind: Type, n: int) -> int:
    tensor: int = ggml.ggml_new_tensor_1d(ctx, kind, n)
    ggml.ggml_set_input(tensor)
    ggml.ggml_set_output(tensor)
    return tensor
