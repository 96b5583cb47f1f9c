"""How far the look-ahead can be believed: what later routers say early, and how often they were right.

A later layer's router, asked early, names its experts with scores. How much the score of one lies above (or below) the
border between chosen and not chosen tells how sure it is; how sure that makes us is learnt while running, for each
distance of layers by itself.
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
    """An expert that a later layer will probably choose, `distance` layers ahead."""

    key: Key
    probability: float


@dataclass(slots=True)
class _Book:
    """Guesses and hits by margin, for one distance; recent ones count most."""

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
    """Predicts which experts later layers will use: guesses that are open, and what became of the others."""

    def __init__(self) -> None:
        self._books: dict[int, _Book] = {}
        self._open: dict[int, dict[int, list[tuple[int, int]]]] = {}

    def begin(self) -> None:
        """A step begins: what the last one left open is void."""
        self._open.clear()

    def guess(self, index: int, distance: int, layer: ExpertLayer, scores: NDArray[np.float32]) -> list[Guess]:
        """Experts of layer `index`, likeliest first, from its router's scores [n_row] for an earlier layer's input."""
        listed, n_used = scores.tolist(), layer.n_expert_used
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

    def settle(self, index: int, layer: ExpertLayer, chosen: Collection[int]) -> None:
        """Layer `index` has chosen these stored experts: counts which guesses were right."""
        for distance, made in self._open.pop(index, {}).items():
            hits = [layer.target[row] in chosen for row, _ in made]
            self._books[distance].settle([column for _, column in made], hits)
