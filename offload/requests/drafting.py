"""Decides how many drafted tokens a step verifies: as many as make its tokens come fastest, by what steps have taken.

A step of more tokens takes longer: it computes more, and meets more experts, which may have to be read. So drafts are
verified where the tokens that are expected of such a step, over its time, are more than those of a step without.
"""

from collections.abc import Sequence
from typing import Literal, cast, get_args

from slimoe.offload.errors import UsageError
from slimoe.offload.requests.step_times import StepTimes
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
_SHARE, _LOOKING_SHARE = 1 / 400, 1 / 800
"""Of the time that answers take, what `auto` spends at most on finding out what steps with drafts take, and on looking
for drafts of which none is verified."""
_MOST_SAVED, _MOST_WON, _MOST_OWED = 4.0, 64.0, 8.0
"""How many steps' time of that is saved up, or kept of what drafts have won, and how much more may be lost where it was
measured that drafts pay."""
_LONGEST_REST = 16
"""Drafts are looked for once in so many steps at least."""
MOST_PREDICTED = 3
"""Each token that a model's own block drafts takes a run of it, and the further it looks ahead the more often it is
wrong."""
_ASSUMED_RATE, _ASSUMED_WEIGHT, _FADING, _FORGETTING = 0.7, 4, 1 / 32, 1 / 2048
"""How often a block is thought to be right before it was tried, for how many tokens that stands, the weight of the
latest one, and that of what is assumed for each step in which nothing is predicted."""
_HARDLY_EVER, _TRIED_AGAIN = 0.2, 512
"""With `mtp` a block that is right so rarely drafts only in every so-many-th step."""
_MOST_OF_MEAN, _FEW_TIMED = 2.0, 3
"""By how many times of its mean a time counts at most, once so many are known: when the system is busy with something
else, single ones are many times as long."""


def draft_mode(name: str) -> DraftMode:
    """The mode of a name; raises UsageError for an unknown one."""
    for mode in get_args(DraftMode):
        if mode == name:
            return cast(DraftMode, mode)
    raise UsageError(f"The draft mode {name!r} is unknown. Use one of {', '.join(DRAFT_MODES)}.")


class Drafting:
    """What drafts are for: `none` verifies none, `ngram` those that are likely, `auto` those that save time.

    They are drafted from the text; with `mtp` the model's own block drafts them, and all are verified, as long as it is
    right now and then. `auto` has the block draft, where there is one, when the text gives nothing, and that saves
    time. What `auto` does depends on the time that steps take; `ngram` and `mtp` do the same for the same text.
    """

    def __init__(self, mode: DraftMode = "none", times: StepTimes | None = None) -> None:
        self.mode, self.times = mode, times or StepTimes()
        self._is_on = self._is_predicting = False
        self._allowance, self._rest, self._predicting_seconds = Allowance(), 0.0, 0.0
        self.block = BlockFigures()
        self.n_accepted = 0
        """Drafted tokens that became part of answers."""

    @property
    def is_wanted(self) -> bool:
        """Whether drafts are asked for at all."""
        return self.mode != "none"

    @property
    def is_due(self) -> bool:
        """Whether drafts are wanted now: `auto` does not look for any shortly after it has found none worth it."""
        return self._rest <= 0 if self.mode == "auto" else self.mode != "none"

    def looked(self, seconds: float, *, is_found: bool) -> None:
        """To look for drafts has taken so long, and some were worth it or none."""
        self._rest = 0.0 if is_found else seconds / _LOOKING_SHARE

    def settle(self, n_writing: int, n_gained: int, seconds: float, *, is_plain: bool) -> None:
        """A step has added so many tokens to answers in so long; it `is_plain` without drafts and what follows them."""
        self._rest = min(self._rest - seconds, _LONGEST_REST * seconds)
        is_plain = is_plain and not self._predicting_seconds
        seconds, self._predicting_seconds = seconds + self._predicting_seconds, 0.0
        if is_plain:
            self._allowance.save()
        elif (alone := self.times.seconds(n_writing)) is not None:
            self._allowance.lose(seconds / alone - n_gained / n_writing)

    def predicted(self, n_drafted: int, seconds: float) -> None:
        """The model's own block has drafted so many tokens in so long."""
        self.block.note_time(n_drafted, seconds)
        self._predicting_seconds += seconds

    def n_predicted(self, n_writing: int, n_again: int | None) -> int:
        """How many tokens behind each answer the model's own block shall draft for a step; 0 where that is no gain."""
        if self.mode == "mtp":
            return MOST_PREDICTED if self.block.is_due() else 0
        chances = [self.block.rate**depth for depth in range(1, MOST_PREDICTED + 1)]
        plain = self._plain_seconds(n_writing, n_again)
        best, most = 0, _KEEP_GAIN if self._is_predicting else _BEGIN_GAIN
        counts = [n for n in range(1, MOST_PREDICTED + 1) if self._may_take(n_writing * (n + 1) + (n_again or 0))]
        for n in counts if plain is not None else ():
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
        # What was predicted was allowed before.
        for size in sizes if most == 1 else filter(self._may_take, sizes):
            gain = self._gain(n_writing, n_again, chances[: size - n_plain])
            if gain > most:
                best, most = size, gain
        return best

    def _may_take(self, n_tokens: int) -> bool:
        """Whether there is time left to lose by a step of so many tokens."""
        return self._allowance.may_lose(is_measured=self.times.is_measured(n_tokens))

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


class Allowance:
    """What steps with drafts may lose, in steps without: a small share of these, and what was won by drafts before."""

    def __init__(self) -> None:
        self._left = _MOST_SAVED

    def may_lose(self, *, is_measured: bool) -> bool:
        """Whether a step with drafts may be taken, whose time was measured, or is to be found out."""
        return self._left > (-_MOST_OWED if is_measured else 0.0)

    def save(self) -> None:
        """A step was taken without drafts."""
        self._left = max(self._left, min(_MOST_SAVED, self._left + _SHARE))

    def lose(self, n_steps: float) -> None:
        """A step with drafts took so many steps longer than its tokens would have without; fewer than 0 are won."""
        self._left = min(_MOST_WON, self._left - min(n_steps, _MOST_OWED))


class BlockFigures:
    """What `auto` knows of the block that drafts tokens: how often one is right if those before are, and its time.

    As long as nothing is known, it is thought to be right rather often, and to take no time: what is tried is measured.
    """

    def __init__(self) -> None:
        self.rate, self.seconds = _ASSUMED_RATE, 0.0
        self._n_timed = self._n_judged = self._n_idle = 0

    def note_time(self, n_drafted: int, seconds: float) -> None:
        """So many tokens were drafted in so long; the first time builds graphs and does not count."""
        self._n_timed += 1
        if self._n_timed > 1 and n_drafted:
            each = seconds / n_drafted
            known = min(each, _MOST_OF_MEAN * self.seconds) if self._n_timed > _FEW_TIMED else each
            self.seconds += max(_FADING, 1 / (self._n_timed - 1)) * (known - self.seconds)

    def note_right(self, n_drafted: int, n_right: int) -> None:
        """Of so many drafted tokens so many were right."""
        for is_right in [True] * n_right + [False] * (n_right < n_drafted):
            self._n_judged += 1
            self.rate += max(_FADING, 1 / (_ASSUMED_WEIGHT + self._n_judged)) * (is_right - self.rate)

    def is_due(self) -> bool:
        """Whether the block shall draft for the next step whatever that takes: seldom where it is hardly ever right."""
        self._n_idle = (self._n_idle + 1) % _TRIED_AGAIN if self.rate < _HARDLY_EVER else 0
        return not self._n_idle

    def rest(self) -> None:
        """Nothing was drafted: what was found holds less and less."""
        self.rate += _FORGETTING * (_ASSUMED_RATE - self.rate)


def _expected_again(n_plain: int, chances: Sequence[float]) -> float:
    """How many tokens the step after one of `n_plain` tokens and these drafts is expected to read again."""
    reached = (1.0, *chances)
    return sum((reached[n] - reached[n + 1]) * (n_plain + n) for n in range(len(chances)))
