"""Which cell of the KV cache holds which token: sequences that share what they have in common."""

import heapq
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

    def _cut(self, n_kept: int) -> Indices:
        """Shortens the sequence; the cells it gave up."""
        dropped = self._cells[n_kept : self._n].copy()
        self._n = n_kept
        return dropped


class Cells:
    """Lends the cells of a KV cache to sequences and counts who uses each one.

    A cell keeps its token, and with it everything before that token, as long as anyone uses it, so that sequences that
    begin alike share the cells of their beginning. A sequence that is done is remembered, the latest ones longest,
    until its cells are needed. The lowest free cell goes first, so that a sequence alone lies in cells 0, 1, 2, ...
    """

    def __init__(self, n_cells: int) -> None:
        self.n_cells = n_cells
        self._n_users = np.zeros(n_cells, np.int32)
        self._free = list(range(n_cells))  # a heap
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
        """Gives new tokens cells of their own, taken from remembered sequences if need be."""
        assert sequence in self._live
        added = np.asarray(tokens, np.int32)
        self._make_room(len(added))
        assert len(added) <= len(self._free), "more cells are in use than were promised"
        cells = np.array([heapq.heappop(self._free) for _ in range(len(added))], np.int64)
        self._n_users[cells] = 1
        sequence._append(added, cells)

    def truncate(self, sequence: Sequence, n_kept: int) -> None:
        """Forgets all but the first `n_kept` tokens; what others share stays theirs."""
        assert sequence in self._live
        if n_kept < len(sequence):
            self._give_back(sequence._cut(n_kept))

    def adopt(self, sequence: Sequence, tokens: Iterable[int]) -> None:
        """Makes `sequence`, itself a beginning of `tokens`, the longest beginning of them that anyone has read."""
        assert sequence in self._live
        wanted = np.asarray(tokens, np.int32)
        known, n_known = self._longest(wanted)
        if known is None or n_known <= len(sequence):
            return
        if known in self._remembered:
            self._touch(known)
        cells = known.cells[:n_known].copy()
        self._n_users[cells] += 1
        self._give_back(sequence._cut(0))
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
                self._give_back(sequence._cut(0))
                return
            if n_common == len(other):
                self._forget(other)
        self._remembered[sequence] = None
        if len(self._remembered) > _MAX_REMEMBERED:
            self._forget(next(iter(self._remembered)))

    def release(self, sequence: Sequence) -> None:
        """Ends the use of a sequence whose cells may hold anything."""
        del self._live[sequence]
        self._give_back(sequence._cut(0))

    def forget(self) -> None:
        """Forgets all remembered sequences."""
        for sequence in list(self._remembered):
            self._forget(sequence)

    def _longest(self, tokens: Tokens) -> tuple[Sequence | None, int]:
        """The sequence with the longest beginning of `tokens`, and how long that is."""
        best, n_best = None, 0
        for sequence in (*self._live, *self._remembered):
            n_common = common_prefix(sequence.tokens, tokens)
            if n_common > n_best:
                best, n_best = sequence, n_common
        return best, n_best

    def _make_room(self, n_cells: int) -> None:
        """Shortens remembered sequences, the oldest first and from their ends, until so many cells are free."""
        while len(self._free) < n_cells and self._remembered:
            oldest = next(iter(self._remembered))
            self._give_back(oldest._cut(max(0, len(oldest) - (n_cells - len(self._free)))))
            if not len(oldest):
                del self._remembered[oldest]

    def _forget(self, sequence: Sequence) -> None:
        del self._remembered[sequence]
        self._give_back(sequence._cut(0))

    def _touch(self, sequence: Sequence) -> None:
        """Makes a remembered sequence the latest."""
        del self._remembered[sequence]
        self._remembered[sequence] = None

    def _give_back(self, cells: Indices) -> None:
        self._n_users[cells] -= 1
        for cell in cells[self._n_users[cells] == 0].tolist():
            heapq.heappush(self._free, cell)


def common_prefix(ours: Tokens, theirs: Tokens) -> int:
    """How many tokens, from the first on, two sequences share."""
    n_least = min(len(ours), len(theirs))
    differing = np.flatnonzero(ours[:n_least] != theirs[:n_least])
    return int(differing[0]) if len(differing) else n_least
