"""Which experts should change places between a device's slots and the host: decided after each step, at a price.

The engine and the offline replay use this same class, so that a recorded trace, replayed, moves what the engine did.
"""

from collections.abc import Callable, Collection, Iterable

import numpy as np

from offload.policy import Policy
from offload.residency import Key
from offload.swap_rule import SwapRule

Swap = tuple[Key, Key]
"""Victim and newcomer."""


class SlotExchange:
    """Decides swaps by a policy's values.

    Where these are uses per token, `rule` says which swaps earn their upload back. Policies that only rank take every
    expert in that was missed, as a cache does that loads what it misses.
    """

    def __init__(self, policy: Policy, rule: SwapRule, are_alike: Callable[[Key, Key], bool]) -> None:
        self._policy, self.rule, self._are_alike = policy, rule, are_alike

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
        hottest = values.copy()
        hottest[is_resident] = -np.inf
        if not resident or not self.rule.pays(float(hottest.max()), float(values[is_resident].min())):
            return []  # nearly always, and much cheaper than to ask for everyone
        can_move = is_resident.copy()
        for layer, expert in zip(*np.nonzero(~is_resident), strict=True):
            can_move[layer, expert] = can_come((int(layer), int(expert)))
        return [swap for swap in self.rule.choose(values, is_resident, can_move) if self._are_alike(*swap)]

    def _inserted(self, resident: list[Key], missed: Iterable[Key], can_come: Callable[[Key], bool]) -> list[Swap]:
        values, swaps = self._policy.values, []
        for key in dict.fromkeys(missed):
            alike = [other for other in resident if self._are_alike(other, key)]
            if not alike or not can_come(key):
                continue
            # Of equals the one of the latest layer leaves, as in `residency`.
            victim = min(alike, key=lambda other: (values[other], -other[0], -other[1]))
            if values[victim] < values[key]:
                swaps.append((victim, key))
                resident[resident.index(victim)] = key
        return swaps
