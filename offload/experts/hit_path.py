"""The short way through a cut layer: one token whose selected experts are all in the host expert cache.

A look-up in a table and a graph that is built for the layer; what it saves is Python, of which every operation costs
much more between two graphs, whose weights have just driven it from the processor's caches, than in a loop.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slimoe.offload.cache.expert_uses import ExpertUses
from slimoe.offload.cache.host_pool import HostPool
from slimoe.offload.cache.policy import Policy
from slimoe.offload.experts.host_experts import HostExperts
from slimoe.offload.experts.host_graph import ExpertGraphs, TokenShape
from slimoe.offload.graph.exchange import Exchange
from slimoe.offload.model.experts import ExpertLayer


@dataclass(frozen=True, slots=True, eq=False)
class _Layer:
    """A layer whose experts are of one class and in one bank, one for each row of the router.

    `ranked` I32 [n_used] is where the router tells what a single token selected, `ready` I32 [n_expert] the slots.
    """

    shape: TokenShape
    ranked: NDArray[np.int32]
    ready: NDArray[np.int32]


class HitPath:
    """Computes layers of single tokens of answers where nothing is to be read; `exchange` is the CPU's.

    What was selected is told to `policy` and `uses` together, by `flush`: before anybody asks them.
    """

    def __init__(
        self,
        layers: Sequence[ExpertLayer | None],
        exchange: Exchange,
        graphs: ExpertGraphs,
        host_pool: HostPool,
        host_experts: HostExperts,
    ) -> None:
        self._all_layers = layers
        self._exchange, self._graphs = exchange, graphs
        self._host_pool, self._host_experts = host_pool, host_experts
        self._layers: dict[int, _Layer] = {}
        self._n_resized = -1
        self._done: list[tuple[int, NDArray[np.int32]]] = []

    def begin(self) -> None:
        """A step begins, perhaps with other slots than the last one."""
        if self._n_resized == self._host_pool.n_resized:
            return
        self._n_resized = self._host_pool.n_resized
        for index, (layer, banks) in enumerate(zip(self._all_layers, self._host_experts.banks, strict=True)):
            if (
                layer is None
                or banks is None
                or len(banks.classes) != 1
                or banks.target.tolist() != [*range(len(layer.experts))]
            ):
                continue
            (slot_class,), (phases,) = banks.classes, banks.phases
            if phases is not None:
                shape = TokenShape(index, slot_class, self._host_pool.bank(slot_class, phases))
                ranked = self._exchange.read("ranked", layer.n_expert_used)
                ready = self._host_pool.ready(slot_class)[index, : len(layer.experts)]
                self._layers[index] = _Layer(shape, ranked, ready)

    def run(self, index: int, predicted: tuple[int, ...]) -> bool:
        """Fills the outputs of layer `index`; False if it can't, or if experts of `predicted` layers may be absent."""
        layer = self._layers.get(index)
        if layer is None or self._host_experts.has_begun(index):
            return False
        slots = layer.ready.take(layer.ranked)
        if slots.min() < 0 or (predicted and not self._are_ready(predicted, len(slots))):
            return False
        experts = layer.ranked.copy()
        self._host_experts.settle(index, experts)
        self._graphs.run_token(layer.shape, slots, experts)
        self._done.append((index, experts))
        return True

    def _are_ready(self, predicted: tuple[int, ...], n_used: int) -> bool:
        """Whether all experts are here that later layers would select by this layer's input."""
        shape = self._exchange.shape
        early = self._exchange.read("early_logits", len(predicted), shape.n_expert)
        for later, logits in zip(predicted, early, strict=True):
            layer = self._layers.get(later)
            if layer is None:
                return False
            n_row = len(layer.ready)
            likeliest = logits[:n_row].argpartition(n_row - n_used)[n_row - n_used :]
            if layer.ready.take(likeliest).min() < 0:
                return False
        return True

    def flush(self, policy: Policy, uses: ExpertUses) -> None:
        """Tells who counts what was selected since the last time."""
        for index, experts in self._done:
            uses.add(index, experts)
            policy.decode(index, experts)
            self._host_pool.counters.hits += len(experts)
        self._done.clear()
