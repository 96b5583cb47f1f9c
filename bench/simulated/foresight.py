"""What can be done on a simulated machine by one who knows when every expert is used next: a bound for caches."""

from heapq import heapify, heappop, heappush

import numpy as np

from bench.simulated.caches import Counts, most_used
from bench.simulated.machine import Machine, layer_seconds
from bench.simulated.routing import Floats, Ids
from slimoe.offload.cache.residency import Key


def foreseen(selected: Ids, uses: Floats, n_slots: int, machine: Machine, n_bytes: float) -> Counts:
    """Gives up what is used last (Belady), and uploads as many of a layer's missed experts as are best for it.

    An expert that is used again before the one in whose place it comes saves that use too. This is not the least
    possible time, but no cache here knows as much.
    """
    n_tokens, n_layer, n_used = selected.shape
    following, later = np.empty_like(selected), np.full(uses.shape, n_tokens, np.int64)
    layers = np.arange(n_layer)[:, None]
    for token in range(n_tokens - 1, -1, -1):
        following[token] = later[layers, selected[token]]
        later[layers, selected[token]] = token
    slots, counts = _Slots(uses, n_slots, later, n_used, machine, n_bytes), Counts.empty(n_tokens, n_layer)
    for token in range(n_tokens):
        for layer in range(n_layer):
            found = slots.step(layer, selected[token, layer], following[token, layer])
            counts.here[token, layer], counts.uploaded[token, layer] = found
    return counts


class _Slots:
    """The experts on the device; `later` [n_layer, n_expert] is the token that uses each expert next."""

    def __init__(self, uses: Floats, n_slots: int, later: Ids, n_used: int, machine: Machine, n_bytes: float) -> None:
        self._is_here, self._later = most_used(uses, n_slots), later
        self._seconds = {
            (n_here, n_uploaded, n_host): layer_seconds(machine, n_bytes, n_here, n_uploaded, n_host)
            for n_here, n_uploaded, n_host in np.ndindex((n_used + 1,) * 3)
            if n_here + n_uploaded + n_host == n_used
        }
        self._saved = machine.host_seconds(n_bytes) - machine.device_seconds(n_bytes)
        self._heap = [
            (-int(later[layer, expert]), layer, expert) for layer, expert in np.argwhere(self._is_here).tolist()
        ]
        heapify(self._heap)

    def step(self, layer: int, experts: Ids, following: Ids) -> tuple[int, int]:
        """How many of a layer's experts are here, and how many are uploaded; `following` are their next uses."""
        here = self._is_here[layer, experts]
        self._later[layer, experts] = following
        for expert in experts[here].tolist():
            self._enter((layer, expert))
        n_here, absent = int(here.sum()), experts[~here].tolist()
        absent.sort(key=lambda expert: int(self._later[layer, expert]))
        pairs = [((layer, expert), self._last_used(layer)) for expert in absent]
        n_pays = sum(bool(self._later[key] < self._later[victim]) for key, victim in pairs)
        # Seconds of the layer, without those of the uses that are saved later.
        n_absent = len(absent)
        seconds = [self._seconds[n_here, n, n_absent - n] - min(n, n_pays) * self._saved for n in range(n_absent + 1)]
        n_uploaded = seconds.index(min(seconds))
        for number, (key, victim) in enumerate(pairs):
            if number < min(n_uploaded, n_pays):
                self._is_here[victim], self._is_here[key] = False, True
                self._enter(key)
            else:
                self._enter(victim)
        return n_here, n_uploaded

    def _enter(self, key: Key) -> None:
        heappush(self._heap, (-int(self._later[key]), *key))

    def _last_used(self, layer: int) -> Key:
        """Takes out the resident that is used last, but for those of a layer."""
        aside, found = [], None
        while found is None:
            entry = heappop(self._heap)
            key = entry[1], entry[2]
            if not self._is_here[key] or self._later[key] != -entry[0]:
                continue
            if key[0] == layer:
                aside.append(entry)
            else:
                found = key
        for entry in aside:
            heappush(self._heap, entry)
        return found
