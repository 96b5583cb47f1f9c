"""A sequence of tokens as the KV cache knows it: their cells, and the places from which others may go on."""

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]
Indices = NDArray[np.int64]

NO_TOKENS = 0
"""The state of a sequence without tokens."""
NO_CELL = -1
"""What stands for the cell of a token that layers with a window no longer have."""
_GROWTH = 256


class Sequence:
    """Tokens in order, the cells of each one, and the states after some of them. Only `Cells` changes it."""

    __slots__ = ("_cells", "_kept", "_n", "_states", "_tokens", "_window")

    def __init__(self) -> None:
        self._n = 0
        self._states: dict[int, int] = {}
        self._kept: set[int] = set()
        self._tokens = np.empty(0, np.int32)
        self._cells = np.empty(0, np.int64)
        self._window = np.empty(0, np.int64)

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

    @property
    def window_cells(self) -> Indices:
        """I64 [n], the cells in layers with a window, as far as these have cells of their own, else NO_CELL; a view."""
        return self._window[: self._n]

    @property
    def moves(self) -> tuple[tuple[int, int], ...]:
        """The state before the tokens that were appended last, and the one after; none without recurrent layers."""
        if not self._states:
            return ()
        *before, after = sorted(self._states)
        return ((self._states[before[-1]] if before else NO_TOKENS, self._states[after]),)

    @property
    def places(self) -> list[int]:
        """After how many tokens there is a state, or a whole window, that others may go on from, with the last one."""
        return sorted({*self._kept, *self._states.keys() & {self._n}})

    def has_state(self, place: int) -> bool:
        """Whether there is a state after the first `place` tokens."""
        return place in self._states

    def has_windows(self, begin: int, end: int) -> bool:
        """Whether layers with a window still hold the tokens from number `begin` to before `end`."""
        return end <= self._n and not (self._window[begin:end] == NO_CELL).any()

    def state_at(self, place: int) -> int:
        """The state after the first `place` tokens, which there must be."""
        return self._states[place]

    def _append(self, tokens: Tokens, cells: Indices, window: Indices | int = NO_CELL) -> None:
        end = self._n + len(tokens)
        if end > len(self._tokens):
            n_more = max(end, 2 * self._n, _GROWTH) - self._n
            self._tokens = np.concatenate([self.tokens, np.empty(n_more, np.int32)])
            self._cells = np.concatenate([self.cells, np.empty(n_more, np.int64)])
            self._window = np.concatenate([self.window_cells, np.empty(n_more, np.int64)])
        self._tokens[self._n : end] = tokens
        self._cells[self._n : end] = cells
        self._window[self._n : end] = window
        self._n = end

    def _cut(self, n_kept: int) -> None:
        self._n = min(self._n, n_kept)


def common_prefix(ours: Tokens, theirs: Tokens) -> int:
    """How many tokens, from the first on, two sequences share."""
    n_least = min(len(ours), len(theirs))
    differing = np.flatnonzero(ours[:n_least] != theirs[:n_least])
    return int(differing[0]) if len(differing) else n_least
