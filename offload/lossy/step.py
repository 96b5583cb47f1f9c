"""A lossy mode at work: decides for the selected experts of each layer, and keeps account of what that cost."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from numpy.typing import NDArray

from slimoe.offload.cache.residency import Key
from slimoe.offload.lossy.decision import SKIPPED, Choice, Chooser, Decision, Memory, unchanged
from slimoe.offload.lossy.loss import LossTable
from slimoe.offload.lossy.rules import Rule
from slimoe.offload.model.experts import ExpertCopy, ExpertLayer

_AIM = 0.9
"""The part of the allowed loss that is aimed at, since no layer may pass it."""
_STEP, _MOST = 1.1, 1e4
"""The factor by which a price changes at each step, and the most that it may be above the one that bounds give."""

Layers = Sequence[ExpertLayer | None]
Tables = Sequence[LossTable | None]


@dataclass(slots=True)
class LossyCounters:
    """Counts of selected experts since the model was opened, by what stood in for them.

    That is a copy which is not the best (`low_selected`), nothing (`skipped_selected`) or a constant expert
    (`constant_selected`). `expected_kl` is the sum of the KL divergence, in nats, that the file expects of these:
    infinite where it does not say.
    """

    low_selected: int = 0
    skipped_selected: int = 0
    constant_selected: int = 0
    expected_kl: float = 0.0

    def add(self, other: "LossyCounters") -> None:
        """Adds the counts of another object."""
        self.low_selected += other.low_selected
        self.skipped_selected += other.skipped_selected
        self.constant_selected += other.constant_selected
        self.expected_kl += other.expected_kl

    def known(self) -> dict[str, float]:
        """The counters by name, and by those of the version before; no `expected_kl` where the file does not say it."""
        old = {
            "low_picks": self.low_selected,
            "skipped_picks": self.skipped_selected,
            "novice_picks": self.constant_selected,
        }
        return {name: value for name, value in asdict(self).items() if math.isfinite(value)} | old


class LossyStep:
    """Decides with `chooser`, but exactly wherever the KL divergence expected so far would pass `limit` nats per token.

    With a limit and a `Rule`, the rule's price, which comes from upper bounds, rises and falls so that what is allowed
    is used.
    """

    def __init__(
        self, layers: Layers, tables: Tables, chooser: Chooser, memory: Memory, limit: float | None = None
    ) -> None:
        self._layers, self._tables, self._chooser, self._memory = layers, tables, chooser, memory
        self._limit, self._n_tokens = limit, 0
        self._rule = chooser if limit is not None and isinstance(chooser, Rule) else None
        self._scale = 1.0
        self.counters = LossyCounters()

    @property
    def invests(self) -> bool:
        """Whether missing best copies are to be read while the disk has nothing else to do."""
        return self._chooser.invests

    def begin(self, n_tokens: int) -> None:
        """Begins a step of `n_tokens` tokens."""
        if self._rule is not None and self._limit is not None and self._n_tokens:
            is_within = self.counters.expected_kl < _AIM * self._limit * self._n_tokens
            self._scale = min(_MOST, max(1.0, self._scale * (_STEP if is_within else 1 / _STEP)))
            self._chooser = replace(self._rule, price=self._rule.price * self._scale)
        self._n_tokens += n_tokens

    def decide(self, index: int, stored: NDArray[np.int64], weights: NDArray[np.float32]) -> Decision:
        """Decides for the selected experts of a layer, both arrays [n_rows, n_used] as in `decision.Choice`."""
        layer, table = self._layers[index], self._tables[index]
        assert layer is not None
        assert table is not None
        choice = Choice(index, layer, table, stored, weights)
        decision = self._chooser.choose(choice, self._memory)
        cost = _cost(choice, decision)
        if self._limit is not None and self.counters.expected_kl + cost.expected_kl > self._limit * self._n_tokens:
            return unchanged(choice)
        self.counters.add(cost)
        return decision

    def prefetch_copy(self, key: Key) -> ExpertCopy:
        """The copy to read of an expert that will perhaps be selected soon."""
        layer, table = self._layers[key[0]], self._tables[key[0]]
        assert layer is not None
        assert table is not None
        return layer.experts[key[1]][self._chooser.prefetch_copy(key, table, self._memory)]


def _cost(choice: Choice, decision: Decision) -> LossyCounters:
    """Counts what a decision does without, and the loss expected of it."""
    table, rows = choice.table, choice.table.rows(choice.stored)
    is_replaced, is_skipped = decision.stored != choice.stored, decision.stored == SKIPPED
    is_low = ~is_replaced & ((decision.copies > 0) | table.is_lowered[rows])
    losses = ((is_low, table.low), (is_skipped, table.skip), (is_replaced & ~is_skipped, table.constant))
    counts = [int(np.count_nonzero(mask)) for mask, _ in losses]
    if not any(counts):
        return LossyCounters()
    squares = choice.weights.astype(np.float64) ** 2
    expected = sum(float((rates[rows[mask]] * squares[mask]).sum()) for mask, rates in losses)
    return LossyCounters(counts[0], counts[1], counts[2], expected)
