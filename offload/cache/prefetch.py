"""Predicts which experts later layers will select, and how probably, from what their routers say early.

A later layer's router, asked early, gives a logit for each expert. How far the logit of one lies above or below the
border between selected and not selected tells how sure it is; what probability that means is learnt while running, for
each distance of layers by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BORDERS = np.array((-0.4, -0.2, -0.1, 0.0, 0.1, 0.2, 0.4, 0.8, 1.6))
"""Margins, in router logits, that part the bins in which hits are counted."""
_N_BINS = len(_BORDERS) + 1
_FADE = 0.995
_PRIOR_WEIGHT = 4.0


class Later:
    """The next cut layers after one, the nearest first, and what the rows of their routers mean.

    `targets` I64 [n_later, n_row] are stored experts, negative for none, `n_rows` the rows that a layer has of those,
    and `n_used` what a token selects, both [n_later]. Of flattened arrays with a row for each layer `first_row` and
    `first_bin` say where its rows and bins begin, `last` and `beyond` which candidates lie on either side of the border
    between selected and not selected; it lies `below` the last one where all are selected, all [n_later, 1].
    """

    def __init__(
        self, layers: Sequence[int], targets: NDArray[np.int64], n_rows: Sequence[int], n_used: Sequence[int]
    ) -> None:
        n_row = targets.shape[1]
        self.layers, self.n_used, self.targets = tuple(layers), tuple(n_used), targets.ravel()
        number = np.arange(len(layers))[:, None]
        self.n_candidates = min(2 * max(n_used), n_row)
        has_border = np.array(n_used)[:, None] < np.minimum(n_rows, self.n_candidates)[:, None]
        self.first_row, self.first_bin = number * n_row, number * _N_BINS
        self.last = number * self.n_candidates + np.array(n_used)[:, None] - 1
        self.beyond = np.where(has_border, self.last + 1, self.last)
        self.below = (~has_border).astype(np.float32)
        self.missing = np.arange(n_row) >= np.array(n_rows)[:, None]
        self.is_even, self.is_stored = not self.missing.any(), bool((targets >= 0).all())


@dataclass(frozen=True, slots=True, eq=False)
class Guesses:
    """Stored experts that later layers may select, [n_later, n_candidates], likeliest first in each layer.

    `experts` I64 are negative where there is nothing to read, and `probabilities` 0 there.
    """

    experts: NDArray[np.int64]
    probabilities: NDArray[np.float64]


class ExpertPredictor:
    """Predicts which experts later layers will select, and learns from which predictions came true.

    What is counted of guesses and hits, [n_distances, n_bins], fades, so that recent ones count most. It changes from
    step to step only: a step's guesses are compared with what was selected when the next one begins.
    """

    def __init__(self) -> None:
        self._guesses, self._hits = _priors(0)
        self._shares = self._hits / self._guesses
        self._made: list[tuple[Sequence[int], NDArray[np.int64], NDArray[np.intp]]] = []
        self._selected: dict[int, NDArray[np.integer[Any]]] = {}

    def begin(self) -> None:
        """A step begins: learns from the last one."""
        if self._made and self._selected:
            self._learn()
        self._made.clear()
        self._selected.clear()

    def guess(self, later: Later, logits: NDArray[np.float32]) -> Guesses:
        """Predicts experts of `later` layers from what their routers say early, `logits` [n_later, n_row].

        Every operation counts here: between two graphs each finds the processor's caches cold.
        """
        if not later.is_even:
            logits = np.where(later.missing, np.float32(-np.inf), logits)
        rows = (-logits).argsort(axis=1)[:, : later.n_candidates] + later.first_row
        values = logits.take(rows)
        border = (values.take(later.last) + values.take(later.beyond)) / 2 - later.below
        bins = _BORDERS.searchsorted(values - border, side="right")
        experts = later.targets.take(rows)
        if len(later.layers) > len(self._shares):
            self._see_so_far(len(later.layers))
        probabilities = self._shares.take(bins + later.first_bin)
        if not (later.is_stored and later.is_even):
            is_real = (experts >= 0) & (values > -np.inf)
            experts, probabilities = np.where(is_real, experts, -1), np.where(is_real, probabilities, 0)
        self._made.append((later.layers, experts, bins))
        return Guesses(experts, probabilities)

    def _see_so_far(self, n_distances: int) -> None:
        n_known = len(self._shares)
        guesses, hits = _priors(n_distances)
        self._guesses = np.concatenate((self._guesses, guesses[n_known:]))
        self._hits = np.concatenate((self._hits, hits[n_known:]))
        self._shares = self._hits / self._guesses

    def settle(self, index: int, selected: NDArray[np.integer[Any]]) -> None:
        """Layer `index` has selected these stored experts."""
        self._selected[index] = selected

    def _learn(self) -> None:
        """Counts which predictions were right, of layers that have selected something."""
        most = max(int(experts.max(initial=0)) for _, experts, _ in self._made)
        place = {index: at for at, index in enumerate(self._selected)}
        is_selected = np.zeros((len(place), most + 1), np.bool_)
        for index, selected in self._selected.items():
            is_selected[place[index], selected[selected <= most]] = True
        rows = [
            (place[index], distance, experts[distance], bins[distance])
            for layers, experts, bins in self._made
            for distance, index in enumerate(layers)
            if index in place
        ]
        if not rows:
            return
        places, distances, *columns = zip(*rows, strict=True)
        experts, bins = map(np.concatenate, columns)
        lengths = [len(one) for one in columns[0]]
        counted = np.repeat(distances, lengths) * _N_BINS + bins
        is_real = experts >= 0
        is_hit = is_real & is_selected[np.repeat(places, lengths), experts]
        shape = self._hits.shape
        n_guesses, n_hits = (
            np.bincount(counted[which], minlength=self._hits.size).reshape(shape) for which in (is_real, is_hit)
        )
        fade = _FADE**n_guesses
        self._guesses = self._guesses * fade + n_guesses
        self._hits = self._hits * fade + n_hits
        self._shares = self._hits / self._guesses


def _priors(n_distances: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Guesses and hits before any were counted, [n_distances, n_bins]."""
    shares = (np.arange(_N_BINS, dtype=np.float64) + 0.5) / _N_BINS
    return np.full((n_distances, _N_BINS), _PRIOR_WEIGHT), np.tile(_PRIOR_WEIGHT * shares, (n_distances, 1))
