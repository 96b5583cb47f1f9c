"""Which experts should change places between a device's slots and the host: decided after each step, at a price.

The engine and the offline replay use this same class, so that a recorded trace, replayed, moves what the engine did.
"""

import functools
from collections.abc import Callable, Collection, Hashable, Iterable

import numpy as np
from numpy.typing import NDArray

from slimoe.offload.cache.policy import Policy
from slimoe.offload.cache.residency import Key
from slimoe.offload.cache.swap_rule import SwapRule

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
        return self._inserted(list(resident), missed, can_come)

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
        """Who fits each other's slots: masks [n_layer, n_expert] by kind."""
        shape = self._policy.values.shape
        masks: dict[Hashable, NDArray[np.bool_]] = {}
        for key in np.ndindex(shape):
            kind = self._kind_of((key[0], key[1]))
            if kind is not None:
                masks.setdefault(kind, np.zeros(shape, np.bool_))[key] = True
        return masks

    def _inserted(self, resident: list[Key], missed: Iterable[Key], can_come: Callable[[Key], bool]) -> list[Swap]:
        values, swaps = self._policy.values, []
        for key in dict.fromkeys(missed):
            kind = self._kind_of(key)
            alike = [] if kind is None else [other for other in resident if self._kind_of(other) == kind]
            if not alike or not can_come(key):
                continue
            # Of equals the one of the latest layer leaves, as in `residency`.
            victim = min(alike, key=lambda other: (values[other], -other[0], -other[1]))
            if values[victim] < values[key]:
                swaps.append((victim, key))
                resident[resident.index(victim)] = key
        return swaps
