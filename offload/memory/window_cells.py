"""Which cells of layers with a window hold which of a sequence's last tokens.

Such layers look back a few tokens, so their cells are lent again when no window reaches them. A sequence goes on from
a place only where all tokens are held that the next one sees. What is passed is held for as long as nobody needs it.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from slimoe.offload.memory.sequence import NO_CELL, Indices, Sequence


class WindowCells:
    """Lends `n_cells` cells for tokens that see themselves and the `n_window` - 1 before; `Cells` asks it for all.

    At places that are kept so many tokens more are held as `n_more` says.
    """

    def __init__(self, n_window: int, n_cells: int, n_more: int = 0) -> None:
        self.n_before, self._n_more = n_window - 1, n_more
        """Tokens before a place that must be held for a sequence to go on from there."""
        self.n_users = np.zeros(n_cells, np.int32)
        """I32 [n_cells]: sequences that hold each cell; a cell is free at 0."""
        self._grown: dict[Sequence, int] = {}

    @property
    def n_free(self) -> int:
        """Cells that no sequence holds."""
        return len(self.n_users) - int(np.count_nonzero(self.n_users))

    def settle(self) -> None:
        """Notes that what was appended is computed: windows before it need no longer be held."""
        self._grown.clear()

    def grows(self, sequence: Sequence) -> None:
        """Notes that tokens are appended to a sequence: until they are computed, the window before them stays."""
        self._grown.setdefault(sequence, len(sequence))

    def take(self, n: int) -> Indices:
        """The lowest free cells, of which there must be as many; somebody holds them from now on."""
        cells = np.flatnonzero(self.n_users == 0)[:n]
        assert len(cells) == n, "more cells of windows are in use than there can be"
        self.n_users[cells] = 1
        return cells

    def usable(self, sequence: Sequence, n_tokens: int) -> int:
        """The last place at or before `n_tokens` whose whole window a sequence holds."""
        lost = np.flatnonzero(sequence.window_cells[:n_tokens] == NO_CELL)
        begins, ends = np.concatenate([[0], lost + 1]), np.concatenate([lost, [n_tokens]])
        whole = ends - begins >= np.minimum(ends, self.n_before)
        return int(ends[whole].max(initial=0))

    def share(self, known: Sequence, sequence: Sequence) -> None:
        """Lets a sequence hold what another one has of the tokens that both begin with, as far as it lacks them."""
        n = min(len(known), len(sequence))
        theirs, own = known.window_cells[:n], sequence.window_cells[:n]
        taken = (own == NO_CELL) & (theirs != NO_CELL)
        own[taken] = theirs[taken]
        self.n_users[own[taken]] += 1

    def drop(self, sequence: Sequence, first: int) -> None:
        """Gives up what a sequence holds of its tokens from number `first` on."""
        self._give_up(sequence, np.arange(len(sequence)) >= first)

    def drop_passed(self, sequence: Sequence, places: Iterable[int], *, is_live: bool) -> None:
        """Gives up what no window of a sequence reaches, neither at one of the `places` nor, if it is live, its end."""
        n = len(sequence)
        passed = np.ones(n, np.bool_)
        for place in places:
            passed[max(0, place - self.n_before - self._n_more) : place] = False
        if is_live:
            passed[max(0, min(n, self._grown.get(sequence, n)) - self.n_before) :] = False
        self._give_up(sequence, passed)

    def _give_up(self, sequence: Sequence, wanted: NDArray[np.bool_]) -> None:
        cells = sequence.window_cells
        lost = wanted & (cells != NO_CELL)
        self.n_users[cells[lost]] -= 1
        cells[lost] = NO_CELL
