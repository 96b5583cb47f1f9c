"""Which expert lies in which slot of a pool: the cache's decisions, without the bytes behind them.

The engine and the offline replay use this same class, so that a recorded trace, replayed, evicts what the engine did.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from heapq import heapify, heappop, heappush, heapreplace
from typing import Protocol

import numpy as np

from slimoe.offload.cache.policy import Values

Key = tuple[int, int]
"""Layer and stored expert. A pool holds copies of one slot class, so an expert has at most one copy in it."""

_MOST_STALE = 64
"""So many entries of a heap, and one more for each of its experts, may be out of date before it is built anew."""


class Valued(Protocol):
    """Ranks of experts, by which a cache keeps them, as `policy.Policy` describes them: any policy has them."""

    @property
    def shape(self) -> tuple[int, int]:
        """Layers, and experts of the layer that has most."""

    @property
    def layer_weights(self) -> Values:
        """What a rank of each layer counts now, [n_layer], above 0."""

    @property
    def n_falls(self) -> Sequence[int]:
        """For each layer a number that grows when ranks may have fallen; else they only rise."""

    def rank(self, key: Key) -> float:
        """The rank of an expert of a layer; the higher, the better worth keeping."""


class SlotCache:
    """`n_slots` equal slots of a pool. The lowest valued expert leaves first, of equals the one of the latest layer.

    Earlier layers stay since a step begins with them: their experts cannot be fetched ahead of time. An expert that is
    loaded takes the lowest valued slot even when it is worth less itself; the next one then takes its place in turn, so
    that rarely used experts pass through without driving out the others.

    Finding the lowest takes time for each layer and for the logarithm of the slots: each layer has a heap of its
    experts by rank, whose entries may be too low, since ranks rise, and are put right when they come to the top.
    """

    def __init__(self, n_slots: int, policy: Valued) -> None:
        assert n_slots > 0
        self.n_slots = n_slots
        self._policy = policy
        self._slot_of: dict[Key, int] = {}
        self._rank_of: dict[Key, float] = {}
        n_layer = policy.shape[0]
        self._heaps: list[list[tuple[float, int]]] = [[] for _ in range(n_layer)]
        self._n_held = [0] * n_layer
        self._lowest_ranks = [math.inf] * n_layer
        self._n_falls = list(policy.n_falls)
        self._free = list(range(n_slots - 1, -1, -1))

    def __len__(self) -> int:
        """Slots in use."""
        return len(self._slot_of)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._slot_of)

    def __contains__(self, key: Key) -> bool:
        return key in self._slot_of

    def lookup(self, key: Key) -> int | None:
        """The slot an expert lies in, None if it is not in the pool."""
        return self._slot_of.get(key)

    def value(self, key: Key) -> float:
        """What the policy says an expert is worth now, to be compared with others at the same time."""
        return self._policy.rank(key) * float(self._policy.layer_weights[key[0]])

    def victim(self, pinned: Collection[Key] = ()) -> Key | None:
        """The expert that a load would evict now, None while a slot is free or when everything is pinned."""
        return None if self._free else self._lowest(pinned)

    def acquire(self, key: Key, pinned: Collection[Key] = ()) -> tuple[int, Key | None]:
        """What `try_acquire` gives, where a free slot or an expert that is not pinned must be there."""
        taken = self.try_acquire(key, pinned)
        assert taken is not None, f"no slot for {key}: everything is pinned"
        return taken

    def try_acquire(self, key: Key, pinned: Collection[Key] = ()) -> tuple[int, Key | None] | None:
        """A slot for an expert that is not in the pool, and the expert that had to leave it, if any.

        `pinned` experts do not leave: those that the step still needs, and those being loaded. None if all are.
        """
        assert key not in self._slot_of, f"{key} has a slot"
        evicted = None
        if self._free:
            slot = self._free.pop()
        else:
            evicted = self._lowest(pinned)
            if evicted is None:
                return None
            slot = self._remove(evicted)
        self._slot_of[key] = slot
        self._n_held[key[0]] += 1
        self._push(key)
        return slot, evicted

    def free(self, key: Key) -> int:
        """Takes an expert out, for instance one that could not be read, and gives the slot it had."""
        slot = self._remove(key)
        self._free.append(slot)
        return slot

    def resize(self, n_slots: int) -> list[tuple[int, int]]:
        """Has so many slots from now on: of too many experts the lowest valued leave, and the others move together.

        Returns the moves, from slot to slot.
        """
        assert n_slots > 0
        by_value = sorted(self._slot_of, key=lambda key: (self.value(key), -key[0], -key[1]))
        for key in by_value[: max(0, len(by_value) - n_slots)]:
            self.free(key)
        free, moves = sorted(slot for slot in self._free if slot < n_slots), []
        for key, slot in self._slot_of.items():
            if slot >= n_slots:
                self._slot_of[key] = free.pop(0)
                moves.append((slot, self._slot_of[key]))
        self._free = sorted((*free, *range(self.n_slots, n_slots)), reverse=True)
        self.n_slots = n_slots
        return moves

    def check(self) -> None:
        """Asserts that slots and experts match one to one."""
        assert len(self._slot_of) + len(self._free) == self.n_slots
        assert sorted((*self._slot_of.values(), *self._free)) == list(range(self.n_slots))
        assert self._rank_of.keys() == self._slot_of.keys()
        entries = [set(heap) for heap in self._heaps]
        for key, rank in self._rank_of.items():
            assert (rank, -key[1]) in entries[key[0]]

    def _remove(self, key: Key) -> int:
        slot = self._slot_of.pop(key)
        del self._rank_of[key]
        self._n_held[key[0]] -= 1
        return slot

    def _push(self, key: Key) -> None:
        layer, expert = key
        heap = self._heaps[layer]
        self._rank_of[key] = rank = self._policy.rank(key)
        heappush(heap, (rank, -expert))
        self._lowest_ranks[layer] = heap[0][0]
        if len(heap) > 2 * self._n_held[layer] + _MOST_STALE:
            self._sort(layer)

    def _sort(self, layer: int) -> None:
        """Builds the heap of a layer anew."""
        keys = {(layer, -entry[1]) for entry in self._heaps[layer]}
        heap = []
        for key in keys & self._slot_of.keys():
            self._rank_of[key] = rank = self._policy.rank(key)
            heap.append((rank, -key[1]))
        heapify(heap)
        self._heaps[layer] = heap
        self._lowest_ranks[layer] = heap[0][0] if heap else math.inf

    def _lowest(self, pinned: Collection[Key]) -> Key | None:
        n_falls, weights, lowest_ranks = self._policy.n_falls, self._policy.layer_weights.tolist(), self._lowest_ranks
        if n_falls != self._n_falls:
            for layer, (now, before) in enumerate(zip(n_falls, self._n_falls, strict=True)):
                if now != before:
                    self._sort(layer)
            self._n_falls = list(n_falls)
        set_aside: list[tuple[int, tuple[float, int]]] = []
        found = None
        # Turned round, the first of equals is the latest layer. For so few numbers lists are faster than arrays.
        turned = [rank * weight for rank, weight in zip(reversed(lowest_ranks), reversed(weights), strict=True)]
        while found is None:
            layer = len(weights) - 1 - turned.index(min(turned))
            heap = self._heaps[layer]
            if not heap:
                break
            entry = heap[0]
            key = layer, -entry[1]
            if self._rank_of.get(key) != entry[0]:
                heappop(heap)
            elif (rank := self._policy.rank(key)) != entry[0]:
                self._rank_of[key] = rank
                heapreplace(heap, (rank, entry[1]))
            elif key in pinned:
                set_aside.append((layer, heappop(heap)))
            else:
                found = key
            lowest_ranks[layer] = lowest = heap[0][0] if heap else math.inf
            turned[-1 - layer] = lowest * weights[layer]
        for layer, entry in set_aside:
            heappush(self._heaps[layer], entry)
            lowest_ranks[layer] = self._heaps[layer][0][0]
        return found


def most_valuable(values: Values, keys: Iterable[Key], n: int) -> list[Key]:
    """The `n` of `keys` that a pool should hold at the start, best first; of equals those of the first layers."""
    listed = list(keys)
    layers, experts = np.array(listed, np.int64).reshape(-1, 2).T
    order = np.lexsort((experts, layers, -values[layers, experts]))
    return [listed[place] for place in order[:n]]
