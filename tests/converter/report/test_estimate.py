"""The estimated time of an evaluation."""

from collections.abc import Callable
from itertools import chain, repeat
from pathlib import Path

import pytest

from slimoe.converter.forward.windows import cut_windows
from slimoe.converter.report.estimate import SOURCE, ReportWork, estimate_seconds
from slimoe.converter.source.open_source import open_source


def _clock(few: float, many: float, first: float) -> Callable[[], float]:
    """Passes take so long, the first of each kind `first`: five of few tokens fill the time that is tried."""
    costs = chain([first], repeat(few, 4), [first], repeat(many))
    now, running = 0.0, False

    def perf_counter() -> float:
        nonlocal now, running
        now += next(costs) if running else 0.0
        running = not running
        return now

    return perf_counter


def test_a_slow_first_pass_does_not_count(moe_checkpoint: Path) -> None:
    windows = cut_windows({"text": [index % 50 for index in range(512)]}, 256)
    clock = _clock(few=0.1, many=0.2, first=0.15)
    source = open_source(moe_checkpoint)
    work = ReportWork(windows, None, 1, 0, 0.0, 0, 0, 1)
    per_token = (0.2 - 0.1) / (256 - 32)
    expected = source.spec.n_layer * (0.1 - 32 * per_token + 512 * per_token)
    assert estimate_seconds(source, work, clock=clock)[SOURCE] == pytest.approx(expected)
