"""Which cell of the KV cache holds which token, and which state what recurrent layers keep of a sequence.

Sequences share what they have in common. A state cannot be cut as a row of cells can: it is of all tokens up to a
place, and a sequence goes on only from a place of which it has one. So it is with windows: from a place a sequence goes
on only if the tokens before it that layers with a window see are still held there.
"""

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from slimoe.offload.memory.kv_cache import KVSize
from slimoe.offload.memory.sequence import NO_CELL
from slimoe.offload.memory.sequence import NO_TOKENS as NO_TOKENS
from slimoe.offload.memory.sequence import Indices as Indices
from slimoe.offload.memory.sequence import Sequence as Sequence
from slimoe.offload.memory.sequence import Tokens as Tokens
from slimoe.offload.memory.sequence import common_prefix as common_prefix
from slimoe.offload.memory.window_cells import WindowCells

_MAX_REMEMBERED = 256
"""Each one is compared with every new prompt."""


class Cells:
    """Lends the cells of a KV cache to sequences and counts who uses each one.

    A cell keeps its token, and with it everything before that token, as long as anyone uses it, so that sequences that
    begin alike share the cells of their beginning. A sequence that is done is remembered, the latest ones longest,
    until its cells are needed. The lowest free cell goes first, so that a sequence alone lies in cells 0, 1, 2, ...

    A model with recurrent layers has `n_states` states, 0 is for others; the first is that of no tokens. A sequence in
    use needs two, so that a step that fails loses nothing. Those that it is told to keep are given up when there are no
    others, those first whose loss costs least.

    Where layers with a window have cells of their own, as many as `windows` lends, so is what they hold before the
    places that it is told to keep. `begin_step` must be called before the tokens of a step are appended.
    """

    def __init__(self, n_cells: int, n_states: int = 0, windows: WindowCells | None = None) -> None:
        assert not (n_states and windows), "recurrent layers beside windows"
        self._windows = windows
        self.n_cells, self._n_states = n_cells, n_states
        self._n_state_users = [0] * n_states
        self.n_users = np.zeros(n_cells, np.int32)
        """I32 [n_cells]: sequences in use or remembered that hold each cell; a cell is free at 0."""
        self._live: dict[Sequence, None] = {}
        self._remembered: dict[Sequence, None] = {}
        self.before_loss: Callable[[Sequence], None] = lambda sequence: None
        """Called before a sequence loses cells or states to others."""

    @classmethod
    def of(cls, size: KVSize, n_window: int, n_more: int = 0) -> "Cells":
        """The cells of a cache of a size; `n_window` and `n_more` are as for `WindowCells`, where it has some."""
        windows = WindowCells(n_window, size.n_window_cells, n_more) if size.n_window_cells else None
        return cls(size.n_cells, size.n_states, windows)

    @property
    def has_states(self) -> bool:
        """Whether the model has recurrent layers."""
        return self._n_states > 0

    @property
    def has_windows(self) -> bool:
        """Whether layers with a window have cells of their own."""
        return self._windows is not None

    @property
    def has_places(self) -> bool:
        """Whether sequences go on only from places that were kept, or that are not long passed."""
        return self.has_states or self.has_windows

    @property
    def n_before(self) -> int:
        """How many tokens before a place layers with a window must hold for it, if they have cells of their own."""
        return 0 if self._windows is None else self._windows.n_before

    def window(self, sequence: Sequence, n_tokens: int) -> Indices | None:
        """The cells of all that its last `n_tokens` see in layers with a window; None if these have none of their own.

        I64, in the order of positions; a view that is valid until the sequence changes.
        """
        if self._windows is None:
            return None
        return sequence.window_cells[max(0, len(sequence) - n_tokens - self._windows.n_before) :]

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

    def begin_step(self) -> None:
        """Notes that all that was appended is computed, or cut off again."""
        if self._windows is not None:
            self._windows.settle()

    def append(self, sequence: Sequence, tokens: Iterable[int], *, is_loaded: bool = False) -> None:
        """Gives new tokens cells of their own; remembered sequences lose theirs for it, the oldest and its end first.

        There must be enough unused cells. Of tokens that are loaded, not computed, layers with a window get cells for
        those only that the next token sees.
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
        if self._windows is None:
            sequence._append(added, cells)
        else:
            self._windows.grows(sequence)
            n_windowed = min(len(added), self._windows.n_before) if is_loaded else len(added)
            lost = np.full(len(added) - n_windowed, NO_CELL)
            sequence._append(added, cells, np.concatenate([lost, self._take_windows(self._windows, n_windowed)]))
        if self._n_states:
            sequence._states[len(sequence)] = state
            self._n_state_users[state] = 1

    def keep(self, sequence: Sequence) -> None:
        """Keeps the state after the last token, or the window before it: others may go on from there too."""
        if sequence._states or self._windows is not None:
            sequence._kept.add(len(sequence))

    def keep_window(self, sequence: Sequence, place: int) -> None:
        """Keeps the window before a place within a sequence, if layers with a window still hold all of it."""
        if self._windows is not None and 0 < place <= len(sequence) and self._usable(sequence, place) == place:
            sequence._kept.add(place)

    def truncate(self, sequence: Sequence, n_kept: int) -> None:
        """Forgets all but the first `n_kept` tokens, with states or windows fewer; what others share stays theirs."""
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
        self._share(known, sequence)

    def holder(self, tokens: Tokens, *, has_state: bool = False, n_windowed: int = 0) -> Sequence | None:
        """A sequence, in use or remembered, that begins with these tokens.

        With `has_state` it has the state after them, and the last `n_windowed` of them in layers with a window.
        """
        begin, end = len(tokens) - n_windowed, len(tokens)
        for sequence in (*self._live, *self._remembered):
            if common_prefix(sequence.tokens, tokens) != len(tokens):
                continue
            if (not has_state or sequence.has_state(end)) and (not n_windowed or sequence.has_windows(begin, end)):
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
                self._share(sequence, other)
                self._touch(other)
                self._cut(sequence, 0)
                return
            if n_common == len(other):
                self._share(other, sequence)
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

        With states it also loses the tokens behind the last state that it still has, and so with windows.
        """
        n_kept = self._usable(sequence, min(n_kept, len(sequence)))
        self.n_users[sequence.cells[n_kept:]] -= 1
        if self._windows is not None:
            self._windows.drop(sequence, n_kept)
            sequence._kept = {place for place in sequence._kept if place <= n_kept}
        sequence._cut(n_kept)
        for place in [place for place in sequence._states if place > n_kept]:
            self._drop_state(sequence, place)

    # --- states and windows --------------------------------------------------------------------------------

    def _usable(self, sequence: Sequence, n_tokens: int) -> int:
        """The last place at or before `n_tokens` from which others can go on."""
        if self._windows is not None:
            return self._windows.usable(sequence, n_tokens)
        if not self._n_states:
            return n_tokens
        return max((place for place in sequence._states if place <= n_tokens), default=0)

    def _share(self, known: Sequence, sequence: Sequence) -> None:
        """Gives a sequence the states and windows of another one; the shorter one's tokens are the other's first."""
        if self._windows is not None:
            self._windows.share(known, sequence)
            sequence._kept |= {place for place in known._kept if place <= len(sequence)}
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

    def _take_windows(self, windows: WindowCells, n: int) -> Indices:
        """Cells of layers with a window, for which sequences lose what is passed, then places, the oldest first."""
        if windows.n_free < n:
            for sequence in (*self._remembered, *self._live):
                windows.drop_passed(sequence, sequence._kept, is_live=sequence in self._live)
        for sequence in (*self._remembered, *self._live):
            order = _by_loss(sorted(sequence._kept), len(sequence)) if windows.n_free < n else []
            while order and windows.n_free < n:
                self.before_loss(sequence)
                sequence._kept.discard(order.pop(0))
                windows.drop_passed(sequence, sequence._kept, is_live=sequence in self._live)
                if not sequence._kept and sequence in self._remembered:
                    self._forget(sequence)
        return windows.take(n)

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
