"""Caches on a device as other engines have them, played on routing: what is found, uploaded and left to the CPU.

Each says for every token and layer how many of the selected experts are in slots, and how many are uploaded to be
computed there; the CPU has the rest. None of them looks at speeds, so that one run serves for all machines.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from math import log2
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from bench.simulated.routing import Floats, Ids
from slimoe.offload.cache.residency import Key


@dataclass(frozen=True, slots=True, eq=False)
class Counts:
    """Experts that were found `here` and `uploaded` [n_tokens, n_layer], and `moved` between tokens [n_tokens]."""

    here: Ids
    uploaded: Ids
    moved: Ids

    @classmethod
    def empty(cls, n_tokens: int, n_layer: int) -> "Counts":
        """Nothing yet."""
        shape = n_tokens, n_layer
        return cls(np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(n_tokens, np.int64))


def most_used(uses: Floats, n_slots: int) -> NDArray[np.bool_]:
    """The `n_slots` experts of most uses, bool [n_layer, n_expert]; of equals those of the first layers."""
    chosen = np.zeros(uses.shape, np.bool_)
    chosen.ravel()[np.argsort(-uses.ravel(), kind="stable")[:n_slots]] = True
    return chosen


def placed(selected: Ids, is_here: NDArray[np.bool_]) -> Counts:
    """Experts that never move."""
    counts = Counts.empty(*selected.shape[:2])
    counts.here[:] = is_here[np.arange(selected.shape[1])[None, :, None], selected].sum(axis=2)
    return counts


class Cache(Protocol):
    """Slots, of which one must be given up for each new expert."""

    def __len__(self) -> int:
        """The experts that are held."""

    def __contains__(self, key: Key) -> bool:
        """Whether an expert is held."""

    def use(self, key: Key, now: int) -> None:
        """Token `now` selected an expert, which may be held or not."""

    def warmth(self, key: Key) -> float:
        """How likely an expert is used again; only compared."""

    def evict(self, needed: set[Key], now: int) -> None:
        """Gives up an expert that is not needed for the layer at hand."""

    def add(self, key: Key, now: int) -> None:
        """Holds an expert."""


class Lru:
    """Gives up the expert that was used longest ago."""

    def __init__(self) -> None:
        self._held: OrderedDict[Key, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: Key) -> bool:
        return key in self._held

    def use(self, key: Key, now: int) -> None:
        """Makes it the last one."""
        if key in self._held:
            self._held.move_to_end(key)

    def warmth(self, key: Key) -> float:
        """All alike."""
        return 0.0

    def evict(self, needed: set[Key], now: int) -> None:
        """Gives up the first that is not needed."""
        del self._held[next(key for key in self._held if key not in needed)]

    def add(self, key: Key, now: int) -> None:
        """Holds it as the last one."""
        self._held[key] = None


class ClassLru:
    """llama.cpp's cache: eight lists by the logarithm of uses that fade by half in 128 tokens, each in order of use.

    Of the oldest expert of each list the one is given up whose age over two to the power of its list is greatest. Uses
    are counted on when an expert has been given up.
    Source: `src/llama-moe-cache.cpp` of llama.cpp from build b12170 on.
    """

    N_CLASSES, HALF_LIFE = 8, 128.0

    def __init__(self) -> None:
        self._lists: list[OrderedDict[Key, int]] = [OrderedDict() for _ in range(self.N_CLASSES)]
        self._class_of: dict[Key, int] = {}
        self._uses: dict[Key, tuple[float, int]] = {}

    def __len__(self) -> int:
        return len(self._class_of)

    def __contains__(self, key: Key) -> bool:
        return key in self._class_of

    def use(self, key: Key, now: int) -> None:
        """Counts the use, and enters the expert in the list of its count if it is held."""
        count, before = self._uses.get(key, (0.0, now))
        self._uses[key] = count * 0.5 ** ((now - before) / self.HALF_LIFE) + 1, now
        if key in self._class_of:
            del self._lists[self._class_of.pop(key)][key]
            self.add(key, now)

    def warmth(self, key: Key) -> float:
        """Its faded count."""
        return self._uses[key][0]

    def evict(self, needed: set[Key], now: int) -> None:
        """Gives up the oldest for its class."""
        oldest = [next((key for key in held if key not in needed), None) for held in self._lists]
        age = {
            key: (now - self._lists[number][key] + 1) / 2**number
            for number, key in enumerate(oldest)
            if key is not None
        }
        key = max(age, key=lambda key: age[key])
        del self._lists[self._class_of.pop(key)][key]

    def add(self, key: Key, now: int) -> None:
        """Enters it in the list of its count."""
        number = min(self.N_CLASSES - 1, int(log2(self._uses[key][0])))
        self._lists[number][key] = now
        self._class_of[key] = number


def uploading(selected: Ids, n_slots: int, make: Callable[[], Cache], cpu_share: float = 0.0) -> Counts:
    """A cache that uploads every miss, as soon as it is full but for a `cpu_share` of them.

    Which misses are the CPU's is not told by what llama.cpp documents; here the least warm are, as many as on average
    make the share.
    """
    counts, cache, owed = Counts.empty(*selected.shape[:2]), make(), 0.0
    for token, layers in enumerate(selected.tolist()):
        for layer, experts in enumerate(layers):
            keys = [(layer, expert) for expert in experts]
            for key in keys:
                cache.use(key, token)
            missed = sorted((key for key in keys if key not in cache), key=cache.warmth)
            counts.here[token, layer] = len(keys) - len(missed)
            if missed and len(cache) >= n_slots:
                owed += cpu_share * len(missed)
                n_cpu = min(len(missed), int(owed + 1e-9))
                owed -= n_cpu
                missed = missed[n_cpu:]
            counts.uploaded[token, layer] = len(missed)
            for key in missed:
                if len(cache) >= n_slots:
                    cache.evict(set(keys), token)
                cache.add(key, token)
    return counts
