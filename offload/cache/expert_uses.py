"""How often tokens selected each expert: counted while steps are computed, for whoever looks on."""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray


class ExpertUses:
    """Counts by layer and row of its router, from the start and from the last `begin` on.

    Lists, not arrays: a token selects few experts, and adding one to each is the fastest that way.
    """

    def __init__(self, n_rows: Sequence[int]) -> None:
        """`n_rows` are the rows of each layer's router, 0 in layers without experts."""
        self.totals = [[0] * n for n in n_rows]
        self._before = [list(counts) for counts in self.totals]

    def begin(self) -> None:
        """Lets `recent` count from now on."""
        self._before = [list(counts) for counts in self.totals]

    def recent(self, layer: int) -> tuple[int, ...]:
        """The counts of a layer since `begin`."""
        before = self._before[layer]
        return tuple(now - then for now, then in zip(self.totals[layer], before, strict=True))

    def add(self, layer: int, rows: Iterable[int]) -> None:
        """Counts the rows that one token or a few selected."""
        counts = self.totals[layer]
        for row in rows:
            counts[row] += 1

    def add_batch(self, layer: int, ranked: NDArray[np.int32]) -> None:
        """Counts what a batch selected, [n_tokens, n_used]."""
        counts = self.totals[layer]
        for row, n in enumerate(np.bincount(ranked.ravel(), minlength=len(counts)).tolist()):
            counts[row] += n
