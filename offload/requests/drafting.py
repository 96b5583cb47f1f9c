"""Decides how many drafted tokens a step verifies: as many as make its tokens come fastest, by what steps have taken.

A step of more tokens takes longer: it computes more, and meets more experts, which may have to be read. So drafts are
verified where the tokens that are expected of such a step, over its time, are more than those of a step without.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

from slimoe.offload.errors import UsageError
from slimoe.offload.requests.text_drafts import NO_DRAFT, Draft

DraftMode = Literal["none", "ngram", "auto"]
DRAFT_MODES: tuple[str, ...] = get_args(DraftMode)
STEP_SIZES = (2, 4, 8, 16)
"""Tokens of steps that verify drafts: few numbers, since a graph is built for each."""
MOST_DRAFTED = STEP_SIZES[-1] - 1
_LIKELY = 0.5
"""The chance of tokens that `ngram` has verified."""
_BEGIN_GAIN = 1.05
"""By how much more tokens in a second `auto` begins; it goes on as long as there is any gain."""
_ASSUMED_SHARE = 0.1
"""The time of another token in a step, over that of a step of one token, where nothing is known."""
_FADING = 1 / 16
"""The weight of the latest step in the time of its size."""
_VALID_STEPS = 256
"""A time that was not measured again within so many steps is forgotten, so that its size is tried again."""


@dataclass(slots=True)
class _Measured:
    """Mean seconds of steps of one size, how many there were, and the number of the last."""

    seconds: float
    n_seen: int
    at: int


class StepTimes:
    """What steps of some number of tokens take; those that were not measured are estimated from the nearest that was.

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
        known = self._measured.setdefault(n_tokens, _Measured(0.0, 0, 0))
        known.n_seen, known.at = known.n_seen + 1, self._n_steps
        known.seconds += max(_FADING, 1 / known.n_seen) * (seconds - known.seconds)

    def seconds(self, n_tokens: int) -> float | None:
        """Seconds of a step of so many tokens; None while no step was measured."""
        for size in [size for size in STEP_SIZES if size in self._measured]:
            if self._n_steps - self._measured[size].at > _VALID_STEPS and len(self._measured) > 1:
                del self._measured[size]
        if not self._measured:
            return None
        nearest = min(self._measured, key=lambda size: (abs(size - n_tokens), size))
        return self._measured[nearest].seconds * self._relative(n_tokens) / self._relative(nearest)

    def forget(self) -> None:
        """Forgets everything: the engine has changed."""
        self._measured.clear()
        self._n_kv.clear()
        self._skipped.clear()

    def _relative(self, n_tokens: int) -> float:
        return self._expected(n_tokens) or 1 + _ASSUMED_SHARE * (n_tokens - 1)


def draft_mode(name: str) -> DraftMode:
    """The mode of a name; raises UsageError for an unknown one."""
    for mode in get_args(DraftMode):
        if mode == name:
            return cast(DraftMode, mode)
    raise UsageError(f"The draft mode {name!r} is unknown. Use one of {', '.join(DRAFT_MODES)}.")


class Drafting:
    """What drafts are for: `none` verifies none, `ngram` those that are likely, `auto` those that save time.

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

    def choose(self, drafts: Sequence[Draft], n_batch: int) -> list[Draft]:
        """The beginnings of drafts, one of each request that writes, that a step of at most `n_batch` tokens verifies.

        All of the step together has one of `STEP_SIZES`. The likeliest tokens are taken, of whichever request.
        """
        ranked = sorted(
            ((chance, number) for number, draft in enumerate(drafts) for chance in draft.chances), reverse=True
        )
        n_writing = len(drafts)
        sizes = [size for size in STEP_SIZES if n_writing < size <= min(n_batch, n_writing + len(ranked))]
        size = self._size(n_writing, [chance for chance, _ in ranked], sizes)
        counts = [0] * n_writing
        for _, number in ranked[: size - n_writing]:
            counts[number] += 1
        return [
            Draft(draft.tokens[:n], draft.chances[:n]) if n else NO_DRAFT
            for draft, n in zip(drafts, counts, strict=True)
        ]

    def _size(self, n_writing: int, chances: Sequence[float], sizes: Sequence[int]) -> int:
        """Tokens of the step, `n_writing` for one without drafts."""
        if not sizes:
            return n_writing
        if self.mode == "ngram":
            return max((size for size in sizes if chances[size - n_writing - 1] >= _LIKELY), default=n_writing)
        alone = self.times.seconds(n_writing)
        if alone is None:
            return n_writing
        best, most = n_writing, 1.0 if self._is_on else _BEGIN_GAIN
        for size in sizes:
            taken = self.times.seconds(size)
            expected = n_writing + sum(chances[: size - n_writing])
            if taken is not None and expected * alone > most * n_writing * taken:
                best, most = size, expected * alone / (n_writing * taken)
        self._is_on = best > n_writing
        return best
