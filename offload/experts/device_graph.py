"""Computes selected experts that lie in a device's slots.

Each pair of a token and an expert is a row of its own with a single id, so that no token ever repeats one, and every
id is the number of a slot that is filled.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from slimoe.offload.cache.device_pool import Pools
from slimoe.offload.errors import DeviceError, DoesNotFitError
from slimoe.offload.experts.pair_graph import PairBuilder, PairInputs, add_input
from slimoe.offload.ggml import ops as ggml
from slimoe.offload.ggml.device_backend import DeviceBackend
from slimoe.offload.graph.exchange import Exchange
from slimoe.offload.graph.expert_ffn import ExpertExtras, layer_extras
from slimoe.offload.graph.graph_pool import BuiltGraph, GraphPool
from slimoe.offload.graph.weights import LayerWeights
from slimoe.offload.model.architecture import Activation
from slimoe.offload.model.experts import SlotClass

_MAX_GRAPHS = 32
_N_NODES = 72


@dataclass(frozen=True, slots=True, eq=False)
class SlotWork:
    """Pairs of one class: `tokens` I32, `slots` I32 and `columns` I64 (token * n_expert_used + rank), all [n].

    `experts` I32 [n] are the numbers of the pairs' experts within `layer`, by which they have biases and scales.
    """

    slot_class: SlotClass
    tokens: NDArray[np.int32]
    slots: NDArray[np.int32]
    columns: NDArray[np.int64]
    layer: int
    experts: NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class _Shape:
    slot_class: SlotClass
    n_pairs: int
    n_tokens: int
    layer: int = -1


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A graph and its inputs."""

    graph: int
    slots: int
    pairs: PairInputs


class SlotGraphs:
    """Graphs by shape over one device's pools, in one buffer that is sized for the largest batch at the start.

    `layers` have the experts' biases and scales on the device; a layer with any has graphs of its own.
    """

    def __init__(
        self,
        backend: DeviceBackend,
        exchange: Exchange,
        pools: Pools,
        activation: Activation = "swiglu",
        layers: Sequence[LayerWeights] = (),
    ) -> None:
        self._backend, self._exchange, self.pools = backend, exchange, pools
        self._activation: Activation = activation
        self._vectors = {at: layer for at, layer in enumerate(layers) if layer.expert_biases or layer.expert_scales}
        self._inputs: list[NDArray[Any]] = []
        self._graphs = GraphPool(backend.buft, self._build, _MAX_GRAPHS * max(1, len(self._vectors)), backend.check)
        n_tokens = exchange.shape.n_tokens
        try:
            for slot_class, layer in product(pools, [*self._vectors][:1] or [-1]):
                self._graphs.reserve(_Shape(slot_class, n_tokens * exchange.shape.n_used, n_tokens, layer))
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
            assert 0 <= work.slots.min() <= work.slots.max() < self.pools[work.slot_class].n_slots
            layer = work.layer if work.layer in self._vectors else -1
            prepared = self._graphs.get(_Shape(work.slot_class, len(work.slots), n_tokens, layer))
            pairs, weight_rows = prepared.pairs, work.columns.astype(np.int32)
            # Not waiting for the graph before, which would keep the host from its own work.
            self._inputs += (work.tokens, work.slots, weight_rows, work.columns, work.experts)
            self._backend.set_async(pairs.tokens, work.tokens)
            self._backend.set_async(prepared.slots, work.slots)
            if pairs.experts:
                self._backend.set_async(pairs.experts, work.experts)
            self._backend.set_async(pairs.weight_rows, weight_rows)
            self._backend.set_async(pairs.columns, work.columns)
            self._backend.compute_async(prepared.graph)

    def _build(self, shape: _Shape) -> BuiltGraph[_Prepared]:
        n_bytes = 2 * _N_NODES * ggml.ggml_tensor_overhead() + ggml.ggml_graph_overhead_custom(_N_NODES, False)
        ctx = ggml.ggml_init(ggml.InitParams(n_bytes, None, True))
        graph = ggml.ggml_new_graph_custom(ctx, _N_NODES, False)
        slots = add_input(ctx, Type.I32, shape.n_pairs)
        builder = PairBuilder(ctx, graph, self._exchange, shape.n_tokens)
        extras = ExpertExtras(self._activation)
        if shape.layer >= 0:
            extras = layer_extras(ctx, self._activation, self._vectors[shape.layer])
        pairs = builder.add(self.pools[shape.slot_class].stacks, slots, shape.n_pairs, extras)
        return BuiltGraph(ctx, graph, lambda: _Prepared(graph, slots, pairs))

    def close(self) -> None:
        """Frees graphs and buffer."""
        self._graphs.close()
