"""Lossy modes that look at what is in memory: one rule over all that can be done for a pick, by time and by error.

For every expert of a step the rule takes the least of

    seconds of reading + mu * expected rise of the divergence (nats)

over the best copy (at hand or read), the last copy (at hand or read), the fallback novice and nothing. A read serves
all picks of an expert in the step, so that a prompt is answered in better copies than single tokens. Computing is not
in the balance: whatever is in memory counts as free. It contains the published rules: mu = 0 never waits where there
is another way, an infinite mu is the exact engine.
"""

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


@dataclass(frozen=True, slots=True)
class NeverWait:
    """The last copy of every expert whose best copy is in no memory, in prompts as in answers.

    Source: HOBBIT (arXiv 2411.01433), which waits for the low copy; here all of them have a place in memory first.
    """

    low_slots: LowSlots = "first"
    invests = True
    is_steady = False

    def choose(self, choice: Choice, memory: Memory) -> Decision:
        """By what is here."""
        experts, places = np.unique(choice.stored, return_inverse=True)
        is_missing = [expert >= 0 and not memory.holds((choice.index, expert), 0) for expert in experts.tolist()]
        last = choice.table.last_copy[choice.table.rows(choice.stored)]
        return Decision(np.where(np.array(is_missing)[places].reshape(last.shape), last, 0), choice.stored)

    def ahead(self, key: Key, table: LossTable, memory: Memory) -> int:
        """What would be used."""
        return 0 if memory.holds(key, 0) else int(table.last_copy[key[1]])


@dataclass(frozen=True, slots=True)
class Rule:
    """The rule with `mu` seconds per nat or, if that is None, with `price` nats per byte read."""

    mu: float | None = None
    price: float = 0.0
    low_slots: LowSlots = "first"
    invests = True
    is_steady = False

    def choose(self, choice: Choice, memory: Memory) -> Decision:
        """Expert by expert, since each is read once whatever the others do."""
        copies, given_up = np.zeros_like(choice.stored), np.zeros(choice.stored.shape, np.bool_)
        price = self._price(memory)
        for expert in np.unique(choice.stored[choice.stored >= 0]).tolist():
            if memory.holds((choice.index, expert), 0):
                continue
            where = choice.stored == expert
            actions = self._actions(choice, memory, expert, where, price)
            copies[where] = np.where(actions == _LOW, choice.table.last_copy[expert], 0)
            given_up[where] = actions == _NONE
        return without(choice, given_up, copies, novices=True)

    def ahead(self, key: Key, table: LossTable, memory: Memory) -> int:
        """What would be used for a pick of middling share."""
        expert = key[1]
        loss = table.low[expert] * table.share_square[expert]
        is_worth_it = memory.holds(key, 0) or loss > self._price(memory) * table.high_bytes[expert]
        return 0 if is_worth_it else int(table.last_copy[expert])

    def _price(self, memory: Memory) -> float:
        if self.mu is None:
            return self.price
        return memory.read_seconds(1 << 30) / (1 << 30) / self.mu if self.mu else NEVER

    @staticmethod
    def _actions(
        choice: Choice, memory: Memory, expert: int, where: NDArray[np.bool_], price: float
    ) -> NDArray[np.int64]:
        """What is best for each pick of an expert whose best copy is missing."""
        table, stored = choice.table, choice.layer.experts[expert]
        squares = choice.shares[where].astype(np.float64) ** 2
        low = _loss(table.low[expert], squares)
        if table.fallback[expert] >= 0:
            none = _loss(table.novice[expert], squares)
        else:
            # Never all of a token's experts.
            none = np.where(np.nonzero(where)[1] == 0, np.inf, _loss(table.skip[expert], squares))
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
