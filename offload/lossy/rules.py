"""The lossy modes: what each does with the experts that the router selected.

`Gate`, `SmallWeights` and `Sensitivity` look at the expert weights alone: their answer is the same whatever lies where.
`NeverWait` and `Rule` look at what is in memory. All treat a prompt as they treat an answer, since in the next turn an
answer is part of the prompt.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slimoe.offload.cache.residency import Key
from slimoe.offload.cache.slots import LowSlots
from slimoe.offload.lossy.decision import Choice, Decision, Memory, without
from slimoe.offload.lossy.loss import LossTable

NEVER = 1e30
"""A price at which no byte is read if there is another way."""
SECONDS_PER_BYTE = 1e-9
"""What reading is taken to cost before it is measured."""
_HIGH, _LOW, _NONE = 0, 1, 2
_MOSTLY_HIGH = 0.5
"""From here on most selected experts use the best copy."""


@dataclass(frozen=True, slots=True)
class Gate:
    """Uses the best copy while the larger weights of a token sum up to `high`, the last copy up to `low`, then none.

    A constant expert stands in for an expert that is left out, if the file names one. Source: HOBBIT (arXiv
    2411.01433), whose thresholds are 0.6 and 0.9, and which does this only for what is not in memory.
    """

    high: float
    low: float = 1.0
    invests = False
    is_steady = True

    @property
    def low_slots(self) -> LowSlots:
        """A byte is worth more where it is used more; which copies that are cannot be told for thresholds below 1/2."""
        if self.low <= self.high:
            return "none"
        return "last" if self.high >= _MOSTLY_HIGH else "shared"

    def choose(self, choice: Choice, memory: Memory) -> Decision:
        """Decides by the sum of the larger weights of the token."""
        before = weights_before(choice.weights)
        last = choice.table.last_copy[choice.table.rows(choice.stored)]
        copies = np.where(before <= self.high, 0, last)
        return without(choice, (before > max(self.high, self.low)) & (choice.stored >= 0), copies, constants=True)

    def prefetch_copy(self, key: Key, table: LossTable, memory: Memory) -> int:
        """Returns the best copy: most selected experts need it in any mode that is worth using."""
        return 0


@dataclass(frozen=True, slots=True, eq=False)
class LowWeights:
    """Uses the last copy of selected experts whose weight is below `weights` [n_stored + 1], by layer, 0 for no expert.

    HOBBIT's gate with a threshold of each expert's own: where a low-bit copy loses little for the bytes that it saves,
    it answers for larger weights, and even for a token's first expert.
    """

    weights: Mapping[int, NDArray[np.float64]]
    low_slots: LowSlots = "last"
    invests = False
    is_steady = True

    def choose(self, choice: Choice, memory: Memory) -> Decision:
        """Decides by each weight and its expert."""
        rows = choice.table.rows(choice.stored)
        is_low = choice.weights < self.weights[choice.index][rows]
        return Decision(np.where(is_low, choice.table.last_copy[rows], 0), choice.stored)

    def prefetch_copy(self, key: Key, table: LossTable, memory: Memory) -> int:
        """Returns what would be used with the expert's mean weight."""
        is_low = table.weight_square[key[1]] < self.weights[key[0]][key[1]] ** 2
        return int(table.last_copy[key[1]]) if is_low else 0


@dataclass(frozen=True, slots=True)
class SmallWeights:
    """Leaves out selected experts whose weight is below `ratios` (by layer) of the token's largest.

    Sources: NAEE (arXiv 2402.14800) and MC's ODP (arXiv 2410.06270), which skip; with `constants` a constant expert
    stands in where the file names one, as MoNE (arXiv 2507.00390) does for whole experts.
    """

    ratios: Mapping[int, float]
    constants: bool = False
    low_slots: LowSlots = "none"
    invests = False
    is_steady = True

    def choose(self, choice: Choice, memory: Memory) -> Decision:
        """Decides by each weight next to the token's largest."""
        small = choice.weights < self.ratios[choice.index] * choice.weights.max(axis=1, keepdims=True)
        return without(choice, small & (choice.stored >= 0), np.zeros_like(choice.stored), self.constants)

    def prefetch_copy(self, key: Key, table: LossTable, memory: Memory) -> int:
        """Returns the best copy: most selected experts need it in any mode that is worth using."""
        return 0


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Skips selected experts whose weight is below sqrt(`limit` / sensitivity of the layer), never a token's largest.

    Source: AdapMoE (arXiv 2408.10284), which does this while decoding only.
    """

    limit: float
    sensitivities: Mapping[int, float]
    low_slots: LowSlots = "none"
    invests = False
    is_steady = True

    def choose(self, choice: Choice, memory: Memory) -> Decision:
        """Decides by each weight and the sensitivity of the layer."""
        small = self.sensitivities[choice.index] * choice.weights.astype(np.float64) ** 2 < self.limit
        small[np.arange(len(small)), choice.weights.argmax(axis=1)] = False
        return without(choice, small & (choice.stored >= 0), np.zeros_like(choice.stored), constants=False)

    def prefetch_copy(self, key: Key, table: LossTable, memory: Memory) -> int:
        """Returns the best copy: most selected experts need it in any mode that is worth using."""
        return 0


def weights_before(weights: NDArray[np.float32]) -> NDArray[np.float64]:
    """Sums, for each selected expert, the larger weights of its token, as a part of all of them, at most 1."""
    # Where a bias takes part in the choice, a smaller weight may come first.
    order = np.argsort(-weights, axis=1, kind="stable")
    ranked = np.take_along_axis(weights, order, 1).astype(np.float64)
    sums = ranked.cumsum(axis=1)
    before = np.empty_like(ranked)
    np.put_along_axis(before, order, np.minimum((sums - ranked) / sums[:, -1:], 1.0), 1)
    return before


@dataclass(frozen=True, slots=True)
class NeverWait:
    """The last copy of every expert whose best copy is in no memory, in prompts as in answers.

    Source: HOBBIT (arXiv 2411.01433), which waits for the low-bit copy; here all of them have a place in memory first.
    """

    low_slots: LowSlots = "first"
    invests = True
    is_steady = False

    def choose(self, choice: Choice, memory: Memory) -> Decision:
        """Decides by what is in memory."""
        experts, places = np.unique(choice.stored, return_inverse=True)
        is_missing = [expert >= 0 and not memory.holds((choice.index, expert), 0) for expert in experts.tolist()]
        last = choice.table.last_copy[choice.table.rows(choice.stored)]
        return Decision(np.where(np.array(is_missing)[places].reshape(last.shape), last, 0), choice.stored)

    def prefetch_copy(self, key: Key, table: LossTable, memory: Memory) -> int:
        """Returns the copy that would be used."""
        return 0 if memory.holds(key, 0) else int(table.last_copy[key[1]])


@dataclass(frozen=True, slots=True)
class Rule:
    """For every expert of a step the cheapest of what can be done, by time and by error.

    What is minimised is the seconds of reading plus `mu` (seconds per nat) times the expected KL divergence, over the
    best copy (at hand or read), the last copy (at hand or read), its constant expert and nothing. Without `mu` a byte
    read costs `price` nats. A read serves all tokens of the step that selected the expert, so that a prompt is
    answered in better copies than single tokens. Computing is not in the balance: whatever is in memory counts as free.
    The rule contains published ones: mu = 0 never waits where there is another way, an infinite mu is the exact engine.
    """

    mu: float | None = None
    price: float = 0.0
    low_slots: LowSlots = "first"
    invests = True
    is_steady = False

    def choose(self, choice: Choice, memory: Memory) -> Decision:
        """Decides expert by expert, since each is read once whatever the others do."""
        copies, given_up = np.zeros_like(choice.stored), np.zeros(choice.stored.shape, np.bool_)
        price, flat = self._price(memory), choice.stored.ravel()
        order = np.argsort(flat, kind="stable")
        experts, begins = np.unique(flat[order], return_index=True)
        for expert, places in zip(experts.tolist(), np.split(order, begins[1:]), strict=True):
            if expert < 0 or memory.holds((choice.index, expert), 0):
                continue
            actions = self._actions(choice, memory, expert, places, price)
            copies.flat[places] = np.where(actions == _LOW, choice.table.last_copy[expert], 0)
            given_up.flat[places] = actions == _NONE
        return without(choice, given_up, copies, constants=True)

    def prefetch_copy(self, key: Key, table: LossTable, memory: Memory) -> int:
        """Returns what would be used with the expert's mean weight."""
        expert = key[1]
        loss = table.low[expert] * table.weight_square[expert]
        is_worth_it = memory.holds(key, 0) or loss > self._price(memory) * table.high_bytes[expert]
        return 0 if is_worth_it else int(table.last_copy[expert])

    def _price(self, memory: Memory) -> float:
        if self.mu is None:
            return self.price
        return memory.read_seconds(1 << 30) / (1 << 30) / self.mu if self.mu else NEVER

    @staticmethod
    def _actions(
        choice: Choice, memory: Memory, expert: int, places: NDArray[np.intp], price: float
    ) -> NDArray[np.int64]:
        """Chooses, for each place [n] where an expert was selected whose best copy is missing, the cheapest way."""
        table, stored = choice.table, choice.layer.experts[expert]
        squares = choice.weights.ravel()[places].astype(np.float64) ** 2
        low = _loss(table.low[expert], squares)
        if table.fallback[expert] >= 0:
            none = _loss(table.constant[expert], squares)
        else:
            # Never all of a token's experts.
            none = np.where(places % choice.stored.shape[1] == 0, np.inf, _loss(table.skip[expert], squares))
        is_read = len(stored) > 1 and not memory.holds((choice.index, expert), len(stored) - 1)
        mixed = np.where(none < low, _NONE, _LOW)
        plans = [
            (stored[0].n_bytes * price, np.full(squares.size, _HIGH)),
            (stored[-1].n_bytes * price * is_read + np.minimum(low, none).sum(), mixed),
            (none.sum(), np.full(squares.size, _NONE)),
        ]
        return min(plans, key=lambda plan: float(plan[0]))[1]


def _loss(rate: float, squares: NDArray[np.float64]) -> NDArray[np.float64]:
    return rate * squares if np.isfinite(rate) else np.full(squares.size, np.inf)
