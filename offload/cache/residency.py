"""Which expert lies in which slot of a pool: the cache's decisions, without the bytes behind them.

The engine and the offline replay use this same class, so that a recorded trace, replayed, evicts what the engine did.
"""

from collections.abc import Collection, Iterable, Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from slimoe.offload.cache.policy import Values

Key = tuple[int, int]
"""Layer and stored expert. A pool holds copies of one slot class, so an expert has at most one copy in it."""


class Valued(Protocol):
    """Values of experts, by which a cache keeps them: any `policy.Policy` has them."""

    @property
    def keeping(self) -> Values:
        """What each expert is worth now, [n_layer, n_expert]; the higher, the better worth keeping."""


class SlotCache:
    """`n_slots` equal slots of a pool. The lowest valued expert leaves first, of equals the one of the latest layer.

    Earlier layers stay since a step begins with them: their experts cannot be fetched ahead of time. An expert that is
    loaded takes the lowest valued slot even when it is worth less itself; the next one then takes its place in turn, so
    that rarely used experts pass through without driving out the others.
    """

    def __init__(self, n_slots: int, policy: Valued) -> None:
        assert n_slots > 0
        self.n_slots = n_slots
        self._policy = policy
        self._n_expert: int = policy.keeping.shape[1]
        self._slot_of: dict[Key, int] = {}
        self._index_of: NDArray[np.intp] = np.full(n_slots, -1, np.intp)
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
        """What the policy says an expert is worth now."""
        return float(self._policy.keeping[key])

    def victim(self, pinned: Collection[Key] = ()) -> Key | None:
        """The expert that a load would evict now, None while a slot is free or when everything is pinned."""
        if self._free:
            return None
        slot = self._lowest(pinned)
        return None if slot is None else self._key(slot)

    def acquire(self, key: Key, pinned: Collection[Key] = ()) -> tuple[int, Key | None]:
        """A slot for an expert that is not in the pool, and the expert that had to leave it, if any.

        `pinned` experts do not leave: those that the step still needs, and those being loaded. A free slot or an
        expert that is not pinned must be there.
        """
        assert key not in self._slot_of, f"{key} has a slot"
        evicted = None
        if self._free:
            slot = self._free.pop()
        else:
            lowest = self._lowest(pinned)
            assert lowest is not None, f"no slot for {key}: everything is pinned"
            slot = lowest
            evicted = self._key(slot)
            del self._slot_of[evicted]
        self._slot_of[key] = slot
        self._index_of[slot] = key[0] * self._n_expert + key[1]
        return slot, evicted

    def free(self, key: Key) -> int:
        """Takes an expert out, for instance one that could not be read, and gives the slot it had."""
        slot = self._slot_of.pop(key)
        self._index_of[slot] = -1
        self._free.append(slot)
        return slot

    def resize(self, n_slots: int) -> list[tuple[int, int]]:
        """Has so many slots from now on: of too many experts the lowest valued leave, and the others move together.

        Returns the moves, from slot to slot.
        """
        assert n_slots > 0
        values = self._policy.keeping
        by_value = sorted(self._slot_of, key=lambda key: (values[key], -key[0], -key[1]))
        for key in by_value[: max(0, len(by_value) - n_slots)]:
            self.free(key)
        free, moves = sorted(slot for slot in self._free if slot < n_slots), []
        for key, slot in self._slot_of.items():
            if slot >= n_slots:
                self._slot_of[key] = free.pop(0)
                self._index_of[self._slot_of[key]] = self._index_of[slot]
                moves.append((slot, self._slot_of[key]))
        more = max(0, n_slots - self.n_slots)
        self._index_of = np.append(self._index_of[:n_slots], np.full(more, -1, np.intp))
        self._free = sorted((*free, *range(self.n_slots, n_slots)), reverse=True)
        self.n_slots = n_slots
        return moves

    def check(self) -> None:
        """Asserts that slots and experts match one to one."""
        assert len(self._slot_of) + len(self._free) == self.n_slots
        assert sorted((*self._slot_of.values(), *self._free)) == list(range(self.n_slots))
        for key, slot in self._slot_of.items():
            assert self._key(slot) == key
        assert all(self._index_of[slot] == -1 for slot in self._free)

    def _key(self, slot: int) -> Key:
        return divmod(int(self._index_of[slot]), self._n_expert)

    def _lowest(self, pinned: Collection[Key]) -> int | None:
        values = self._policy.keeping.ravel()[self._index_of]
        for key in pinned:
            slot = self._slot_of.get(key)
            if slot is not None:
                values[slot] = np.inf
        lowest = values.min()
        if lowest == np.inf:
            return None
        ties = np.flatnonzero(values == lowest)
        return int(ties[self._index_of[ties].argmax()])


def most_valuable(values: Values, keys: Iterable[Key], n: int) -> list[Key]:
    """The `n` of `keys` that a pool should hold at the start, best first; of equals those of the first layers."""
    return sorted(keys, key=lambda key: (-values[key], key))[:n]
