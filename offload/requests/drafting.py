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

    They are drafted from the text; with `mtp` the model's own block drafts them, and all are verified.
    What `auto` does depends on the time that steps take; `ngram` does the same for the same text.
    """

    def __init__(self, mode: DraftMode = "none", times: StepTimes | None = None) -> None:
        self.mode, self.times = mode, times or StepTimes()
        self._is_on = False
        self.n_accepted = 0
        """Drafted tokens that became part of answers."""

    @property
    def is_wanted(self) -> bool:
        """Whether drafts are asked for at all."""
        return self.mode != "none"

    def choose(self, drafts: Sequence[Draft], n_batch: int, n_again: int | None = None) -> list[Draft]:
        """The beginnings of drafts, one of each request that writes, that a step of at most `n_batch` tokens verifies.

        All of the step together has one of `STEP_SIZES`. The likeliest tokens are taken, of whichever request. With
        `n_again` layers are recurrent: the step reads so many tokens again, and after a wrong draft the next one reads
        all that were right, these included.
        """
        n_writing = len(drafts)
        n_plain = n_writing + (n_again or 0)
        if not any(draft.tokens for draft in drafts):
            return [NO_DRAFT] * n_writing
        ranked = sorted(
            ((chance, number) for number, draft in enumerate(drafts) for chance in draft.chances), reverse=True
        )
        sizes = [size for size in STEP_SIZES if n_plain < size <= min(n_batch, n_plain + len(ranked))]
        size = self._size(n_writing, n_again, [chance for chance, _ in ranked], sizes)
        counts = [0] * n_writing
        for _, number in ranked[: size - n_plain]:
            counts[number] += 1
        return [
            Draft(draft.tokens[:n], draft.chances[:n]) if n else NO_DRAFT
            for draft, n in zip(drafts, counts, strict=True)
        ]

    def _size(self, n_writing: int, n_again: int | None, chances: Sequence[float], sizes: Sequence[int]) -> int:
        """Tokens of the step, those that it has without drafts if these do not pay."""
        n_plain = n_writing + (n_again or 0)
        if not sizes:
            return n_plain
        if self.mode == "ngram":
            return max((size for size in sizes if chances[size - n_plain - 1] >= _LIKELY), default=n_plain)
        alone = self.times.seconds(n_plain)
        if alone is None:
            return n_plain
        best, most = n_plain, _KEEP_GAIN if self._is_on else _BEGIN_GAIN
        for size in sizes:
            taken, drafted = self.times.seconds(size), chances[: size - n_plain]
            if taken is None:
                continue
            expected = n_writing + sum(drafted)
            if n_again is not None:
                taken += max(0.0, taken - alone) / len(drafted) * _expected_again(n_plain, drafted)
            if expected * alone > most * n_writing * taken:
                best, most = size, expected * alone / (n_writing * taken)
        self._is_on = best > n_plain
        return best


def _expected_again(n_plain: int, chances: Sequence[float]) -> float:
    """How many tokens the step after one of `n_plain` tokens and these drafts is expected to read again."""
    reached = (1.0, *chances)
    return sum((reached[n] - reached[n + 1]) * (n_plain + n) for n in range(len(chances)))
