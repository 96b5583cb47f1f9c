"""Predicts which experts later layers will select, and how probably, from what their routers say early.

A later layer's router, asked early, gives a logit for each expert. How far the logit of one lies above or below the
border between selected and not selected tells how sure it is; what probability that means is learnt while running, for
each distance of layers by itself.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BORDERS = np.array((-0.4, -0.2, -0.1, 0.0, 0.1, 0.2, 0.4, 0.8, 1.6))
"""Margins, in router logits, that part the bins in which hits are counted."""
_N_BINS = len(_BORDERS) + 1
_FADE = 0.995
_PRIOR_WEIGHT = 4.0


@dataclass(frozen=True, slots=True, eq=False)
class Guesses:
    """Stored `experts` I64 that a later layer may select, likeliest first, and the `probabilities` that it will."""

    experts: NDArray[np.int64]
    probabilities: NDArray[np.float64]


@dataclass(slots=True, eq=False)
class _Book:
    """Guesses and hits by margin, for one distance of layers; recent ones count most."""

    guesses: NDArray[np.float64] = field(default_factory=lambda: np.full(_N_BINS, _PRIOR_WEIGHT))
    hits: NDArray[np.float64] = field(
        default_factory=lambda: _PRIOR_WEIGHT * (np.arange(_N_BINS, dtype=np.float64) + 0.5) / _N_BINS
    )

    def settle(self, bins: NDArray[np.intp], is_hit: NDArray[np.bool_]) -> None:
        counts = np.bincount(bins, minlength=_N_BINS)
        fade = _FADE**counts
        self.guesses = self.guesses * fade + counts
        self.hits = self.hits * fade + np.bincount(bins[is_hit], minlength=_N_BINS)


class ExpertPredictor:
    """Predicts which experts later layers will select, and learns from which predictions came true."""

    def __init__(self) -> None:
        self._books: dict[int, _Book] = {}
        self._open: dict[int, list[tuple[_Book, NDArray[np.int64], NDArray[np.intp]]]] = {}

    def begin(self) -> None:
        """A step begins: what the last one left open is void."""
        self._open.clear()

    def guess(
        self, index: int, distance: int, target: NDArray[np.int64], n_used: int, logits: NDArray[np.float32]
    ) -> Guesses:
        """Predicts experts of layer `index` from its router's `logits` [n_row] for an earlier layer's input.

        `target` I64 [n_row] are the stored experts that the rows mean, negative for constant experts; a token selects
        `n_used`. `distance` is how many cut layers earlier that is.
        """
        n_row, n_candidates = len(logits), min(2 * n_used, len(logits))
        rows = np.argpartition(logits, n_row - n_candidates)[n_row - n_candidates :]
        rows = rows[np.lexsort((rows, -logits[rows]))]
        values = logits[rows].astype(np.float64)
        border = (values[n_used - 1] + values[n_used]) / 2 if n_row > n_used else values[-1] - 1
        bins = np.searchsorted(_BORDERS, values - border, side="right")
        experts = target[rows]
        if experts.min() < 0:
            experts, bins = experts[experts >= 0], bins[experts >= 0]
        book = self._books.setdefault(distance, _Book())
        self._open.setdefault(index, []).append((book, experts, bins))
        return Guesses(experts, book.hits[bins] / book.guesses[bins])

    def settle(self, index: int, selected: NDArray[np.integer[Any]], n_expert: int) -> None:
        """Layer `index` has selected these of its `n_expert` stored experts: counts which predictions were right."""
        made = self._open.pop(index, None)
        if made is None:
            return
        is_selected = np.zeros(n_expert, np.bool_)
        is_selected[selected] = True
        for book, experts, bins in made:
            book.settle(bins, is_selected[experts])
