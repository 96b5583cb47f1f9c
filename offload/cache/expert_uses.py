"""How often tokens selected each expert: counted while steps are computed, for whoever looks on."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class ExpertUses:
    """Counts by layer and row of its router, from the start and from the last `begin` on."""

    def __init__(self, n_rows: Sequence[int]) -> None:
        """`n_rows` are the rows of each layer's router, 0 in layers without experts."""
        self._totals = [np.zeros(n, np.int64) for n in n_rows]
        self.begin()

    def begin(self) -> None:
        """Lets `recent` count from now on."""
        self._before = [counts.copy() for counts in self._totals]

    def total(self, layer: int) -> tuple[int, ...]:
        """The counts of a layer since the start."""
        return tuple(self._totals[layer].tolist())

    def recent(self, layer: int) -> tuple[int, ...]:
        """The counts of a layer since `begin`."""
        return tuple((self._totals[layer] - self._before[layer]).tolist())

    def add(self, layer: int, rows: NDArray[np.int32]) -> None:
        """Counts the rows that tokens selected, [n_tokens, n_used]."""
        totals = self._totals[layer]
        totals += np.bincount(rows.ravel(), minlength=len(totals))
