"""Copies chosen for a budget, against all alternatives and by hand."""

import itertools

import numpy as np

from slimoe.offload.lossy.elastic import Copies, choose_copies


def _bytes_of(chosen: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], high: list[int], low: list[int]) -> int:
    return sum(
        (h if choice & Copies.HIGH else 0) + (w if choice & Copies.LOW else 0)
        for choice, h, w in zip(chosen.ravel(), high, low, strict=True)
    )


def test_copies_are_chosen_nearly_as_well_as_possible() -> None:
    """Against every alternative: short of the best by less than one expert's error, and never over the budget."""
    rng = np.random.default_rng(9)
    for _ in range(60):
        n = int(rng.integers(1, 8))
        low = rng.integers(1, 10, n)
        high, error, value = low + rng.integers(1, 20, n), rng.exponential(size=n), rng.uniform(size=n)
        budget = int(rng.integers(low.sum(), (high + low).sum() + 2))
        chosen = choose_copies(value, high, low, error, budget)
        assert set(chosen) <= {int(Copies.LOW), int(Copies.HIGH)}
        assert _bytes_of(chosen, list(high), list(low)) <= budget
        choices = (np.array(c, np.uint8) for c in itertools.product((Copies.LOW, Copies.HIGH), repeat=n))
        errors = [error[c == Copies.LOW].sum() for c in choices if _bytes_of(c, list(high), list(low)) <= budget]
        left = error[chosen == Copies.LOW].sum()
        assert left - min(errors) <= max(error[chosen == Copies.LOW], default=0.0) + 1e-12


def test_copies_by_hand() -> None:
    value, error = np.array([[0.5, 0.3], [0.1, 0.1]]), np.array([[1.0, 8.0], [4.0, 0.0]])
    high, low = np.full((2, 2), 10), np.full((2, 2), 4)
    none, few, half, most, everything = (choose_copies(value, high, low, error, n).tolist() for n in (3, 8, 28, 34, 40))
    assert none == [[0, 0], [0, 0]]
    assert few == [[1, 1], [0, 0]]  # not even the low ones fit: those that are selected most
    assert half == [[1, 2], [2, 1]]
    assert most == [[2, 2], [2, 1]]
    assert everything == [[2, 2], [2, 2]]


def test_without_errors_the_most_used_are_the_best() -> None:
    value, high, low = np.array([0.1, 0.6, 0.3]), np.full(3, 10), np.full(3, 4)
    assert choose_copies(value, high, low, None, 18).tolist() == [1, 2, 1]


def test_a_high_copy_that_is_no_larger_is_free() -> None:
    value, high, low = np.array([0.9, 0.1]), np.array([10, 4]), np.array([4, 4])
    assert choose_copies(value, high, low, None, 8).tolist() == [1, 2]
