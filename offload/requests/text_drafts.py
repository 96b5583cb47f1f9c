"""Drafts the next tokens of one answer from its own text, and learns from the answer how often they are right."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

from slimoe.offload.requests.ngram_index import LONGEST, N_GRAM, NgramIndex

_CLASSES = ((N_GRAM, 0.3), (5, 0.45), (8, 0.6), (16, 0.8), (LONGEST, 0.9))
"""Longest matches of classes that are counted apart, and the chance of a token after such a match that is assumed."""
_ASSUMED_WEIGHT = 4.0
"""Tokens that the assumed chance stands for beside those that were seen."""
_MEMORY = 64
"""Tokens over which what was seen fades."""
_SUREST = 0.99


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens that may follow, and for each the chance that it and all before it are right."""

    tokens: tuple[int, ...] = ()
    chances: tuple[float, ...] = ()


NO_DRAFT = Draft()


class TextDrafts:
    """The drafts of one request: what followed on the longest match of the text's end, as it has been until now."""

    def __init__(self) -> None:
        self._index = NgramIndex()
        self._acceptance = Acceptance(_CLASSES)
        self._length, self._drafted = 0, tuple[int, ...]()

    def __len__(self) -> int:
        """Tokens of the text that are known."""
        return len(self._index)

    def go_on(self, tokens: Sequence[int]) -> None:
        """Takes in the tokens that have followed, whether or not they were drafted."""
        for offset, (drafted, token) in enumerate(zip(self._drafted, tokens, strict=False)):
            self._acceptance.note(self._length + offset, is_right=drafted == token)
            if drafted != token:
                break
        self._drafted = ()
        self._index.extend(tokens)

    def propose(self, n_most: int) -> Draft:
        """A draft of at most `n_most` tokens; none where the text's end is new."""
        self._length, self._drafted = self._index.find(n_most)
        if not self._drafted:
            return NO_DRAFT
        lengths = range(self._length, self._length + len(self._drafted))
        return Draft(self._drafted, tuple(accumulate(map(self._acceptance.rate, lengths), mul)))


class Acceptance:
    """How often a drafted token is right, by what there is for it: the length of a match, or a probability.

    `classes` are the largest values of those that are counted together, and the chance that is assumed for them.
    """

    def __init__(self, classes: Sequence[tuple[float, float]]) -> None:
        self._bounds = [most for most, _ in classes]
        self._n_right = [_ASSUMED_WEIGHT * chance for _, chance in classes]
        self._n_seen = [_ASSUMED_WEIGHT] * len(classes)

    def note(self, value: float, *, is_right: bool) -> None:
        """Counts a token for which there was so much."""
        number = self._class_of(value)
        kept = 1 - 1 / _MEMORY
        self._n_right[number] = kept * self._n_right[number] + is_right
        self._n_seen[number] = kept * self._n_seen[number] + 1

    def rate(self, value: float) -> float:
        """The chance of a token for which there is so much, if those before it are right."""
        number = self._class_of(value)
        return min(_SUREST, self._n_right[number] / self._n_seen[number])

    def _class_of(self, value: float) -> int:
        return min(bisect_left(self._bounds, value), len(self._bounds) - 1)
