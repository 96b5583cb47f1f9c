"""Lossy modes that look at the router's shares alone: the same answer whatever lies where, for prompts as for answers.

A prompt is treated as an answer is, since in the next turn an answer is part of the prompt.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slimoe.offload.cache.residency import Key
from slimoe.offload.cache.slots import LowSlots
from slimoe.offload.lossy.decision import Choice, Decision, Memory, without
from slimoe.offload.lossy.loss import LossTable

_MOSTLY_HIGH = 0.5
"""From here on most picks use the best copy."""


@dataclass(frozen=True, slots=True)
class Gate:
    """The best copy while the larger shares sum up to `high` of all, the last copy up to `low`, then none.

    A pick that is given up has its fallback novice in its place if the file names one. Source: HOBBIT (arXiv
    2411.01433), whose thresholds are 0.6 and 0.9, and which does this only for what is not in memory.
    """

    high: float
    low: float = 1.0
    invests = False
    is_steady = True

    @property
    def low_slots(self) -> LowSlots:
        """A byte is worth more for what more picks use; which that is cannot be told for thresholds below one half."""
        if self.low <= self.high:
            return "none"
        return "last" if self.high >= _MOSTLY_HIGH else "shared"

    def choose(self, choice: Choice, memory: Memory) -> Decision:
        """By the sum of the shares before each pick."""
        before = shares_before(choice.shares)
        last = choice.table.last_copy[choice.table.rows(choice.stored)]
        copies = np.where(before <= self.high, 0, last)
        return without(choice, (before > max(self.high, self.low)) & (choice.stored >= 0), copies, novices=True)

    def ahead(self, key: Key, table: LossTable, memory: Memory) -> int:
        """The best copy: most picks of any mode that is worth using need it."""
        return 0


@dataclass(frozen=True, slots=True)
class SmallShares:
    """Does without picks whose share is below `ratios` (by layer) of the token's largest.

    Sources: NAEE (arXiv 2402.14800) and MC's ODP (arXiv 2410.06270), which skip; with `novices` a fallback stands in
    where the file names one, as MoNE (arXiv 2507.00390) does for whole experts.
    """

    ratios: Mapping[int, float]
    novices: bool = False
    low_slots: LowSlots = "none"
    invests = False
    is_steady = True

    def choose(self, choice: Choice, memory: Memory) -> Decision:
        """By each pick's share next to the first one's."""
        small = choice.shares < self.ratios[choice.index] * choice.shares[:, :1]
        return without(choice, small & (choice.stored >= 0), np.zeros_like(choice.stored), self.novices)

    def ahead(self, key: Key, table: LossTable, memory: Memory) -> int:
        """The best copy: most picks of any mode that is worth using need it."""
        return 0


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Skips picks, but never the first, whose share is below sqrt(`limit` / sensitivity of the layer).

    Source: AdapMoE (arXiv 2408.10284), which does this while decoding only.
    """

    limit: float
    sensitivities: Mapping[int, float]
    low_slots: LowSlots = "none"
    invests = False
    is_steady = True

    def choose(self, choice: Choice, memory: Memory) -> Decision:
        """By what each pick's share weighs in this layer."""
        small = self.sensitivities[choice.index] * choice.shares.astype(np.float64) ** 2 < self.limit
        small[:, 0] = False
        return without(choice, small & (choice.stored >= 0), np.zeros_like(choice.stored), novices=False)

    def ahead(self, key: Key, table: LossTable, memory: Memory) -> int:
        """The best copy: most picks of any mode that is worth using need it."""
        return 0


def shares_before(shares: NDArray[np.float32]) -> NDArray[np.float64]:
    """For each pick the sum of the larger shares of its token, as a part of all of them, at most 1."""
    values = shares.astype(np.float64)
    sums = values.cumsum(axis=1)
    return np.asarray(np.minimum((sums - values) / sums[:, -1:], 1.0))
