"""Which cell of the KV cache holds which token: sequences that share what they have in common."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]
Indices = NDArray[np.int64]

_GROWTH = 256
_MAX_REMEMBERED = 256
"""Each one is compared with every new prompt."""


class Sequence:
    """Tokens in order, and the cell of each one. Only `Cells` changes it."""

    __slots__ = ("_cells", "_n", "_tokens")

    def __init__(self) -> None:
        self._n = 0
        self._tokens = np.empty(0, np.int32)
        self._cells = np.empty(0, np.int64)

    def __len__(self) -> int:
        return self._n

    @property
    def tokens(self) -> Tokens:
        """I32 [n]; a view that is valid until the sequence changes."""
        return self._tokens[: self._n]

    @property
    def cells(self) -> Indices:
        """I64 [n], all different; a view that is valid until the sequence changes."""
        return self._cells[: self._n]

    def _append(self, tokens: Tokens, cells: Indices) -> None:
        end = self._n + len(tokens)
        if end > len(self._tokens):
            capacity = max(end, 2 * self._n, _GROWTH)
            self._tokens = np.concatenate([self.tokens, np.empty(capacity - self._n, np.int32)])
            self._cells = np.concatenate([self.cells, np.empty(capacity - self._n, np.int64)])
        self._tokens[self._n : end] = tokens
        self._cells[self._n : end] = cells
        self._n = end

    def _cut(self, n_kept: int) -> None:
        self._n = min(self._n, n_kept)


class Cells:
    """Lends the cells of a KV cache to sequences and counts who uses each one.

    A cell keeps its token, and with it everything before that token, as long as anyone uses it, so that sequences that
    begin alike share the cells of their beginning. A sequence that is done is remembered, the latest ones longest,
    until its cells are needed. The lowest free cell goes first, so that a sequence alone lies in cells 0, 1, 2, ...
    """

    def __init__(self, n_cells: int) -> None:
        self.n_cells = n_cells
        self.n_users = np.zeros(n_cells, np.int32)
        """I32 [n_cells]: sequences in use or remembered that hold each cell; a cell is free at 0."""
        self._live: dict[Sequence, None] = {}
        self._remembered: dict[Sequence, None] = {}

    @property
    def n_unused(self) -> int:
        """Cells that no sequence in use holds: free ones, and those of remembered sequences only."""
        held = np.zeros(self.n_cells, np.bool_)
        for sequence in self._live:
            held[sequence.cells] = True
        return self.n_cells - int(np.count_nonzero(held))

    def begin(self) -> Sequence:
        """A new, empty sequence."""
        sequence = Sequence()
        self._live[sequence] = None
        return sequence

    def append(self, sequence: Sequence, tokens: Iterable[int]) -> None:
        """Gives new tokens cells of their own; remembered sequences lose theirs for it, the oldest and its end first.

        There must be enough unused cells.
        """
        assert sequence in self._live
        added = np.asarray(tokens, np.int32)
        cells = self._free(len(added))
        while len(cells) < len(added) and self._remembered:
            oldest = next(iter(self._remembered))
            self._cut(oldest, max(0, len(oldest) - (len(added) - len(cells))))
            if not len(oldest):
                del self._remembered[oldest]
            cells = self._free(len(added))
        assert len(added) == len(cells), "more cells are in use than were promised"
        self.n_users[cells] = 1
        sequence._append(added, cells)

    def truncate(self, sequence: Sequence, n_kept: int) -> None:
        """Forgets all but the first `n_kept` tokens; what others share stays theirs."""
        assert sequence in self._live
        self._cut(sequence, n_kept)

    def adopt(self, sequence: Sequence, tokens: Iterable[int]) -> None:
        """Makes `sequence`, itself a beginning of `tokens`, the longest beginning of them that anyone has read."""
        assert sequence in self._live
        wanted = np.asarray(tokens, np.int32)
        known, n_known = sequence, len(sequence)
        for other in (*self._live, *self._remembered):
            n_common = common_prefix(other.tokens, wanted)
            if n_common > n_known:
                known, n_known = other, n_common
        if known is sequence:
            return
        if known in self._remembered:
            self._touch(known)
        cells = known.cells[:n_known].copy()
        self.n_users[cells] += 1
        self._cut(sequence, 0)
        sequence._append(wanted[:n_known], cells)

    def remember(self, sequence: Sequence) -> None:
        """Ends the use of a sequence, which stays known until its cells are needed."""
        del self._live[sequence]
        if not len(sequence):
            return
        for other in list(self._remembered):
            n_common = common_prefix(sequence.tokens, other.tokens)
            if n_common == len(sequence):
                self._touch(other)
                self._cut(sequence, 0)
                return
            if n_common == len(other):
                self._forget(other)
        self._remembered[sequence] = None
        if len(self._remembered) > _MAX_REMEMBERED:
            self._forget(next(iter(self._remembered)))

    def discard(self, tokens: Iterable[int]) -> None:
        """Forgets the remembered sequences that are these tokens, or go on from them."""
        gone = np.asarray(tokens, np.int32)
        for other in list(self._remembered):
            if len(gone) and common_prefix(other.tokens, gone) == min(len(other), len(gone)):
                self._forget(other)

    def _free(self, n_most: int) -> Indices:
        """The lowest free cells, at most `n_most`."""
        if n_most == 1:
            # Each token of an answer takes one cell, and finding one does not take a list of all.
            lowest = np.array([self.n_users.argmin()], np.int64)
            return lowest if self.n_users[lowest[0]] == 0 else lowest[:0]
        return np.flatnonzero(self.n_users == 0)[:n_most]

    def _forget(self, sequence: Sequence) -> None:
        del self._remembered[sequence]
        self._cut(sequence, 0)

    def _touch(self, sequence: Sequence) -> None:
        """Makes a remembered sequence the latest."""
        del self._remembered[sequence]
        self._remembered[sequence] = None

    def _cut(self, sequence: Sequence, n_kept: int) -> None:
        """Shortens a sequence, which no longer uses the cells behind its first `n_kept` tokens."""
        self.n_users[sequence.cells[n_kept:]] -= 1
        sequence._cut(n_kept)


def common_prefix(ours: Tokens, theirs: Tokens) -> int:
    """How many tokens, from the first on, two sequences share."""
    n_least = min(len(ours), len(theirs))
    differing = np.flatnonzero(ours[:n_least] != theirs[:n_least])
    return int(differing[0]) if len(differing) else n_least
