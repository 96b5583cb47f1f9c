"""Runs a trace through a cache: what is found, what is missed, what is moved, and what that costs.

The decisions are the engine's own (`residency.SlotCache`, `swap.SlotExchange`), asked in the order in which it
asks them. What the engine predicted is in its traces and takes slots here as it did there; only how fast the disk was
is not. A device is taken to be the only one, and every expert that it lacks to be in memory.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bench.traces.candidate import Candidate, Online
from bench.traces.demand import Demand, Visit
from slimoe.offload.cache.host_pool import n_read_ahead
from slimoe.offload.cache.residency import Key, SlotCache, most_valuable
from slimoe.offload.cache.router_trace import TraceHeader
from slimoe.offload.cache.swap import SlotExchange, SwapRule


@dataclass(slots=True)
class Tally:
    """Visits to experts, each counted once per step and layer, and bytes moved for them.

    `pending` are those of the misses that had been predicted; what was predicted in vain is in `moved_bytes` as well.
    """

    n_tokens: int = 0
    hits: int = 0
    misses: int = 0
    pending: int = 0
    hit_bytes: int = 0
    miss_bytes: int = 0
    moved_bytes: int = 0

    @property
    def hit_share(self) -> float:
        """Share of the visits that found the expert; 0 without visits."""
        return self.hits / max(1, self.hits + self.misses)


@dataclass(frozen=True, slots=True)
class Tier:
    """Fast memory. Rates are bytes per second: of moving experts in, and of multiplying with hits and with misses.

    `computes_misses`: a missed expert is multiplied where it lies and moved in after the step, if at all; otherwise
    each miss is moved in first.
    """

    move_rate: float
    hit_rate: float
    miss_rate: float
    computes_misses: bool

    def seconds(self, tally: Tally) -> tuple[float, float]:
        """The seconds of moving experts in, and of multiplying with experts, if nothing overlaps."""
        return tally.moved_bytes / self.move_rate, tally.hit_bytes / self.hit_rate + tally.miss_bytes / self.miss_rate

    def swap_rule(self, n_bytes: int) -> SwapRule:
        """The rule that says which swaps pay for experts of `n_bytes`."""
        return SwapRule(n_bytes / self.miss_rate - n_bytes / self.hit_rate, n_bytes / self.move_rate)


def experts_by_size(header: TraceHeader) -> Counter[int]:
    """How many experts there are of each size in bytes."""
    return Counter(n_bytes for layer in header.expert_bytes for n_bytes in layer)


def pool_sizes(header: TraceHeader, n_slots: int) -> dict[int, int]:
    """The slots of each pool, by its experts' bytes: each size has a pool, which holds about the same part of them."""
    experts = experts_by_size(header)
    total = experts.total()
    ends = np.cumsum(list(experts.values())) * min(n_slots, total) // total
    return dict(zip(experts, np.diff(ends, prepend=0).tolist(), strict=True))


def pools_within(header: TraceHeader, n_bytes: int) -> dict[int, int]:
    """The slots of each pool, by its experts' bytes, that fit into `n_bytes` of memory in all."""
    experts = experts_by_size(header)
    total = sum(size * n for size, n in experts.items())
    return {size: n * min(n_bytes, total) // total for size, n in experts.items()}


class CacheReplay:
    """One candidate's pools. They start full of what it values most, which costs nothing.

    `rule` says which swaps pay, by default those that do with experts of the largest size at the tier's rates.
    """

    def __init__(
        self,
        header: TraceHeader,
        slots: Mapping[int, int],
        candidate: Candidate,
        tier: Tier,
        rule: SwapRule | None = None,
    ) -> None:
        self._bytes, self._candidate, self._tier = header.expert_bytes, candidate, tier
        self._pools = {n_bytes: SlotCache(n, candidate) for n_bytes, n in slots.items() if n}
        for n_bytes, cache in self._pools.items():
            keys = (
                (layer, expert)
                for layer, sizes in enumerate(self._bytes)
                for expert, size in enumerate(sizes)
                if size == n_bytes
            )
            for key in most_valuable(candidate.values, keys, cache.n_slots):
                cache.acquire(key)
        n_experts = experts_by_size(header)
        tight = [n for n_bytes, n in slots.items() if 0 < n < n_experts[n_bytes]]
        self._n_free_to_pin = max(1, min(tight, default=sum(slots.values())))
        self._missed: list[Key] = []
        self._predicted: set[Key] = set()
        self._read_ahead: set[Key] = set()
        self._exchange = None
        if tier.computes_misses and isinstance(candidate, Online):
            rule = rule or tier.swap_rule(max(slots, default=0))
            self._exchange = SlotExchange(candidate.policy, rule, self._kind_of)

    def run(self, steps: Sequence[Demand]) -> dict[str, Tally]:
        """Tallies of the steps of `prompt` and `answer`."""
        tallies = {"prompt": Tally(), "answer": Tally()}
        for step in steps:
            tally = tallies["answer" if step.is_answer else "prompt"]
            tally.n_tokens += step.n_tokens
            self._predict(set())
            for visit in step.visits:
                self._candidate.observe(visit)
                self._serve(visit, tally)
            if self._exchange is not None and step.has_answer:
                for victim, newcomer in self._exchange.choose(self, self._missed, lambda key: True):
                    pool = self._pool(victim)
                    assert pool is not None
                    pool.free(victim)
                    pool.acquire(newcomer)
                    tally.moved_bytes += self._n_bytes([newcomer])
                self._missed.clear()
            self._candidate.end_step(step)
        return tallies

    def check(self) -> None:
        """Asserts that the pools are sound."""
        for cache in self._pools.values():
            cache.check()

    def _serve(self, visit: Visit, tally: Tally) -> None:
        here = [key for key in visit.keys if key in self]
        absent = [key for key in visit.keys if key not in self]
        n_pending = sum(key in self._read_ahead for key in here)
        tally.hits += len(here) - n_pending
        tally.misses += len(absent) + n_pending
        tally.pending += n_pending
        tally.hit_bytes += self._n_bytes(here)
        tally.miss_bytes += self._n_bytes(absent)
        if not self._tier.computes_misses:
            tally.moved_bytes += self._n_bytes(absent)
        if self._candidate.is_choosy:
            self._load_if_worth(absent, tally)
        elif self._tier.computes_misses:
            self._missed += absent if visit.is_answer.all() else []
        elif len(visit.selected) == 1:
            self._load_single(visit, absent, tally)
        else:  # those that are here together, others read meanwhile, then one by one; what is done may leave
            queue, n_begun = here + absent, len(here)
            n_ahead = n_read_ahead(max((self._n_bytes([key]) for key in absent), default=1))
            for at in (*range(min(1, len(here))), *range(len(here), len(queue))):
                end = min(max(at + 1, len(here)) + n_ahead, at + self._n_free_to_pin)
                self._load(queue[n_begun:end], set(queue[at:end]))
                n_begun = max(n_begun, min(end, len(queue)))
        self._read_ahead.difference_update(visit.keys)

    def _kind_of(self, key: Key) -> int | None:
        layer, expert = key
        n_bytes = self._bytes[layer][expert] if expert < len(self._bytes[layer]) else 0
        return n_bytes if n_bytes in self._pools else None

    def __iter__(self) -> Iterator[Key]:
        return (key for cache in self._pools.values() for key in cache)

    def __contains__(self, key: Key) -> bool:
        cache = self._pool(key)
        return cache is not None and key in cache

    def _pool(self, key: Key) -> SlotCache | None:
        return self._pools.get(self._bytes[key[0]][key[1]])

    def _n_bytes(self, keys: Iterable[Key]) -> int:
        return sum(self._bytes[layer][expert] for layer, expert in keys)

    def _load_if_worth(self, keys: Sequence[Key], tally: Tally) -> None:
        for key in keys:
            cache = self._pool(key)
            if cache is None:
                continue
            victim = cache.victim()
            if victim is None or cache.value(victim) < cache.value(key):
                cache.acquire(key)
                if self._tier.computes_misses:
                    tally.moved_bytes += self._n_bytes([key])

    def _load(self, keys: Sequence[Key], needed: set[Key]) -> None:
        """Loads all that have a pool, over what is predicted if need be.

        In a pool too small for one step, the step's own experts take turns.
        """
        for key in keys:
            cache = self._pool(key)
            if cache is not None:
                levels = (needed | self._predicted, needed, set[Key]())
                any(self._acquire(cache, key, pinned) for pinned in levels)

    def _acquire(self, cache: SlotCache, key: Key, pinned: set[Key]) -> bool:
        """Whether the expert got a slot."""
        taken = cache.try_acquire(key, pinned)
        if taken is not None and taken[1] is not None:
            self._read_ahead.discard(taken[1])
        return taken is not None

    def _load_single(self, visit: Visit, absent: list[Key], tally: Tally) -> None:
        """One token's misses, and then what is predicted for its later layers, as long as there are slots to spare."""
        self._predict({key for key in self._predicted if key[0] != visit.layer})
        self._load(absent, set(visit.keys))
        self._predict(set(visit.predicted))
        pinned = self._predicted.union(visit.keys)
        for key in visit.predicted:
            cache = self._pool(key)
            if cache is not None and key not in cache and self._acquire(cache, key, pinned):
                self._read_ahead.add(key)
                tally.moved_bytes += self._n_bytes([key])

    def _predict(self, keys: set[Key]) -> None:
        """Takes back what is no longer predicted: should it be used one day, it was there before."""
        self._read_ahead -= self._predicted - keys
        self._predicted = keys
