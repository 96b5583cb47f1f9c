"""Finds where a text has gone on from its last tokens before: an index of n-grams that grows with the text."""

from array import array
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

N_GRAM = 3
"""The shortest match, in tokens."""
LONGEST = 32
"""Matches are compared no further back."""
_MOST_TRIED = 8
"""Places that are compared for one draft, the latest first: what a token costs does not grow with the text."""
_FACTORS = 2654435761, 40503, 2246822519
_SHIFT, _TABLE = 17, 1 << 15
"""Of a hash of 32 bits the upper 15 choose the place in the table."""
_FEW = 32
"""So many tokens are faster indexed one by one than all at once."""

Places = NDArray[np.int64]


class NgramIndex:
    """The tokens of a text, and for each place the one before it where the same `N_GRAM` tokens end.

    As in LZ77 with hash chains: 12 bytes a token and a table of 128 KiB. N-grams whose hashes are the same are in one
    chain; what differs shows when they are compared.
    """

    def __init__(self) -> None:
        self._tokens = array("i")
        self._previous = array("q")
        self._heads = array("q", [-1]) * _TABLE

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Appends tokens to the text."""
        added = array("i", tokens)
        begin = len(self._tokens)
        self._tokens.extend(added)
        if len(added) > _FEW:
            self._index_all(begin)
            return
        for place in range(begin, len(self._tokens)):
            if place < N_GRAM - 1:
                self._previous.append(-1)
                continue
            row = self._row(place)
            self._previous.append(self._heads[row])
            self._heads[row] = place

    def find(self, n_most: int) -> tuple[int, tuple[int, ...]]:
        """The length of the longest match of the text's end, the latest of equals, and `n_most` tokens from there on.

        Where the match is so near that its continuation reaches the text's end, this is repeated. Without a match the
        length is 0, and there are no tokens.
        """
        end, tokens = len(self._tokens), self._tokens
        if end <= N_GRAM or n_most <= 0:
            return 0, ()
        longest, best = N_GRAM - 1, -1
        place, n_tried = self._previous[end - 1], 0
        while place >= 0 and n_tried < _MOST_TRIED and longest < LONGEST:
            length, most = 0, min(LONGEST, place + 1)
            while length < most and tokens[place - length] == tokens[end - 1 - length]:
                length += 1
            if length > longest:
                longest, best = length, place
            place, n_tried = self._previous[place], n_tried + 1
        if best < 0:
            return 0, ()
        period = end - 1 - best
        following = tokens[best + 1 : best + 1 + min(period, n_most)].tolist()
        return longest, tuple(following[index % period] for index in range(n_most))

    def _row(self, place: int) -> int:
        """The row of the table for the n-gram that ends at a place."""
        tokens = self._tokens[place - N_GRAM + 1 : place + 1]
        return (sum(map(int.__mul__, tokens, _FACTORS)) & 0xFFFFFFFF) >> _SHIFT

    def _index_all(self, begin: int) -> None:
        """The same as one by one for all places from `begin` on."""
        first = max(begin, N_GRAM - 1)
        self._previous.extend([-1] * (first - begin))
        # A copy: an array that numpy looks into cannot grow.
        seen = np.array(self._tokens[first - N_GRAM + 1 :], np.uint64)
        n = len(seen) - N_GRAM + 1
        sums = sum(seen[offset : offset + n] * np.uint64(factor) for offset, factor in enumerate(_FACTORS))
        rows = (np.asarray(sums, np.uint64) & np.uint64(0xFFFFFFFF)) >> np.uint64(_SHIFT)
        order: Places = np.argsort(rows, kind="stable")
        sorted_rows, places = rows[order].astype(np.int64), order + first
        is_first = np.diff(sorted_rows, prepend=-1) != 0
        heads = np.array(self._heads)
        before = np.where(is_first, heads[sorted_rows], np.roll(places, 1))
        is_last = np.roll(is_first, -1)
        heads[sorted_rows[is_last]] = places[is_last]
        previous = np.empty(n, np.int64)
        previous[order] = before
        self._previous.frombytes(previous.tobytes())
        self._heads = array("q", heads.tobytes())
