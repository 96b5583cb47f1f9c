"""What steps of an engine take, by their number of tokens: measured as they come, and estimated before."""

import math
from collections.abc import Callable
from dataclasses import dataclass

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
        known = self._measured.get(n_tokens)
        if known is None:
            known = self._measured[n_tokens] = _Measured(seconds, 0, 0)
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
        if self.is_measured(n_tokens):
            return self._measured[n_tokens].seconds
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

    def is_measured(self, n_tokens: int) -> bool:
        """Whether steps of so many tokens were measured, and not too long ago."""
        known = self._measured.get(n_tokens)
        return known is not None and self._n_steps <= known.until

    def forget(self) -> None:
        """Forgets everything: the engine has changed."""
        self._measured.clear()
        self._n_kv.clear()
        self._skipped.clear()
        self._n_steps = 0
