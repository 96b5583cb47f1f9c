"""Time left of a long work: what was estimated, corrected by how it goes."""

import pytest

from slimoe.server.terminal.work_clock import WorkClock


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("slower", [0.2, 1.0, 6.0])
def test_the_estimate_is_right_soon_however_wrong_it_was(slower: float) -> None:
    """Every kind takes `slower` times what was expected."""
    expected, clock = {"a": 30.0, "b": 60.0, "c": 10.0}, Clock()
    work, end = WorkClock(expected, clock), 100.0 + slower * 100.0
    assert work.left == pytest.approx(100)
    for kind, seconds in expected.items():
        for done in range(11):
            work.step(kind, done, 10)
            if clock.now > 100 + 0.1 * (end - 100):
                assert (end - clock.now) / 1.5 <= work.left <= 1.5 * (end - clock.now) + 1e-9
            clock.now += slower * seconds / 10 if done < 10 else 0.0
    assert work.left == pytest.approx(0)


def test_what_an_earlier_run_did_took_none_of_the_time() -> None:
    clock = Clock()
    work = WorkClock({"layers": 80.0}, clock)
    work.step("layers", 6, 8)
    assert work.left == pytest.approx(20)
    clock.now += 10
    work.step("layers", 7, 8)
    assert work.left == pytest.approx(10)


def test_kinds_that_nobody_expected_count_by_their_steps() -> None:
    clock = Clock()
    work = WorkClock({"a": 10.0}, clock)
    work.step("other", 0, 4)
    clock.now += 5
    work.step("other", 1, 4)
    assert work.left == pytest.approx(15 + 10)
