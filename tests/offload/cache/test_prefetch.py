"""Predicting which experts later layers select, and learning how sure that is."""

import numpy as np
import pytest
from numpy.typing import NDArray

from slimoe.offload.cache.prefetch import ExpertPredictor, Later

N_ROW, N_USED = 12, 3


def later(targets: NDArray[np.int64] | None = None, n_rows: tuple[int, ...] = (N_ROW, N_ROW)) -> Later:
    stored = np.tile(np.arange(N_ROW), (len(n_rows), 1)) if targets is None else targets
    return Later(tuple(range(5, 5 + len(n_rows))), stored, n_rows, [N_USED] * len(n_rows))


def logits(seed: int, n_later: int = 2) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(n_later, N_ROW)).astype(np.float32)


def test_the_likeliest_come_first() -> None:
    said = logits(1)
    guesses = ExpertPredictor().guess(later(), said)
    for one, row in zip(guesses.experts, said, strict=True):
        assert one.tolist() == np.argsort(-row)[: 2 * N_USED].tolist()
    assert (np.diff(guesses.probabilities, axis=1) <= 0).all()
    assert guesses.probabilities[:, 0].min() > 0.5 > guesses.probabilities[:, N_USED:].max()


@pytest.mark.parametrize("is_right", [True, False])
def test_it_learns_from_step_to_step_and_for_each_distance_by_itself(is_right: bool) -> None:
    predictor = ExpertPredictor()
    first = predictor.guess(later(), logits(0)).probabilities
    for step in range(200):
        predictor.begin()
        guesses = predictor.guess(later(), logits(step)).experts
        if step < 199:
            predictor.settle(5, guesses[0, :N_USED] if is_right else guesses[0, N_USED:])
            predictor.settle(6, logits(step)[1].argsort()[:N_USED])  # the least likely ones: always wrong
    predictor.begin()
    now = predictor.guess(later(), logits(0)).probabilities
    assert (now[0, 0] > 0.95) if is_right else (now[0, 0] < 0.05)
    assert now[1, 0] < 0.05 < first[1, 0]


def test_layers_with_fewer_rows_and_rows_without_a_stored_expert() -> None:
    targets = np.tile(np.arange(N_ROW), (2, 1))
    targets[0, 4] = -1
    said = np.full((2, N_ROW), -5, np.float32)
    said[0, [4, 7]] = 9, 8
    said[1] = np.arange(N_ROW)  # of which the last eight are those of another step
    guesses = ExpertPredictor().guess(later(targets, (N_ROW, 4)), said)
    assert guesses.experts[0, :2].tolist() == [-1, 7]
    assert (guesses.probabilities[0, 0], guesses.probabilities[0, 1] > 0.5) == (0, True)
    assert guesses.experts[1].tolist() == [3, 2, 1, 0, -1, -1]
    assert guesses.probabilities[1, :N_USED].min() > 0.5
    assert guesses.probabilities[1, 4:].max() == 0


def test_a_layer_that_selects_all_it_has() -> None:
    guesses = ExpertPredictor().guess(later(n_rows=(N_USED,)), logits(3, 1))
    assert sorted(guesses.experts[0, :N_USED].tolist()) == [0, 1, 2]
    assert guesses.probabilities[0, 0] > 0.5


def test_what_no_step_settled_teaches_nothing() -> None:
    predictor, fresh = ExpertPredictor(), ExpertPredictor()
    predictor.guess(later(), logits(1))
    predictor.begin()
    found, expected = (one.guess(later(), logits(2)).probabilities for one in (predictor, fresh))
    np.testing.assert_array_equal(found, expected)
