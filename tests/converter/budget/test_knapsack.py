"""The allocator against trying everything, and what it promises."""

from itertools import pairwise, product

import numpy as np
import pytest

from slimoe.converter.budget.knapsack import Group, Option, Part, allocate
from slimoe.offload.errors import DoesNotFitError


def random_parts(seed: int, n_parts: int, n_options: int = 3) -> list[Part]:
    """Parts whose options cost less the more bytes they have, as types of weights do."""
    rng = np.random.default_rng(seed)
    parts = []
    for index in range(n_parts):
        sizes = np.sort(rng.integers(1, 60, n_options))
        costs = np.sort(rng.random(n_options))[::-1] * rng.random() ** 3
        options = [Option(i, int(b), float(c)) for i, (b, c) in enumerate(zip(sizes, costs, strict=True))]
        parts.append(Part(index, tuple(options)))
    return parts


def least_cost(parts: list[Part], budget: int) -> float:
    choices = product(*(part.options for part in parts))
    return min(sum(o.cost for o in one) for one in choices if sum(o.n_bytes for o in one) <= budget)


@pytest.mark.parametrize("seed", range(20))
def test_near_the_best_of_all_choices_and_never_over_budget(seed: int) -> None:
    parts = random_parts(seed, 8)
    least, most = (sum(pick(o.n_bytes for o in part.options) for part in parts) for pick in (min, max))
    for budget in np.linspace(least, most, 7).astype(int):
        found = allocate(parts, int(budget))
        assert found.n_bytes <= budget
        worst = sum(max(o.cost for o in part.options) for part in parts)
        assert found.cost <= least_cost(parts, int(budget)) + 0.05 * worst
    assert allocate(parts, most).cost == pytest.approx(least_cost(parts, most))
    assert allocate(parts, least).n_bytes == least


def test_more_bytes_never_cost_more() -> None:
    parts = random_parts(3, 40, 6)
    least, most = (sum(pick(o.n_bytes for o in part.options) for part in parts) for pick in (min, max))
    costs = [allocate(parts, int(budget)).cost for budget in np.linspace(least, most, 40)]
    assert all(after <= before * 1.02 for before, after in pairwise(costs))


def test_a_budget_that_nothing_meets_names_the_least() -> None:
    parts = [Part("a", (Option(0, 10, 1.0), Option(1, 20, 0.0))), Part("b", (Option(0, 5, 1.0),))]
    with pytest.raises(DoesNotFitError, match="15 bytes") as error:
        allocate(parts, 14)
    assert error.value.required_bytes == 15


def test_a_group_goes_when_it_is_worth_less_than_its_bytes() -> None:
    """Two layers of two parts; the second layer does next to nothing, so that its bytes buy more in the first."""
    options = (Option("low", 10, 0.5), Option("high", 30, 0.1))
    parts = [Part((layer, e), options, layer) for layer in range(2) for e in range(2)]
    groups = [Group(0, 5.0, 4), Group(1, 0.3, 4)]
    found = allocate(parts, 64, groups)
    assert found.given_up == {1}
    assert {name: option.choice for name, option in found.chosen.items()} == {(0, 0): "high", (0, 1): "high"}
    assert found.cost == pytest.approx(0.5)
    assert found.n_bytes == 60


def test_groups_that_are_dear_stay() -> None:
    options = (Option("low", 10, 0.5), Option("high", 30, 0.1))
    parts = [Part((layer, e), options, layer) for layer in range(2) for e in range(2)]
    found = allocate(parts, 1000, [Group(0, 5.0), Group(1, 5.0)])
    assert not found.given_up
    assert {option.choice for option in found.chosen.values()} == {"high"}
