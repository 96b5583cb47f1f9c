"""Chooses one option for every part of a model under one budget of bytes, so that the sum of their costs is least.

This is a multiple-choice knapsack. At a price per byte every part chooses for itself; the price is found by bisection,
which is optimal for the bytes that it happens to spend (Everett, 1963). What is left is spent on the best single
changes, and on pairs of changes that free bytes for a better one. Parts of a group can be given up together, at a cost
of the group's own: a layer, say, in place of what would be kept of its experts.
"""

import heapq
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

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


@dataclass(slots=True)
class _State:
    """Arrays of the parts' options, and the option of each part, -1 where it is given up."""

    n_bytes: list[NDArray[np.float64]]
    costs: list[NDArray[np.float64]]
    chosen: list[int] = field(default_factory=list)

    def spent(self) -> float:
        return float(sum(b[i] for b, i in zip(self.n_bytes, self.chosen, strict=True) if i >= 0))


def allocate(parts: Sequence[Part], budget: int, groups: Sequence[Group] = ()) -> Allocation:
    """The best choice found of `budget` bytes; never more than these.

    Raises DoesNotFitError, which says the least that is possible.
    """
    least = least_bytes(parts, groups)
    if least > budget:
        message = f"The smallest that this can become is {least:,} bytes, but the budget leaves {budget:,} for it."
        raise DoesNotFitError(message, required_bytes=least, available_bytes=budget)
    low, high = 0.0, 1.0
    while _spend(parts, groups, high)[1] > budget:
        low, high = high, high * 1e3
    for _ in range(_STEPS):
        price = (low * high) ** 0.5 if low else high * 1e-3
        if _spend(parts, groups, price)[1] > budget:
            low = price
        else:
            high = price
        if (low and high / low < 1 + 1e-9) or high < 1e-300:
            break
    state, _, gone = _spend(parts, groups, high)
    saved = sum(group.n_bytes for group in gone)
    for _ in range(_ROUNDS):
        if not _improve(state, budget + saved):
            break
    chosen = {part.name: part.options[i] for part, i in zip(parts, state.chosen, strict=True) if i >= 0}
    return Allocation(chosen, frozenset(group.name for group in gone), sum(group.cost for group in gone))


def least_bytes(parts: Sequence[Part], groups: Sequence[Group] = ()) -> int:
    """What the parts have at least."""
    can_go = {group.name for group in groups}
    return sum(min(option.n_bytes for option in part.options) for part in parts if part.group not in can_go)


def _spend(parts: Sequence[Part], groups: Sequence[Group], price: float) -> tuple[_State, float, list[Group]]:
    """What every part chooses at a price per byte, the bytes that this takes, and the groups not worth theirs."""
    n_bytes = [np.array([option.n_bytes for option in part.options], np.float64) for part in parts]
    costs = [np.array([option.cost for option in part.options], np.float64) for part in parts]
    values = [c + price * b for c, b in zip(costs, n_bytes, strict=True)]
    chosen = [int(np.lexsort((b, v))[0]) for v, b in zip(values, n_bytes, strict=True)]
    gone = []
    for group in groups:
        members = [index for index, part in enumerate(parts) if part.group == group.name]
        if group.cost < sum(values[index][chosen[index]] for index in members) + price * group.n_bytes:
            gone.append(group)
            for index in members:
                chosen[index] = -1
    state = _State(n_bytes, costs, chosen)
    return state, state.spent() - sum(group.n_bytes for group in gone), gone


def _improve(state: _State, budget: float) -> bool:
    """Spends what is left, first on the changes that lower the cost most per byte; whether anything changed."""
    changed = False
    spare = budget - state.spent()
    queue = [(-rate, part, option) for part, option, rate in _upgrades(state, range(len(state.chosen)))]
    heapq.heapify(queue)
    while queue:
        _, part, option = heapq.heappop(queue)
        now = state.chosen[part]
        extra = state.n_bytes[part][option] - state.n_bytes[part][now]
        if extra > spare or state.costs[part][option] >= state.costs[part][now]:
            continue
        state.chosen[part], spare, changed = option, spare - extra, True
        for _, other, rate in _upgrades(state, [part]):
            heapq.heappush(queue, (-rate, part, other))
    return _exchange(state, spare) or changed


def _upgrades(state: _State, parts: Sequence[int] | range) -> Iterator[tuple[int, int, float]]:
    """(part, option, fall in cost per byte) of all changes for the better."""
    for part in parts:
        now = state.chosen[part]
        if now < 0:
            continue
        gain = state.costs[part][now] - state.costs[part]
        extra = np.maximum(state.n_bytes[part] - state.n_bytes[part][now], 1.0)
        for option in np.flatnonzero(gain > 0):
            yield part, int(option), float(gain[option] / extra[option])


def _exchange(state: _State, spare: float) -> bool:
    """The best pair of one part's step down and another's step up that fits; whether there was one that helps."""
    down, up = [], []
    for part, now in enumerate(state.chosen):
        if now < 0:
            continue
        extra = state.n_bytes[part] - state.n_bytes[part][now]
        rise = state.costs[part] - state.costs[part][now]
        down += [(-extra[o], rise[o], part, int(o)) for o in np.flatnonzero(extra < 0)]
        up += [(extra[o], -rise[o], part, int(o)) for o in np.flatnonzero((extra > spare) & (rise < 0))]
    if not down or not up:
        return False
    freed, rise = (np.array([one[i] for one in down]) for i in range(2))
    owner = np.array([one[2] for one in down])
    best, change = 0.0, None
    for extra, fall, part, option in up:
        fits = (freed + spare >= extra) & (owner != part)
        gains = np.where(fits, fall - rise, -np.inf)
        index = int(np.argmax(gains))
        if gains[index] > best + 1e-15:
            best, change = float(gains[index]), (index, part, option)
    if change is None:
        return False
    _, _, other, step = down[change[0]]
    state.chosen[other], state.chosen[change[1]] = step, change[2]
    return True
