"""Which experts should change places between a device's slots and the host: decided after each step, at a price.

A cache that loads every miss moves more bytes than it saves unless an expert is used two or three times per load, which
models with few large experts do not reach. So the content of a tier changes rarely, and each change is accounted for.
The engine and the offline replay use the same classes, so that a recorded trace, replayed, moves what the engine did.
"""

import functools
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from heapq import heapify, heappop, heappush, heapreplace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from slimoe.offload.cache.policy import FUTURE_TOKENS, Policy
from slimoe.offload.cache.residency import Key


def swap_pays(
    gain_seconds_per_use: float, expected_uses_per_token: float, cost_seconds: float, horizon_tokens: float
) -> bool:
    """Whether the uses that are expected on the faster tier within the horizon earn back the cost of a move."""
    return gain_seconds_per_use * expected_uses_per_token * horizon_tokens > cost_seconds


@dataclass(frozen=True, slots=True)
class SwapRule:
    """Says which exchanges pay; at most `max_swaps` of each step are made, the most gainful first.

    `gain_seconds` is what one use costs less on the faster tier, `cost_seconds` what one move takes from other work.
    `margin`: the expected gain within `horizon_tokens` must exceed the cost by this factor, and the newcomer's value
    the victim's, so that two experts of about equal use do not take turns.
    """

    gain_seconds: float
    cost_seconds: float
    horizon_tokens: float = FUTURE_TOKENS
    margin: float = 1.3
    max_swaps: int = 2

    def pays(self, newcomer_uses: float, victim_uses: float, more_uses: float | None = None) -> bool:
        """Whether one exchange is worth it; uses are per token, `more_uses` those to come, by default as now."""
        if newcomer_uses <= self.margin * victim_uses:
            return False
        more_uses = newcomer_uses - victim_uses if more_uses is None else more_uses
        return swap_pays(self.gain_seconds, more_uses, self.margin * self.cost_seconds, self.horizon_tokens)


Swap = tuple[Key, Key]
"""Victim and newcomer."""


class Residents(Protocol):
    """The experts on a device."""

    def __iter__(self) -> Iterator[Key]:
        """All of them."""

    def __contains__(self, key: Key) -> bool:
        """Whether an expert is one of them."""


class _Kind:
    """The experts that fit each other's slots: residents with the lowest rank first, the others with the highest.

    Entries of residents may be too low, since ranks rise; what is used outside is entered again with its new rank.
    """

    def __init__(self, keys: NDArray[np.int64], ranks: NDArray[np.float64], is_inside: NDArray[np.bool_]) -> None:
        listed = list(zip(ranks.tolist(), *keys.T.tolist(), is_inside.tolist(), strict=True))
        # Of equals the one of the latest layer leaves, as in `residency`, and that of the first one comes.
        self.inside = [(rank, -layer, -expert) for rank, layer, expert, inside in listed if inside]
        self.outside = [(-rank, layer, expert) for rank, layer, expert, inside in listed if not inside]
        heapify(self.inside)
        heapify(self.outside)

    def put(self, key: Key, rank: float, *, inside: bool) -> None:
        """Enters an expert."""
        if inside:
            heappush(self.inside, (rank, -key[0], -key[1]))
        else:
            heappush(self.outside, (-rank, *key))

    def coldest(self, rank: Callable[[Key], float], is_there: Callable[[Key], bool]) -> Key | None:
        """The resident of the lowest rank, None if there is none."""
        while self.inside:
            entry = self.inside[0]
            key = -entry[1], -entry[2]
            if not is_there(key):
                heappop(self.inside)
            elif (now := rank(key)) != entry[0]:
                heapreplace(self.inside, (now, *entry[1:]))
            else:
                return key
        return None

    def hottest(self, rank: Callable[[Key], float], is_there: Callable[[Key], bool]) -> Key | None:
        """The expert of the highest rank that is not resident, None if there is none."""
        while self.outside:
            entry = self.outside[0]
            key = entry[1], entry[2]
            if not is_there(key) and rank(key) == -entry[0]:
                return key
            heappop(self.outside)
        return None


class SlotExchange:
    """Decides swaps by a policy's ranks, in time that grows with the missed experts that could come, not with all.

    Where values are uses per token, `rule` says which swaps earn their upload back. Policies that only rank take every
    expert in that was missed, as a cache does that loads what it misses. `kind_of` says which experts fit each other's
    slots, None of those that have none here.
    """

    def __init__(self, policy: Policy, rule: SwapRule, kind_of: Callable[[Key], Hashable | None]) -> None:
        self.policy, self.rule, self._kind_of = policy, rule, kind_of
        policy.foresee()
        self._kinds: dict[Hashable, _Kind] = {}
        self._n_falls: list[int] = []

    def choose(self, resident: Residents, missed: Iterable[Key], can_come: Callable[[Key], bool]) -> list[Swap]:
        """Swaps after a step: `missed` were used and not `resident`; `can_come` says whose bytes can be had now."""
        must_sort = self._n_falls != self.policy.n_falls
        if must_sort:
            self._sort(resident)
            self._n_falls = list(self.policy.n_falls)
        used = self._able_to_come(missed, resident)
        if self.policy.in_uses_per_token:
            for key in () if must_sort else used:
                self._kinds[self._kind_of(key)].put(key, self.policy.rank(key), inside=False)
            return self._paying(resident, can_come)
        swaps: list[Swap] = []
        gone, come = set[Key](), set[Key]()
        for key in used:
            if not can_come(key):
                continue
            kind = self._kinds[self._kind_of(key)]
            victim = kind.coldest(self.policy.rank, lambda key: key in come or (key in resident and key not in gone))
            if victim is not None and self.policy.rank(victim) < self.policy.rank(key):
                swaps.append((victim, key))
                gone.add(victim)
                come.add(key)
                come.discard(victim)
                self._enter([(victim, key)])
        return swaps

    def _able_to_come(self, missed: Iterable[Key], resident: Residents) -> list[Key]:
        """Those that rank high enough to drive out the lowest resident of their kind.

        As a rank falls only before all are sorted anew, the others need not be looked at until they are used again.
        """
        keys = np.array(list(dict.fromkeys(missed)), np.int64).reshape(-1, 2)
        layers, experts = keys.T
        rank, margin = self.policy.rank, max(1.0, self.rule.margin) if self.policy.in_uses_per_token else 1.0
        lowest = [kind.coldest(rank, resident.__contains__) for kind in self._kinds.values()]
        # The last one is for experts without slots here.
        limits = np.array([*(np.inf if key is None else margin * rank(key) for key in lowest), np.inf])
        is_able = self.policy.ranks[layers, experts] > limits[self._numbers[layers, experts]]
        return [(layer, expert) for layer, expert in keys[is_able].tolist() if (layer, expert) not in resident]

    def _paying(self, resident: Residents, can_come: Callable[[Key], bool]) -> list[Swap]:
        policy, swaps, waiting, moved = self.policy, list[Swap](), list[Key](), set[Key]()
        for kind in self._kinds.values():
            for _ in range(self.rule.max_swaps):
                victim = kind.coldest(policy.rank, lambda key: key in resident and key not in moved)
                newcomer = self._newcomer(kind, victim, lambda key: key in resident or key in moved, can_come, waiting)
                if victim is None or newcomer is None:
                    break
                moved.update((victim, newcomer))
                swaps.append((victim, newcomer))
        for key in waiting:
            self._kinds[self._kind_of(key)].put(key, policy.rank(key), inside=False)
        swaps.sort(key=lambda swap: policy.rank(swap[0]) - policy.rank(swap[1]))
        self._enter(swaps[: self.rule.max_swaps])
        self._enter([(newcomer, victim) for victim, newcomer in swaps[self.rule.max_swaps :]])
        return swaps[: self.rule.max_swaps]

    def _newcomer(
        self,
        kind: _Kind,
        victim: Key | None,
        is_there: Callable[[Key], bool],
        can_come: Callable[[Key], bool],
        waiting: list[Key],
    ) -> Key | None:
        """Takes the best expert that pays in a victim's place out of `kind`; those that cannot come go to `waiting`."""
        policy = self.policy
        while victim is not None:
            key = kind.hottest(policy.rank, is_there)
            if key is None:
                break
            values = policy.value(key), policy.value(victim)
            if values[0] <= self.rule.margin * values[1]:
                break
            comes = can_come(key)
            if comes and not self.rule.pays(*values, policy.expected(key) - policy.expected(victim)):
                break
            heappop(kind.outside)
            if comes:
                return key
            waiting.append(key)
        return None

    def _enter(self, swaps: Iterable[Swap]) -> None:
        """Enters experts on the side where they are after swaps."""
        for victim, newcomer in swaps:
            kind = self._kinds[self._kind_of(newcomer)]
            kind.put(victim, self.policy.rank(victim), inside=False)
            kind.put(newcomer, self.policy.rank(newcomer), inside=True)

    def _sort(self, resident: Residents) -> None:
        """Sorts all experts anew."""
        ranks = self.policy.ranks
        is_inside = np.zeros(ranks.shape, np.bool_)
        for key in resident:
            is_inside[key] = True
        self._kinds = {kind: _Kind(keys, ranks[tuple(keys.T)], is_inside[tuple(keys.T)]) for kind, keys in self._keys}

    @functools.cached_property
    def _numbers(self) -> NDArray[np.int64]:
        """Which of the kinds each expert is of, [n_layer, n_expert], -1 of those without."""
        numbers = np.full(self.policy.ranks.shape, -1, np.int64)
        for number, (_, keys) in enumerate(self._keys):
            numbers[tuple(keys.T)] = number
        return numbers

    @functools.cached_property
    def _keys(self) -> list[tuple[Hashable, NDArray[np.int64]]]:
        """The experts of each kind, [n, 2]."""
        keys: dict[Hashable, list[Key]] = {}
        for layer, expert in np.ndindex(self.policy.ranks.shape):
            kind = self._kind_of((layer, expert))
            if kind is not None:
                keys.setdefault(kind, []).append((layer, expert))
        return [(kind, np.array(own, np.int64)) for kind, own in keys.items()]
