"""Decides how many drafted tokens a step verifies: as many as make its tokens come fastest, by what steps have taken.

A step of more tokens takes longer: it computes more, and meets more experts, which may have to be read. So drafts are
verified where the tokens that are expected of such a step, over its time, are more than those of a step without.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

from slimoe.offload.errors import UsageError
from slimoe.offload.requests.text_drafts import NO_DRAFT, Draft

DraftMode = Literal["none", "ngram", "mtp", "auto"]
DRAFT_MODES: tuple[str, ...] = get_args(DraftMode)
STEP_SIZES = (2, 4, 8, 16)
"""Tokens of steps that verify drafts: few numbers, since a graph is built for each."""
MOST_DRAFTED = STEP_SIZES[-1] - 1
_LIKELY = 0.5
"""The chance of tokens that `ngram` has verified."""
_BEGIN_GAIN, _KEEP_GAIN = 1.1, 1.05
"""By how much more tokens in a second `auto` begins, and goes on: times and chances are estimates, and the largest of
several is rather too large."""
_ASSUMED_SHARE = 0.1
"""The time of another token in a step, over that of a step of one token, where nothing is known."""
_FADING, _MOST_OF_MEAN = 1 / 32, 2.0
"""The weight of the latest step in the time of its size, and by how many times of that a step counts at most: when the
system is busy with something else, single steps take many times as long."""
_FIRST_VALID, _MOST_VALID = 32, 2048
"""Steps after which a time that was not measured again no longer holds, so that its size is tried again: at first,
twice as many each time that it is measured, and at most."""
_COLD_STEPS = 8
"""Nothing is tried in the first steps, which are slow: what they need was never read."""
_FEW_SEEN = 3
"""Of so few steps the fastest counts: what disturbs a step makes it slower."""
_FLATTENING = 0.4
"""Twice as many tokens take longer by a share, which for the next doubling is thought to be this much of it: the more
tokens, the fewer experts that none of the others has selected. Where it is more, two steps find out."""
MOST_PREDICTED = 3
"""Each token that a model's own block drafts takes a run of it, and the further it looks ahead the more often it is
wrong."""
_ASSUMED_RATE, _FORGETTING = 0.7, 1 / 2048
_GROWTH = 2
"""Without a prediction steps are tried that are at most so many times as large as one that was measured."""


@dataclass(slots=True)
class _Measured:
    """Mean seconds of steps of one size, how many there were, and the number of the step up to which that holds."""

    seconds: float
    n_seen: int
    until: int


class StepTimes:
    """What steps of some number of tokens take; of sizes that were not measured it is estimated from those that were.

    `expected` gives the milliseconds that a step of so many tokens is predicted to take, None where nothing is known.
    """

    def __init__(self, expected: Callable[[int], float | None] = lambda n_tokens: None) -> None:
        self._expected = expected
        self._measured: dict[int, _Measured] = {}
        self._n_kv: dict[int, int] = {}
        self._skipped: set[int] = set()
        self._n_steps = 0

    def note(self, n_tokens: int, n_kv: int, seconds: float) -> None:
        """A step of so many tokens, which looked at `n_kv` cells, has taken so long.

        The first with another `n_kv` builds a graph and does not count.
        """
        self._n_steps += 1
        is_new = self._n_kv.get(n_tokens) != n_kv
        self._n_kv[n_tokens] = n_kv
        if is_new and n_tokens not in self._skipped:
            self._skipped.add(n_tokens)
            return
        self._skipped.discard(n_tokens)
        known = self._measured.setdefault(n_tokens, _Measured(seconds, 0, 0))
        known.n_seen += 1
        known.until = self._n_steps + min(_MOST_VALID, _FIRST_VALID << min(16, known.n_seen))
        if known.n_seen <= _FEW_SEEN:
            known.seconds = min(seconds, known.seconds)
        else:
            seconds = min(seconds, _MOST_OF_MEAN * known.seconds)
            known.seconds += max(_FADING, 1 / known.n_seen) * (seconds - known.seconds)

    def seconds(self, n_tokens: int) -> float | None:
        """Seconds of a step of so many tokens; None where nobody knows.

        Beyond what was measured it is thought to be as small as it can well be: what is tried is measured.
        """
        if self._n_steps <= _COLD_STEPS:
            return None
        known = self._measured.get(n_tokens)
        if known is not None and self._n_steps <= known.until:
            return known.seconds
        smaller = [size for size in self._measured if size < n_tokens]
        nearest = max(smaller, default=0)
        as_planned, there = self._expected(n_tokens), self._expected(nearest)
        if not nearest or (nearest * _GROWTH < n_tokens and not (as_planned and there)):
            return None
        seconds = self._measured[nearest].seconds
        before = max((size for size in smaller if size < nearest), default=0)
        ratio = as_planned / there if as_planned and there else math.inf
        if before:
            rise = (seconds / self._measured[before].seconds) ** (1 / math.log2(nearest / before)) - 1
            ratio = min(ratio, (1 + _FLATTENING * max(0.0, rise)) ** math.log2(n_tokens / nearest))
        elif math.isinf(ratio):
            ratio = (1 + _ASSUMED_SHARE * (n_tokens - 1)) / (1 + _ASSUMED_SHARE * (nearest - 1))
        return seconds * ratio

    def forget(self) -> None:
        """Forgets everything: the engine has changed."""
        self._measured.clear()
        self._n_kv.clear()
        self._skipped.clear()
        self._n_steps = 0


def draft_mode(name: str) -> DraftMode:
    """The mode of a name; raises UsageError for an unknown one."""
    for mode in get_args(DraftMode):
        if mode == name:
            return cast(DraftMode, mode)
    raise UsageError(f"The draft mode {name!r} is unknown. Use one of {', '.join(DRAFT_MODES)}.")


class Drafting:
    """What drafts are for: `none` verifies none, `ngram` those that are likely, `auto` those that save time.

    They are drafted from the text; with `mtp` the model's own block drafts them, and all are verified. `auto` has the
    block draft, where there is one, when the text gives nothing, and that saves time.
    What `auto` does depends on the time that steps take; `ngram` does the same for the same text.
    """

    def __init__(self, mode: DraftMode = "none", times: StepTimes | None = None) -> None:
        self.mode, self.times = mode, times or StepTimes()
        self._is_on = self._is_predicting = False
        self.block = BlockFigures()
        self.n_accepted = 0
        """Drafted tokens that became part of answers."""

    @property
    def is_wanted(self) -> bool:
        """Whether drafts are asked for at all."""
        return self.mode != "none"

    def n_predicted(self, n_writing: int, n_again: int | None) -> int:
        """How many tokens behind each answer the model's own block shall draft for a step; 0 where that is no gain."""
        chances = [self.block.rate**depth for depth in range(1, MOST_PREDICTED + 1)]
        plain = self._plain_seconds(n_writing, n_again)
        best, most = 0, _KEEP_GAIN if self._is_predicting else _BEGIN_GAIN
        for n in range(1, MOST_PREDICTED + 1) if plain is not None else ():
            gain = self._gain(n_writing, n_again, chances[:n] * n_writing, n * n_writing * self.block.seconds)
            if gain > most:
                best, most = n, gain
        if not best:
            self.block.rest()
        self._is_predicting = best > 0
        return best

    def choose(
        self, drafts: Sequence[Draft], n_batch: int, n_again: int | None = None, *, is_predicted: bool = False
    ) -> list[Draft]:
        """The beginnings of drafts, one of each request that writes, that a step of at most `n_batch` tokens verifies.

        All of the step together has one of `STEP_SIZES`, or if they are `predicted` any. The likeliest tokens are
        taken, of whichever request. With `n_again` layers are recurrent: the step reads so many tokens again, and after
        a wrong draft the next one reads all that were right, these included.
        """
        n_writing = len(drafts)
        n_plain = n_writing + (n_again or 0)
        if not any(draft.tokens for draft in drafts):
            return [NO_DRAFT] * n_writing
        ranked = sorted(
            ((chance, number) for number, draft in enumerate(drafts) for chance in draft.chances), reverse=True
        )
        possible = range(n_plain + 1, n_plain + len(ranked) + 1) if is_predicted else STEP_SIZES
        sizes = [size for size in possible if n_plain < size <= min(n_batch, n_plain + len(ranked))]
        # What was predicted has taken its time already.
        most = 1.0 if is_predicted else _KEEP_GAIN if self._is_on else _BEGIN_GAIN
        size = self._size(n_writing, n_again, [chance for chance, _ in ranked], sizes, most)
        if not is_predicted:
            self._is_on = size > n_plain
        counts = [0] * n_writing
        for _, number in ranked[: size - n_plain]:
            counts[number] += 1
        return [
            Draft(draft.tokens[:n], draft.chances[:n]) if n else NO_DRAFT
            for draft, n in zip(drafts, counts, strict=True)
        ]

    def _size(
        self, n_writing: int, n_again: int | None, chances: Sequence[float], sizes: Sequence[int], most: float
    ) -> int:
        """Tokens of the step, those that it has without drafts if none gains more than `most` times."""
        n_plain = n_writing + (n_again or 0)
        if not sizes:
            return n_plain
        if self.mode == "ngram":
            return max((size for size in sizes if chances[size - n_plain - 1] >= _LIKELY), default=n_plain)
        best = n_plain
        for size in sizes:
            gain = self._gain(n_writing, n_again, chances[: size - n_plain])
            if gain > most:
                best, most = size, gain
        return best

    def _plain_seconds(self, n_writing: int, n_again: int | None) -> float | None:
        """Seconds of the step without drafts; None where nobody knows."""
        return self.times.seconds(n_writing + (n_again or 0))

    def _gain(
        self, n_writing: int, n_again: int | None, chances: Sequence[float], drafting_seconds: float = 0.0
    ) -> float:
        """How many times as many tokens a second a step gives with drafts of these chances; 0 where nobody knows."""
        n_plain, alone = n_writing + (n_again or 0), self._plain_seconds(n_writing, n_again)
        taken = self.times.seconds(n_plain + len(chances))
        if alone is None or taken is None:
            return 0.0
        if n_again is not None:
            taken += max(0.0, taken - alone) / len(chances) * _expected_again(n_plain, chances)
        return (n_writing + sum(chances)) * alone / (n_writing * (taken + drafting_seconds))


class BlockFigures:
    """What `auto` knows of the block that drafts tokens: how often one is right if those before are, and its time.

    As long as nothing is known, it is thought to be right rather often, and to take no time: what is tried is measured.
    """

    def __init__(self) -> None:
        self.rate, self.seconds = _ASSUMED_RATE, 0.0
        self._n_timed = 0

    def note_time(self, n_drafted: int, seconds: float) -> None:
        """So many tokens were drafted in so long; the first time builds graphs and does not count."""
        self._n_timed += 1
        if self._n_timed > 1 and n_drafted:
            each = seconds / n_drafted
            known = min(each, _MOST_OF_MEAN * self.seconds) if self._n_timed > _FEW_SEEN else each
            self.seconds += max(_FADING, 1 / (self._n_timed - 1)) * (known - self.seconds)

    def note_right(self, n_drafted: int, n_right: int) -> None:
        """Of so many drafted tokens so many were right."""
        for is_right in [True] * n_right + [False] * (n_right < n_drafted):
            self.rate += _FADING * (is_right - self.rate)

    def rest(self) -> None:
        """Nothing was drafted: what was found holds less and less."""
        self.rate += _FORGETTING * (_ASSUMED_RATE - self.rate)


def _expected_again(n_plain: int, chances: Sequence[float]) -> float:
    """How many tokens the step after one of `n_plain` tokens and these drafts is expected to read again."""
    reached = (1.0, *chances)
    return sum((reached[n] - reached[n + 1]) * (n_plain + n) for n in range(len(chances)))
