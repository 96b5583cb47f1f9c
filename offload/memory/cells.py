"""Which cell of the KV cache holds which token, and which state what recurrent layers keep of a sequence.

Sequences share what they have in common. A state cannot be cut as a row of cells can: it is of all tokens up to a
place, and a sequence goes on only from a place of which it has one.
"""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]
Indices = NDArray[np.int64]

NO_TOKENS = 0
"""The state of a sequence without tokens."""
_GROWTH = 256
_MAX_REMEMBERED = 256
"""Each one is compared with every new prompt."""


class Sequence:
    """Tokens in order, the cell of each one, and the states after some of them. Only `Cells` changes it."""

    __slots__ = ("_cells", "_kept", "_n", "_states", "_tokens")

    def __init__(self) -> None:
        self._n = 0
        self._states: dict[int, int] = {}
        self._kept: set[int] = set()
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

    @property
    def moves(self) -> tuple[tuple[int, int], ...]:
        """The state before the tokens that were appended last, and the one after; none without recurrent layers."""
        if not self._states:
            return ()
        *before, after = sorted(self._states)
        return ((self._states[before[-1]] if before else NO_TOKENS, self._states[after]),)

    @property
    def places(self) -> list[int]:
        """After how many tokens there is a state that others may go on from, with the last one."""
        return sorted(place for place in self._states if place in self._kept or place == self._n)

    def has_state(self, place: int) -> bool:
        """Whether there is a state after the first `place` tokens."""
        return place in self._states

    def state_at(self, place: int) -> int:
        """The state after the first `place` tokens, which there must be."""
        return self._states[place]

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

    A model with recurrent layers has `n_states` states, 0 is for others; the first is that of no tokens. A sequence in
    use needs two, so that a step that fails loses nothing. Those that it is told to keep are given up when there are no
    others, those first whose loss costs least.
    """

    def __init__(self, n_cells: int, n_states: int = 0) -> None:
        self.n_cells, self._n_states = n_cells, n_states
        self._n_state_users = [0] * n_states
        self.n_users = np.zeros(n_cells, np.int32)
        """I32 [n_cells]: sequences in use or remembered that hold each cell; a cell is free at 0."""
        self._live: dict[Sequence, None] = {}
        self._remembered: dict[Sequence, None] = {}
        self.before_loss: Callable[[Sequence], None] = lambda sequence: None
        """Called before a sequence loses cells or states to others."""

    @property
    def has_states(self) -> bool:
        """Whether the model has recurrent layers."""
        return self._n_states > 0

    @property
    def n_unused(self) -> int:
        """Cells that no sequence in use holds: free ones, and those of remembered sequences only."""
        held = np.zeros(self.n_cells, np.bool_)
        for sequence in self._live:
            held[sequence.cells] = True
        return self.n_cells - int(np.count_nonzero(held))

    def free(self, n_most: int) -> Indices:
        """The lowest free cells, at most `n_most`."""
        if n_most == 1:
            # Each token of an answer takes one cell, and finding one does not take a list of all.
            lowest = np.array([self.n_users.argmin()], np.int64)
            return lowest if self.n_users[lowest[0]] == 0 else lowest[:0]
        return np.flatnonzero(self.n_users == 0)[:n_most]

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
        cells = self.free(len(added))
        while len(cells) < len(added) and self._remembered:
            oldest = next(iter(self._remembered))
            self.before_loss(oldest)
            self._cut(oldest, max(0, len(oldest) - (len(added) - len(cells))))
            if not len(oldest):
                del self._remembered[oldest]
            cells = self.free(len(added))
        assert len(added) == len(cells), "more cells are in use than were promised"
        if self._n_states:
            self._drop_passed(sequence)
            state = self._free_state()
        self.n_users[cells] = 1
        sequence._append(added, cells)
        if self._n_states:
            sequence._states[len(sequence)] = state
            self._n_state_users[state] = 1

    def keep(self, sequence: Sequence) -> None:
        """Keeps the state after the last token, where there are states: others may go on from there too."""
        if sequence._states:
            sequence._kept.add(len(sequence))

    def truncate(self, sequence: Sequence, n_kept: int) -> None:
        """Forgets all but the first `n_kept` tokens, or with states a few more; what others share stays theirs."""
        assert sequence in self._live
        self._cut(sequence, n_kept)

    def adopt(self, sequence: Sequence, tokens: Iterable[int]) -> None:
        """Makes `sequence`, itself a beginning of `tokens`, the longest beginning of them that anyone has read."""
        assert sequence in self._live
        wanted = np.asarray(tokens, np.int32)
        known, n_known = sequence, len(sequence)
        for other in (*self._live, *self._remembered):
            n_common = self._usable(other, common_prefix(other.tokens, wanted))
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
        self._share_states(known, sequence)

    def holder(self, tokens: Tokens, *, has_state: bool) -> Sequence | None:
        """A sequence, in use or remembered, that begins with these tokens, and with `has_state` has the state after."""
        for sequence in (*self._live, *self._remembered):
            is_known = common_prefix(sequence.tokens, tokens) == len(tokens)
            if is_known and (not has_state or sequence.has_state(len(tokens))):
                return sequence
        return None

    def n_known(self, tokens: Tokens) -> int:
        """How many of these tokens, from the first on, some sequence in use or remembered begins with."""
        return max((common_prefix(one.tokens, tokens) for one in (*self._live, *self._remembered)), default=0)

    def remember(self, sequence: Sequence) -> None:
        """Ends the use of a sequence, which stays known until its cells are needed."""
        del self._live[sequence]
        if not len(sequence):
            return
        self._drop_passed(sequence)
        self.keep(sequence)
        for other in list(self._remembered):
            n_common = common_prefix(sequence.tokens, other.tokens)
            if n_common == len(sequence):
                self._share_states(sequence, other)
                self._touch(other)
                self._cut(sequence, 0)
                return
            if n_common == len(other):
                self._share_states(other, sequence)
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

    def _forget(self, sequence: Sequence) -> None:
        del self._remembered[sequence]
        self._cut(sequence, 0)

    def _touch(self, sequence: Sequence) -> None:
        """Makes a remembered sequence the latest."""
        del self._remembered[sequence]
        self._remembered[sequence] = None

    def _cut(self, sequence: Sequence, n_kept: int) -> None:
        """Shortens a sequence, which no longer uses the cells behind its first `n_kept` tokens.

        With states it also loses the tokens behind the last state that it still has.
        """
        n_kept = self._usable(sequence, min(n_kept, len(sequence)))
        self.n_users[sequence.cells[n_kept:]] -= 1
        sequence._cut(n_kept)
        for place in [place for place in sequence._states if place > n_kept]:
            self._drop_state(sequence, place)

    # --- states --------------------------------------------------------------------------------------------

    def _usable(self, sequence: Sequence, n_tokens: int) -> int:
        """From which place at or before `n_tokens` a sequence can be gone on from."""
        if not self._n_states:
            return n_tokens
        return max((place for place in sequence._states if place <= n_tokens), default=0)

    def _share_states(self, known: Sequence, sequence: Sequence) -> None:
        """Gives a sequence the states of another one, as far as their tokens are the same."""
        for place, state in known._states.items():
            if place <= len(sequence) and place not in sequence._states:
                sequence._states[place] = state
                self._n_state_users[state] += 1
                sequence._kept.add(place)

    def _drop_passed(self, sequence: Sequence) -> None:
        """Gives up the states that nobody asked to keep, but the last one."""
        for place in [place for place in sequence._states if place < len(sequence)]:
            if place not in sequence._kept:
                self._drop_state(sequence, place)

    def _drop_state(self, sequence: Sequence, place: int) -> None:
        self._n_state_users[sequence._states.pop(place)] -= 1
        sequence._kept.discard(place)

    def _free_state(self) -> int:
        """The number of a state that nobody uses, for which sequences lose kept ones, the oldest first."""
        for sequence, places in self._droppable():
            while places and 0 not in self._n_state_users[NO_TOKENS + 1 :]:
                self.before_loss(sequence)
                self._drop_state(sequence, places.pop(0))
                if not sequence._states and sequence in self._remembered:
                    self._forget(sequence)
        return self._n_state_users.index(0, NO_TOKENS + 1)

    def _droppable(self) -> Iterator[tuple[Sequence, list[int]]]:
        """Sequences and the places of states that they can lose: all, or of one in use all but its last two.

        Of these the step to come may read one and write the other.
        """
        for sequence in list(self._remembered):
            yield sequence, _by_loss(sorted(sequence._states), len(sequence))
        for sequence in list(self._live):
            yield sequence, _by_loss(sorted(sequence._states)[:-2], len(sequence))


def _by_loss(places: list[int], end: int) -> list[int]:
    """Places of a sequence's states in the order in which to give them up.

    Who edits a text leaves it the more likely the nearer its end, and then goes on from the state before. So the loss
    is the tokens that are read again without a state, times the chance that someone leaves between it and the next.
    """
    order, left = list[int](), list(places)
    while left:
        bounds = [0, *left, end]
        losses = [
            (place - bounds[index]) * (bounds[index + 2] - place + 1) / (end - place + 1)
            for index, place in enumerate(left)
        ]
        order.append(left.pop(int(np.argmin(losses))))
    return order


def common_prefix(ours: Tokens, theirs: Tokens) -> int:
    """How many tokens, from the first on, two sequences share."""
    n_least = min(len(ours), len(theirs))
    differing = np.flatnonzero(ours[:n_least] != theirs[:n_least])
    return int(differing[0]) if len(differing) else n_least
