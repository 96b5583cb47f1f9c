"""Watches whether moving experts to a device still pays: compares what it was decided by with what is measured since.

Pure arithmetic on seconds that the caller measures. An expert's seconds on the host, on the device and over the link
are measured again now and then, within a small share of the time: where they are off by far, the choice is made anew
with them. And while layers upload experts, some tokens go without: where these are the faster ones again and again,
experts stay, whatever the arithmetic says.
"""

from collections import deque
from dataclasses import dataclass, replace
from statistics import median
from typing import Literal

from slimoe.offload.machine.upload_costs import (
    ExchangeChoice,
    ExchangeMode,
    UploadCosts,
    choose_exchange,
    shown_ms,
)

Part = Literal["copy", "host", "device"]
PARTS: tuple[Part, ...] = ("copy", "host", "device")
PROBE_SHARE = 0.005
"""Of the steps' time goes to measuring again; more only to make sure of what seems off."""
DRIFT = 1.5
"""What is measured is off when it is so many times more, or less, than what was decided by."""
_LONGEST_PAUSE = 300.0
"""Seconds of steps after which something is measured again, however long the last measurement took."""
_GRAIN = 2e-5
"""Seconds by which a measurement may be off whatever it measures."""
_LATEST, _FEWEST = 5, 3
"""The median of the latest five measurements counts, of three at least: two outliers change nothing."""
_STARTLING, _USUAL_TOKENS, _CALM_TOKENS = 1.5, 16, 64
"""Two tokens that moved experts, so many times as long as the median of those before, have a copy measured and tokens
compared at once, but not again within 64 tokens."""
BLOCK = 8
"""Tokens without uploads that are compared with as many before and after them."""
_FIRST_BLOCK, _NEXT_BLOCK, _LONGEST_BLOCK = 32, 256, 2048
"""Tokens before the first comparison after opening, and between two that found uploads to be no slower: twice as many
after each, unless tokens are suddenly slower."""
_SLOWER, _MUCH_SLOWER, _ENOUGH = 1.05, 1.5, 4
"""Uploads go when comparisons in a row weigh enough: slower counts one, much slower two."""
_BAR, _LONGEST_BAR = 128, 8192
"""Tokens until more may be moved again after less was; twice as many after each time."""
_MOVES = ("static", "swap", "upload")
_WORDS = {"copy": "a copy over the link", "host": "an expert on the CPU", "device": "an expert on the card"}


@dataclass(frozen=True, slots=True)
class TokenSeconds:
    """Median seconds of tokens with uploads and without, as compared last."""

    uploading: float
    staying: float


class Watchdog:
    """The choice of what becomes of experts that a device lacks, and what it rests on, for as long as the engine runs.

    `opened` are the seconds measured at opening, `costs` those that are decided by now, `latest` the medians of what
    was measured last. `since` says how many tokens had been computed when the `choice` was made, `cause` why it was
    made anew, empty for the first one. While `is_still`, nothing is to be moved.
    """

    def __init__(self, opened: UploadCosts, n_used: int) -> None:
        self.opened = self.costs = opened
        self._n_used = n_used
        self.choice: ExchangeChoice = choose_exchange(opened, n_used)
        self.cause = ""
        self.since = self.n_tokens = self.n_changes = 0
        self.tokens: TokenSeconds | None = None
        self._measured: dict[Part, deque[float]] = {part: deque(maxlen=_LATEST) for part in PARTS}
        self._suspect: Part | None = None
        self._n_confirming = 0
        self._usual = deque[float](maxlen=_USUAL_TOKENS)
        self._n_startling = self._calm_until = 0
        self._n_probes = 0
        # Everything was measured just now.
        self._busy, self._owed = 0.0, min(_LONGEST_PAUSE, (opened.copy + opened.host + opened.device) / PROBE_SHARE)
        self._barred_until, self._bar = 0, _BAR
        self._is_overruled = False
        self._start_comparing()

    @property
    def is_still(self) -> bool:
        """Whether nothing is to be moved, because tokens without uploads are compared or were found to be faster."""
        return self._is_overruled or self._is_pausing

    @property
    def latest(self) -> dict[Part, float]:
        """The median of the latest measurements of each part that was measured since opening."""
        return {part: median(found) for part, found in self._measured.items() if found}

    # --- experts --------------------------------------------------------------------------------------------

    def due(self) -> Part | None:
        """What is to be measured again now, None if nothing is."""
        if self._suspect is not None:
            return self._suspect
        return PARTS[self._n_probes % len(PARTS)] if self._busy >= self._owed else None

    def measured(self, part: Part, seconds: float | None, spent: float) -> bool:
        """Notes what an expert took, None if it could not be measured; returns whether costs or choice have changed.

        `spent` are the seconds that measuring took.
        """
        self._owed = max(self._owed, self._busy) + min(_LONGEST_PAUSE, spent / PROBE_SHARE)
        if self._suspect is None:
            self._n_probes += 1
            self._n_confirming = 0
        self._suspect = None
        if seconds is None:
            return False
        found = self._measured[part]
        found.append(seconds)
        expected = getattr(self.costs, part)
        if not _is_off(seconds, expected):
            return False
        if len(found) < _FEWEST or not _is_off(median(found), expected):
            # At once, but not again and again: what is measured in noise is off most of the time. And where nothing is
            # moved, only what would change that is worth the time.
            self._n_confirming += 1
            is_news = self.choice.mode != "static" or self._mode_with(part, seconds) != "static"
            self._suspect = part if is_news and self._n_confirming < _FEWEST else None
            return False
        self.costs = _with(self.costs, part, median(found))
        self._choose(f"{_WORDS[part]} takes {shown_ms(median(found))} in place of {shown_ms(expected)}")
        return True

    # --- tokens ---------------------------------------------------------------------------------------------

    def step(self, seconds: float, *, is_token: bool, has_moved: bool = True) -> bool:
        """Notes a step, which read a single token or not, and whether any expert `has_moved` in it.

        Returns whether the choice or `is_still` has changed.
        """
        self._busy += seconds
        if not is_token:
            return False
        self.n_tokens += 1
        before = self.choice, self.is_still
        if self.n_tokens == self._barred_until:
            self._choose("it is tried again")
        else:
            self._look_at(seconds, has_moved=has_moved)
            if self.choice.mode == "upload":
                self._compare(seconds)
        return before != (self.choice, self.is_still)

    def _look_at(self, seconds: float, *, has_moved: bool) -> None:
        """Suspects the link where tokens have become slower all of a sudden, and experts have moved over it."""
        is_slow = len(self._usual) == _USUAL_TOKENS and seconds > _STARTLING * median(self._usual)
        is_startling = is_slow and has_moved
        self._n_startling = self._n_startling + 1 if is_startling else 0
        self._usual.append(seconds)
        if self._n_startling == 2 and self.n_tokens >= self._calm_until and self._suspect is None:
            self._suspect, self._n_confirming, self._until = "copy", 0, 0
            self._calm_until = self.n_tokens + _CALM_TOKENS

    def _start_comparing(self) -> None:
        self._is_pausing, self._evidence, self._until = False, 0, BLOCK if self.n_changes else _FIRST_BLOCK
        self._next_block = _NEXT_BLOCK
        self._before, self._staying, self._after = deque[float](maxlen=BLOCK), list[float](), list[float]()

    def _compare(self, seconds: float) -> None:
        """Lets a block of tokens go without uploads, and looks at those before and after it."""
        if self._is_pausing:
            self._staying.append(seconds)
            self._is_pausing = len(self._staying) < BLOCK
            return
        if self._staying:
            self._after.append(seconds)
            if len(self._after) < BLOCK:
                return
            self._judge()
        else:
            self._before.append(seconds)
            self._until -= 1
        self._is_pausing = self.choice.mode == "upload" and self._until <= 0

    def _judge(self) -> None:
        """Weighs the comparison that is complete, and stops uploads when enough of them say so."""
        self.tokens = TokenSeconds(median((*self._before, *self._after)), median(self._staying))
        ratio = self.tokens.uploading / self.tokens.staying
        self._evidence = 0 if ratio <= _SLOWER else self._evidence + (2 if ratio > _MUCH_SLOWER else 1)
        self._before.extend(self._after)
        self._staying, self._after = [], []
        self._until = 0 if self._evidence else self._next_block
        self._next_block = _NEXT_BLOCK if self._evidence else min(_LONGEST_BLOCK, 2 * self._next_block)
        if self._evidence >= _ENOUGH:
            took = (
                f"tokens took {shown_ms(self.tokens.uploading)} with uploads, {shown_ms(self.tokens.staying)} without"
            )
            self._is_overruled = True
            self._change(ExchangeChoice("static", f"experts on the card stay: {took}"), took)

    # --- the choice -----------------------------------------------------------------------------------------

    def _choose(self, cause: str) -> None:
        """Chooses by the costs of now; more than before is moved only when the last time is long enough ago."""
        choice = choose_exchange(self.costs, self._n_used)
        if _MOVES.index(choice.mode) > _MOVES.index(self.choice.mode) and self.n_tokens < self._barred_until:
            return
        self._is_overruled = False
        if choice.mode == self.choice.mode:
            self.choice = choice
        else:
            self._change(choice, cause)

    def _mode_with(self, part: Part, seconds: float) -> ExchangeMode:
        """What the choice would be if a part took so long."""
        return choose_exchange(_with(self.costs, part, seconds), self._n_used).mode

    def _change(self, choice: ExchangeChoice, cause: str) -> None:
        if _MOVES.index(choice.mode) < _MOVES.index(self.choice.mode):
            self._barred_until = self.n_tokens + self._bar
            self._bar = min(_LONGEST_BAR, 2 * self._bar)
        self.choice, self.cause, self.since = choice, cause, self.n_tokens
        self.n_changes += 1
        self._start_comparing()


def _is_off(seconds: float, expected: float) -> bool:
    ratio = (seconds + _GRAIN) / (expected + _GRAIN)
    return not 1 / DRIFT <= ratio <= DRIFT


def _with(costs: UploadCosts, part: Part, seconds: float) -> UploadCosts:
    """The costs with one part as measured; what it takes beside the other side's work grows as much."""
    if part == "device":
        return replace(costs, device=seconds)
    if part == "host":
        return replace(costs, host=seconds, host_beside=seconds * _times(costs.host_beside, costs.host))
    return replace(costs, copy=seconds, copy_beside=seconds * _times(costs.copy_beside, costs.copy))


def _times(beside: float, alone: float) -> float:
    return beside / alone if alone else 1.0
