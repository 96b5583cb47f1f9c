"""Drafts the next tokens of one answer from its own text, and learns from the answer how often they are right."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

from slimoe.offload.requests.ngram_index import LONGEST, N_GRAM, NgramIndex

_CLASSES = ((N_GRAM, 0.3), (5, 0.45), (8, 0.6), (16, 0.8), (LONGEST, 0.9))
"""Longest matches of classes that are counted apart, and the chance of a token after such a match that is assumed."""
_CLASS_OF = [sum(length > most for most, _ in _CLASSES) for length in range(LONGEST + 1)]
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
        self._acceptance = Acceptance()
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
        return Draft(self._drafted, tuple(accumulate(self._acceptance.chances(self._length, len(self._drafted)), mul)))


class Acceptance:
    """How often the token that followed on a match before follows again, by the length of the match."""

    def __init__(self) -> None:
        self._n_right = [_ASSUMED_WEIGHT * chance for _, chance in _CLASSES]
        self._n_seen = [_ASSUMED_WEIGHT] * len(_CLASSES)

    def note(self, length: int, *, is_right: bool) -> None:
        """Counts a token after a match of so many tokens."""
        number = _CLASS_OF[min(length, LONGEST)]
        kept = 1 - 1 / _MEMORY
        self._n_right[number] = kept * self._n_right[number] + is_right
        self._n_seen[number] = kept * self._n_seen[number] + 1

    def chances(self, length: int, n: int) -> list[float]:
        """The chance of each of `n` tokens after a match of so many, if those before it are right."""
        rates = [min(_SUREST, right / seen) for right, seen in zip(self._n_right, self._n_seen, strict=True)]
        return [rates[_CLASS_OF[min(at, LONGEST)]] for at in range(length, length + n)]
