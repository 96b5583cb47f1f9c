"""How much longer a long work takes, estimated and then corrected. Apart: arithmetic, without a terminal."""

import time
from collections.abc import Callable, Mapping

_TRUST = 0.02
"""Until this fraction of the work is done, the estimate counts for more than what was measured."""


class WorkClock:
    """Estimates the time left of kinds of work that follow each other; `expected` has the seconds of each, in order."""

    def __init__(self, expected: Mapping[str, float], clock: Callable[[], float] = time.monotonic) -> None:
        self._expected, self._clock = dict(expected), clock
        self._spent: dict[str, float] = {}
        self._begin, self._kind = clock(), ""
        self._first = self._done = 0.0

    def step(self, kind: str, done: int, total: int) -> None:
        """Notes that `done` of `total` steps of a kind are done, and that the kinds before it are finished.

        Steps that are done at the first call of a kind count as taking no time: an interrupted run did them.
        """
        fraction = done / total if total else 0.0
        if kind != self._kind:
            now = self._clock()
            self._spent[self._kind] = now - self._begin
            self._begin, self._kind, self._first = now, kind, fraction
        self._done = fraction

    @property
    def left(self) -> float:
        """The seconds that all remaining work is expected to take."""
        elapsed, done = self._clock() - self._begin, self._done - self._first
        current = self._expected.get(self._kind, 0.0)
        finished = [kind for kind in self._spent if kind in self._expected]
        later = sum(s for kind, s in self._expected.items() if kind != self._kind and kind not in self._spent)
        prior = _TRUST * sum(self._expected.values())
        real = sum(self._spent[kind] for kind in finished) + (elapsed if done and current else 0.0)
        planned = sum(self._expected[kind] for kind in finished) + current * done
        pace = (real + prior) / (planned + prior) if planned + prior else 1.0
        of_current = elapsed * (1 - self._done) / done if done else current * (1 - self._done) * pace - elapsed
        return max(0.0, of_current) + later * pace
