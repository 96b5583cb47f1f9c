"""Chooses one option for every part of a model under one budget of bytes, so that the sum of their costs is least.

This is a multiple-choice knapsack. At a price per byte every part chooses for itself; the price is found by bisection,
which is optimal for the bytes that it happens to spend (Everett, 1963). What is left is spent on the best single
changes, and on pairs of changes that free bytes for a better one. Parts of a group can be given up together, at a cost
of the group's own: a layer, say, in place of what would be kept of its experts.
"""

import heapq
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slimoe.offload.errors import DoesNotFitError

_STEPS = 200
_ROUNDS = 8


@dataclass(frozen=True, slots=True)
class Option:
    """One thing that can be done with a part: its name for the caller, the bytes it leaves, the rise in KL."""

    choice: Hashable
    n_bytes: int
    cost: float


@dataclass(frozen=True, slots=True)
class Part:
    """Something to choose an option for; `group` names what it goes with when that is given up."""

    name: Hashable
    options: tuple[Option, ...]
    group: Hashable = None


@dataclass(frozen=True, slots=True)
class Allocation:
    """What was chosen: an option by part, without the parts of groups that are `given_up`."""

    chosen: Mapping[Hashable, Option]
    given_up: frozenset[Hashable] = frozenset()
    cost_of_groups: float = 0.0

    @property
    def n_bytes(self) -> int:
        """Bytes of all parts that are left."""
        return sum(option.n_bytes for option in self.chosen.values())

    @property
    def cost(self) -> float:
        """The sum of all costs."""
        return self.cost_of_groups + sum(option.cost for option in self.chosen.values())


@dataclass(frozen=True, slots=True)
class Group:
    """Parts that can be given up together, which saves all their bytes and `n_bytes` besides, at this cost."""

    name: Hashable
    cost: float
    n_bytes: int = 0


@dataclass(slots=True, eq=False)
class _State:
    """The options of all parts [n_part, n_option], those of fewer bytes first, and each part's own, -1 if given up.

    Parts of fewer options have infinity for the others.
    """

    n_bytes: NDArray[np.float64]
    costs: NDArray[np.float64]
    chosen: NDArray[np.int64]

    def spent(self) -> float:
        kept = np.flatnonzero(self.chosen >= 0)
        return float(self.n_bytes[kept, self.chosen[kept]].sum())


class _Knapsack:
    """Parts and groups as arrays, which choose for themselves at a price per byte."""

    def __init__(self, parts: Sequence[Part], groups: Sequence[Group]) -> None:
        self.orders = [_by_size(part.options) for part in parts]
        shape = len(parts), max((len(order) for order in self.orders), default=0)
        self.n_bytes, self.costs = np.full((2, *shape), np.inf)
        for row, (part, order) in enumerate(zip(parts, self.orders, strict=True)):
            self.n_bytes[row, : len(order)] = [part.options[i].n_bytes for i in order]
            self.costs[row, : len(order)] = [part.options[i].cost for i in order]
        numbers = {group.name: number for number, group in enumerate(groups)}
        self._group_of = np.array([numbers.get(part.group, len(groups)) for part in parts], np.int64)
        self._group_cost = np.array([group.cost for group in groups])
        self._group_bytes = np.array([group.n_bytes for group in groups], np.float64)
        self._groups = groups

    def spend(self, price: float) -> tuple[_State, float, list[Group]]:
        """What every part chooses at a price per byte, the bytes that this takes, and the groups not worth theirs."""
        values = self.costs + price * self.n_bytes
        chosen = values.argmin(1)
        best = values[np.arange(len(chosen)), chosen]
        of_groups = np.bincount(self._group_of, best, len(self._groups) + 1)[:-1]
        is_gone = self._group_cost < of_groups + price * self._group_bytes
        chosen = np.where(np.append(is_gone, False)[self._group_of], -1, chosen)
        state = _State(self.n_bytes, self.costs, chosen)
        gone = [group for group, goes in zip(self._groups, is_gone, strict=True) if goes]
        return state, state.spent() - sum(group.n_bytes for group in gone), gone


def _by_size(options: Sequence[Option]) -> list[int]:
    """The numbers of options, those of fewest bytes first."""
    return sorted(range(len(options)), key=lambda number: (options[number].n_bytes, options[number].cost))


def allocate(parts: Sequence[Part], budget: int, groups: Sequence[Group] = ()) -> Allocation:
    """The best choice found of `budget` bytes; never more than these.

    Raises DoesNotFitError, which says the least that is possible.
    """
    least = least_bytes(parts, groups)
    if least > budget:
        message = f"The smallest that this can become is {least:,} bytes, but the budget leaves {budget:,} for it."
        raise DoesNotFitError(message, required_bytes=least, available_bytes=budget)
    knapsack, low, high = _Knapsack(parts, groups), 0.0, 1.0
    while knapsack.spend(high)[1] > budget:
        low, high = high, high * 1e3
    for _ in range(_STEPS):
        price = (low * high) ** 0.5 if low else high * 1e-3
        if knapsack.spend(price)[1] > budget:
            low = price
        else:
            high = price
        if (low and high / low < 1 + 1e-9) or high < 1e-300:
            break
    state, _, gone = knapsack.spend(high)
    saved = sum(group.n_bytes for group in gone)
    for _ in range(_ROUNDS):
        if not _improve(state, budget + saved):
            break
    numbers = zip(parts, knapsack.orders, state.chosen.tolist(), strict=True)
    chosen = {part.name: part.options[order[number]] for part, order, number in numbers if number >= 0}
    return Allocation(chosen, frozenset(group.name for group in gone), sum(group.cost for group in gone))


def least_bytes(parts: Sequence[Part], groups: Sequence[Group] = ()) -> int:
    """What the parts have at least."""
    can_go = {group.name for group in groups}
    return sum(min(option.n_bytes for option in part.options) for part in parts if part.group not in can_go)


def _improve(state: _State, budget: float) -> bool:
    """Spends what is left, first on the changes that lower the cost most per byte; whether anything changed."""
    changed = False
    spare = budget - state.spent()
    queue = [(-rate, part, option) for part, option, rate in _upgrades(state, range(len(state.chosen)), spare)]
    heapq.heapify(queue)
    while queue:
        _, part, option = heapq.heappop(queue)
        now = state.chosen[part]
        extra = state.n_bytes[part, option] - state.n_bytes[part, now]
        if extra > spare or state.costs[part, option] >= state.costs[part, now]:
            continue
        state.chosen[part], spare, changed = option, spare - extra, True
        for _, other, rate in _upgrades(state, [part], spare):
            heapq.heappush(queue, (-rate, part, other))
    return _exchange(state, spare) or changed


def _upgrades(state: _State, parts: Sequence[int] | range, spare: float) -> Iterator[tuple[int, int, float]]:
    """(part, option, fall in cost per byte) of all changes for the better that fit."""
    for part in parts:
        now = state.chosen[part]
        if now < 0:
            continue
        gain = state.costs[part, now] - state.costs[part]
        extra = state.n_bytes[part] - state.n_bytes[part, now]
        for option in np.flatnonzero((gain > 0) & (extra <= spare)):
            yield part, int(option), float(gain[option] / max(extra[option], 1.0))


def _exchange(state: _State, spare: float) -> bool:
    """The best pair of one part's step down and another's step up that fits; whether there was one that helps."""
    kept = np.flatnonzero(state.chosen >= 0)
    now = state.chosen[kept]
    extra = state.n_bytes[kept] - state.n_bytes[kept, now][:, None]
    rise = state.costs[kept] - state.costs[kept, now][:, None]
    down, up = np.nonzero(extra < 0), np.nonzero((extra > spare) & (rise < 0) & np.isfinite(extra))
    if not len(down[0]) or not len(up[0]):
        return False
    # Steps down that free the most come first, and beside each is the cheapest so far, and that of another part.
    order = np.argsort(extra[down], kind="stable")
    down = down[0][order], down[1][order]
    first, second = _cheapest_so_far(down[0], rise[down])
    n_enough = np.searchsorted(extra[down], spare - extra[up], side="right")
    candidates = np.where(n_enough > 0, first[n_enough - 1], -1)
    is_own = (candidates >= 0) & (down[0][candidates] == up[0])
    candidates = np.where(is_own, second[n_enough - 1], candidates)
    gains = np.where(candidates >= 0, -rise[up] - rise[down][candidates], -np.inf)
    best = int(np.argmax(gains))
    if gains[best] <= 1e-15:
        return False
    step = candidates[best]
    state.chosen[kept[down[0][step]]] = down[1][step]
    state.chosen[kept[up[0][best]]] = up[1][best]
    return True


def _cheapest_so_far(
    owners: NDArray[np.int64], costs: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The numbers of the cheapest step up to each step, and of the cheapest of another owner; -1 if there is none."""
    first, second = np.full((2, len(costs)), -1)
    best = other = -1
    for number, (owner, cost) in enumerate(zip(owners.tolist(), costs.tolist(), strict=True)):
        if best < 0 or cost < costs[best]:
            best, other = number, best if best >= 0 and owners[best] != owner else other
        elif owner != owners[best] and (other < 0 or cost < costs[other]):
            other = number
        first[number], second[number] = best, other
    return first, second
