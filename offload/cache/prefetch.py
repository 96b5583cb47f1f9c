"""Predicts which experts later layers will select, and how probably, from what their routers say early.

A later layer's router, asked early, gives a logit for each expert. How far the logit of one lies above or below the
border between selected and not selected tells how sure it is; what probability that means is learnt while running, for
each distance of layers by itself.
"""

from bisect import bisect
from collections.abc import Collection
from dataclasses import dataclass, field
from heapq import nlargest

import numpy as np
from numpy.typing import NDArray

from slimoe.offload.cache.residency import Key
from slimoe.offload.model.experts import ExpertLayer

_BORDERS = (-0.4, -0.2, -0.1, 0.0, 0.1, 0.2, 0.4, 0.8, 1.6)
"""Margins, in router logits, that part the bins in which hits are counted."""
_FADE = 0.995
_PRIOR_WEIGHT = 4.0


@dataclass(frozen=True, slots=True)
class Guess:
    """An expert that a later layer may select, and the probability that it will."""

    key: Key
    probability: float


@dataclass(slots=True)
class _Book:
    """Guesses and hits by margin, for one distance of layers; recent ones count most."""

    guesses: list[float] = field(default_factory=lambda: [_PRIOR_WEIGHT] * (len(_BORDERS) + 1))
    hits: list[float] = field(
        default_factory=lambda: [_PRIOR_WEIGHT * (n + 0.5) / (len(_BORDERS) + 1) for n in range(len(_BORDERS) + 1)]
    )

    def probability(self, column: int) -> float:
        return self.hits[column] / self.guesses[column]

    def settle(self, columns: list[int], hits: list[bool]) -> None:
        for column, hit in zip(columns, hits, strict=True):
            self.guesses[column] = self.guesses[column] * _FADE + 1
            self.hits[column] = self.hits[column] * _FADE + hit


class ExpertPredictor:
    """Predicts which experts later layers will select, and learns from which predictions came true."""

    def __init__(self) -> None:
        self._books: dict[int, _Book] = {}
        self._open: dict[int, dict[int, list[tuple[int, int]]]] = {}

    def begin(self) -> None:
        """A step begins: what the last one left open is void."""
        self._open.clear()

    def guess(self, index: int, distance: int, layer: ExpertLayer, logits: NDArray[np.float32]) -> list[Guess]:
        """Experts of layer `index`, likeliest first, from its router's `logits` [n_row] for an earlier layer's input.

        `distance` is how many cut layers earlier that is.
        """
        listed, n_used = logits.tolist(), layer.n_expert_used
        candidates = nlargest(2 * n_used, range(len(listed)), key=listed.__getitem__)
        if len(listed) > n_used:
            border = (listed[candidates[n_used - 1]] + listed[candidates[n_used]]) / 2
        else:
            border = listed[candidates[-1]] - 1
        columns = [bisect(_BORDERS, listed[row] - border) for row in candidates]
        book = self._books.setdefault(distance, _Book())
        self._open.setdefault(index, {})[distance] = list(zip(candidates, columns, strict=True))
        return [
            Guess((index, layer.target[row]), book.probability(column))
            for row, column in zip(candidates, columns, strict=True)
            if layer.target[row] >= 0
        ]

    def settle(self, index: int, layer: ExpertLayer, selected: Collection[int]) -> None:
        """Layer `index` has selected these stored experts: counts which predictions were right."""
        for distance, made in self._open.pop(index, {}).items():
            hits = [layer.target[row] in selected for row, _ in made]
            self._books[distance].settle([column for _, column in made], hits)
