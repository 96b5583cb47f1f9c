"""The soak's own figures: what counts as memory that grows, and as a request that is left behind."""

import pytest

from bench.attacks.soak import memory_drift, unevenness


def test_memory_that_grows_is_seen_without_kills() -> None:
    flat = [(float(second), 1000) for second in range(100)]
    growing = [(float(second), 1000 + second) for second in range(100)]
    assert memory_drift(flat, []) == 0
    assert memory_drift(growing, []) == pytest.approx(1087 / 1037 - 1)
    assert memory_drift([], []) is None


def test_requests_that_are_left_behind_are_seen() -> None:
    assert unevenness([1.0] * 19) is None
    assert unevenness([1.0] * 100) == 1
    assert (unevenness([1.0] * 90 + [5.0] * 10) or 0) > 3
