"""Orders of experts by co-selection: planted ones, and how near the best of all orders the greedy one comes."""

from itertools import pairwise, permutations

import numpy as np
import pytest

from slimoe.converter.methods.expert_order import co_selection_order


def together_of(order: list[int], counts: np.ndarray) -> int:
    return int(sum(counts[one, other] for one, other in pairwise(order)))


def random_counts(rng: np.random.Generator, n_expert: int) -> np.ndarray:
    counts = rng.integers(0, 100, (n_expert, n_expert))
    return np.asarray(counts + counts.T)


@pytest.mark.parametrize("n_expert", [0, 1, 2, 7, 64])
def test_an_order_is_a_permutation(n_expert: int) -> None:
    counts = random_counts(np.random.default_rng(n_expert), n_expert)
    assert sorted(co_selection_order(counts)) == list(range(n_expert))


def test_a_planted_chain_is_found() -> None:
    rng = np.random.default_rng(1)
    planted = rng.permutation(40).tolist()
    counts = rng.integers(0, 10, (40, 40))
    for one, other in pairwise(planted):
        counts[one, other] += 1000
    assert co_selection_order(counts) in (planted, planted[::-1])


def test_clusters_lie_together() -> None:
    rng = np.random.default_rng(2)
    cluster = rng.permutation(np.repeat(np.arange(8), 4))
    counts = rng.integers(0, 10, (32, 32)) + 100 * (cluster[:, None] == cluster[None, :])
    ordered = cluster[co_selection_order(counts)]
    assert np.count_nonzero(np.diff(ordered)) == 7


def test_greedy_has_half_of_the_best_at_least() -> None:
    """Compared with all orders of six experts."""
    rng = np.random.default_rng(3)
    for _ in range(20):
        counts = random_counts(rng, 6)
        best = max(together_of(list(order), counts) for order in permutations(range(6)))
        assert best / 2 <= together_of(co_selection_order(counts), counts) <= best
