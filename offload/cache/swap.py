"""Which experts should change places between a device's slots and the host: decided after each step, at a price.

A cache that loads every miss moves more bytes than it saves unless an expert is used two or three times per load, which
models with few large experts do not reach. So the content of a tier changes rarely, and each change is accounted for.
The engine and the offline replay use the same classes, so that a recorded trace, replayed, moves what the engine did.
"""

import functools
from collections.abc import Callable, Collection, Hashable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slimoe.offload.cache.policy import Policy, Values
from slimoe.offload.cache.residency import Key


def swap_pays(
    gain_seconds_per_use: float, expected_uses_per_token: float, cost_seconds: float, horizon_tokens: float
) -> bool:
    """Whether the uses that are expected on the faster tier within the horizon earn back the cost of a move."""
    return gain_seconds_per_use * expected_uses_per_token * horizon_tokens > cost_seconds


@dataclass(frozen=True, slots=True)
class SwapRule:
    """Chooses at most `max_swaps` exchanges per step.

    `gain_seconds` is what one use costs less on the faster tier, `cost_seconds` what one move takes from other work.
    `margin`: the expected gain within `horizon_tokens` must exceed the cost by this factor, and the newcomer's value
    the victim's, so that two experts of about equal use do not take turns.
    """

    gain_seconds: float
    cost_seconds: float
    horizon_tokens: float = 256.0
    margin: float = 1.3
    max_swaps: int = 2

    def pays(self, newcomer_uses: float, victim_uses: float) -> bool:
        """Whether one exchange is worth it; uses are expected uses per token."""
        if newcomer_uses <= self.margin * victim_uses:
            return False
        more_uses = newcomer_uses - victim_uses
        return swap_pays(self.gain_seconds, more_uses, self.margin * self.cost_seconds, self.horizon_tokens)

    def choose(self, values: Values, resident: NDArray[np.bool_], movable: NDArray[np.bool_]) -> list[tuple[Key, Key]]:
        """Pairs (victim, newcomer), the most gainful first.

        All arrays are [n_layer, n_expert]: a policy's values in uses per token, what is on the tier, and what may be
        moved now: a victim that is not in use, a newcomer whose copy fits the slots and can be had.
        """
        n_expert = values.shape[1]
        leaving = np.where(resident & movable, values, np.inf).ravel()[::-1]
        coming = np.where(~resident & movable, values, -np.inf).ravel()
        swaps: list[tuple[Key, Key]] = []
        while len(swaps) < self.max_swaps:
            victim, newcomer = int(leaving.argmin()), int(coming.argmax())  # ties: the last leaves, the first comes
            if not self.pays(float(coming[newcomer]), float(leaving[victim])):
                break
            swaps.append((divmod(leaving.size - 1 - victim, n_expert), divmod(newcomer, n_expert)))
            leaving[victim], coming[newcomer] = np.inf, -np.inf
        return swaps


Swap = tuple[Key, Key]
"""Victim and newcomer."""


class SlotExchange:
    """Decides swaps by a policy's values.

    Where these are uses per token, `rule` says which swaps earn their upload back. Policies that only rank take every
    expert in that was missed, as a cache does that loads what it misses. `kind_of` says which experts fit each other's
    slots, None of those that have none here.
    """

    def __init__(self, policy: Policy, rule: SwapRule, kind_of: Callable[[Key], Hashable | None]) -> None:
        self._policy, self.rule, self._kind_of = policy, rule, kind_of

    def choose(self, resident: Collection[Key], missed: Iterable[Key], can_come: Callable[[Key], bool]) -> list[Swap]:
        """Swaps after a step: `missed` were used and not `resident`; `can_come` says whose bytes can be had now."""
        if self._policy.in_uses_per_token:
            return self._paying(resident, can_come)
        values, swaps, there = self._policy.values, [], list(resident)
        for key in dict.fromkeys(missed):
            kind = self._kind_of(key)
            alike = [] if kind is None else [other for other in there if self._kind_of(other) == kind]
            if not alike or not can_come(key):
                continue
            # Of equals the one of the latest layer leaves, as in `residency`.
            victim = min(alike, key=lambda other: (values[other], -other[0], -other[1]))
            if values[victim] < values[key]:
                swaps.append((victim, key))
                there[there.index(victim)] = key
        return swaps

    def _paying(self, resident: Collection[Key], can_come: Callable[[Key], bool]) -> list[Swap]:
        values = self._policy.values
        is_resident = np.zeros(values.shape, np.bool_)
        for key in resident:
            is_resident[key] = True
        swaps: list[Swap] = []
        for alike in self._kinds.values():
            movable, outside = alike & is_resident, alike & ~is_resident
            coldest = float(values.min(where=movable, initial=np.inf))
            if not self.rule.pays(float(values.max(where=outside, initial=-np.inf)), coldest):
                continue  # nearly always, and much cheaper than to ask for everyone
            for layer, expert in np.argwhere(outside & (values > coldest)).tolist():
                movable[layer, expert] = can_come((layer, expert))
            swaps += self.rule.choose(values, is_resident, movable)
        swaps.sort(key=lambda swap: values[swap[0]] - values[swap[1]])
        return swaps[: self.rule.max_swaps]

    @functools.cached_property
    def _kinds(self) -> dict[Hashable, NDArray[np.bool_]]:
        """Which experts fit each other's slots: masks [n_layer, n_expert] by kind."""
        shape = self._policy.values.shape
        masks: dict[Hashable, NDArray[np.bool_]] = {}
        for key in np.ndindex(shape):
            kind = self._kind_of((key[0], key[1]))
            if kind is not None:
                masks.setdefault(kind, np.zeros(shape, np.bool_))[key] = True
        return masks
