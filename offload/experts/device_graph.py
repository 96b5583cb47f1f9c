"""Computes selected experts that lie in a device's slots, all those of one bank in one graph.

What says which they are goes to the device in one piece. The pairs of several tokens are rows of their own with a
single id each, so that no token ever repeats one, and every id is the number of a slot that is filled.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from slimoe.offload.cache.device_pool import Bank, Pools
from slimoe.offload.errors import DeviceError, DoesNotFitError
from slimoe.offload.experts.pair_graph import PairBuilder, PairInputs, add_input
from slimoe.offload.ggml import ops as ggml
from slimoe.offload.ggml.device_backend import DeviceBackend
from slimoe.offload.graph.exchange import Exchange
from slimoe.offload.graph.expert_ffn import layer_extras
from slimoe.offload.graph.graph_pool import BuiltGraph, GraphPool
from slimoe.offload.graph.weights import LayerWeights
from slimoe.offload.model.architecture import Architecture

_MAX_GRAPHS = 32
_N_NODES = 72
_HELD_INPUTS = 16
"""So many inputs of a batch's graphs are kept that were begun, before these are waited for."""
_ALIGNED = 64
"""Integers between the beginnings of two inputs that travel together: backends ask for 256 bytes at most."""


@dataclass(frozen=True, slots=True, eq=False)
class SlotWork:
    """Pairs of one bank and `layer`: their `slots`, `experts` (numbers within the layer) and `columns` (token *
    n_expert_used + rank), all integers [n].

    `is_token` says that they are pairs of a single token, each with an expert of its own.
    """

    layer: int
    bank: Bank
    slots: NDArray[np.integer[Any]]
    experts: NDArray[np.integer[Any]]
    columns: NDArray[np.integer[Any]]
    is_token: bool = False


@dataclass(frozen=True, slots=True)
class _Pairs:
    """The shape of a graph over slots; `layer` is -1 where no layer's vectors are needed."""

    bank: Bank
    n_pairs: int
    n_tokens: int
    layer: int
    is_token: bool


@dataclass(frozen=True, slots=True)
class _Rows:
    """The shape of a graph that puts so many rows in their columns."""

    n_rows: int


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A graph and its inputs: `numbers` I32, and `rows` F32 [n_embd_expert, n_rows] if it has any."""

    graph: int
    numbers: int
    rows: int = 0


class SlotGraphs:
    """Graphs by shape over one device's pools, in one buffer that is sized for the largest batch at the start.

    `layers` have the experts' biases and scales on the device; a layer with any has graphs of its own.
    """

    def __init__(
        self,
        backend: DeviceBackend,
        exchange: Exchange,
        pools: Pools,
        architecture: Architecture,
        layers: Sequence[LayerWeights],
    ) -> None:
        self._backend, self._exchange, self.pools = backend, exchange, pools
        self._architecture = architecture
        self._vectors = {at: layer for at, layer in enumerate(layers) if layer.expert_biases or layer.expert_scales}
        self._inputs: list[NDArray[Any]] = []
        self._graphs = GraphPool(backend.buft, self._build, _MAX_GRAPHS * max(1, len(self._vectors)), backend.check)
        n_tokens, n_used = exchange.shape.n_tokens, exchange.shape.n_used
        try:
            self._graphs.reserve(_Rows(n_tokens * n_used))
            for bank, layer in product(pools, [*self._vectors][:1] or [-1]):
                self._graphs.reserve(_Pairs(bank, n_tokens * n_used, n_tokens, layer, is_token=False))
        except (DeviceError, DoesNotFitError):
            self.close()
            raise

    @property
    def compute_bytes(self) -> int:
        """Size of the buffer that the graphs share."""
        return self._graphs.n_bytes

    def begin(self, works: Sequence[SlotWork], n_tokens: int, after: int = 0) -> None:
        """Begins to fill the columns of all pairs; later work of the backend comes after it.

        With `after`, a mark of the uploads to their slots, the graphs wait for that.
        """
        if n_tokens == 1 or len(self._inputs) >= _HELD_INPUTS:
            self._settle()
        n_used = self._exchange.shape.n_used
        for work in works:
            assert work.slots.size
            assert 0 <= work.slots.min() <= work.slots.max() < self.pools[work.bank].n_slots
            layer = work.layer if work.layer in self._vectors else -1
            prepared = self._graphs.get(_Pairs(work.bank, len(work.slots), n_tokens, layer, work.is_token))
            parts = [work.slots, work.columns]
            if not work.is_token:
                parts.append(work.columns // n_used)
            if layer >= 0:
                parts.append(work.experts)
            numbers = np.zeros((len(parts), _aligned(len(work.slots))), np.int32)
            numbers[:, : len(work.slots)] = parts
            # Before the waiting: some drivers let the host wait for a copy of its own memory, and all before that.
            self._send(prepared.numbers, numbers)
            self._backend.wait(after)
            self._backend.compute_async(prepared.graph)

    def mark(self) -> int:
        """Marks the end of what was begun so far, for uploads to wait for."""
        return self._backend.mark()

    def write(self, columns: NDArray[np.integer[Any]], rows: NDArray[np.float32]) -> None:
        """Puts rows [n, n_embd_expert] that were computed elsewhere into these columns, after what has begun."""
        self._settle()
        prepared = self._graphs.get(_Rows(len(columns)))
        self._send(prepared.numbers, columns.astype(np.int32))
        self._send(prepared.rows, np.ascontiguousarray(rows))
        self._backend.compute_async(prepared.graph)

    def _settle(self) -> None:
        self._backend.synchronize()  # the inputs so far have been read, too
        self._inputs.clear()

    def _send(self, tensor: int, values: NDArray[Any]) -> None:
        """Not waiting for the graph before, which would keep the host from its own work."""
        self._inputs.append(values)
        self._backend.set_async(tensor, values)

    def _build(self, shape: _Pairs | _Rows) -> BuiltGraph[_Prepared]:
        n_bytes = 2 * _N_NODES * ggml.ggml_tensor_overhead() + ggml.ggml_graph_overhead_custom(_N_NODES, False)
        ctx = ggml.ggml_init(ggml.InitParams(n_bytes, None, True))
        graph = ggml.ggml_new_graph_custom(ctx, _N_NODES, False)
        prepared = self._add_rows(ctx, graph, shape) if isinstance(shape, _Rows) else self._add_pairs(ctx, graph, shape)
        return BuiltGraph(ctx, graph, lambda: prepared)

    def _add_rows(self, ctx: int, graph: int, shape: _Rows) -> _Prepared:
        sizes, n = self._exchange.shape, shape.n_rows
        numbers, rows = add_input(ctx, n), add_input(ctx, n * sizes.n_embd_expert, Type.F32)
        outputs = self._exchange.view(ctx, "outputs", (sizes.n_embd_expert, sizes.n_used * sizes.n_tokens))
        written = ggml.ggml_set_rows(ctx, outputs, ggml.ggml_reshape_2d(ctx, rows, sizes.n_embd_expert, n), numbers)
        ggml.ggml_build_forward_expand(graph, written)
        return _Prepared(graph, numbers, rows)

    def _add_pairs(self, ctx: int, graph: int, shape: _Pairs) -> _Prepared:
        extras = layer_extras(ctx, self._architecture, self._vectors.get(shape.layer))
        n_parts = 2 + (not shape.is_token) + extras.has_vectors
        numbers = add_input(ctx, n_parts * _aligned(shape.n_pairs))
        begins = (4 * part * _aligned(shape.n_pairs) for part in range(n_parts))
        slots, columns, *others = (int(ggml.ggml_view_1d(ctx, numbers, shape.n_pairs, begin)) for begin in begins)
        tokens = 0 if shape.is_token else others.pop(0)
        inputs = PairInputs(slots, columns, tokens, *others)
        PairBuilder(ctx, graph, self._exchange, shape.n_tokens).add(self.pools[shape.bank].stacks, inputs, extras)
        return _Prepared(graph, numbers)

    def close(self) -> None:
        """Frees graphs and buffer."""
        self._graphs.close()


def _aligned(n: int) -> int:
    return -(-n // _ALIGNED) * _ALIGNED
