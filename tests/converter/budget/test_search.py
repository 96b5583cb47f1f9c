"""The search against a known optimum, and what it promises of every choice that it judges."""

import math
import random
from collections.abc import Callable
from itertools import count, product

from slimoe.converter.budget.search import Choice, Factors, SearchSpec, search

N_PARTS, N_OPTIONS, BUDGET = 5, 4, 12
SPEC = SearchSpec(8, ((3, 10), (2, 20)), n_final=40)
_RANDOM = random.Random(5)
REAL = [[_RANDOM.random() / 4**option for option in range(N_OPTIONS)] for _ in range(N_PARTS)]
FORETOLD = [[cost * _RANDOM.choice((0.2, 1, 6)) for cost in costs[:1]] * N_OPTIONS for costs in REAL]
FORETOLD = [[costs[0] / 4**option for option in range(N_OPTIONS)] for costs in FORETOLD]
CHOICES = [one for one in product(range(N_OPTIONS), repeat=N_PARTS) if sum(one) <= BUDGET - N_PARTS]


def steps() -> Callable[[], float]:
    """A clock that ticks once a generation."""
    ticks = count()
    return lambda: float(next(ticks))


def cost(costs: list[list[float]], choice: Choice, factors: Factors = (0.0,) * N_PARTS) -> float:
    return sum(math.exp(f) * one[number] for f, one, number in zip(factors, costs, choice, strict=True))


def solve(factors: Factors) -> Choice:
    """The optimum of what is foretold, times factors, by trying everything."""
    return min(CHOICES, key=lambda choice: cost(FORETOLD, choice, factors))


def test_it_finds_what_is_best_where_costs_are_foretold_wrongly() -> None:
    start, best = solve((0.0,) * N_PARTS), min(cost(REAL, one) for one in CHOICES)
    assert cost(REAL, start) > 1.05 * best
    found = search(start, N_PARTS, solve, lambda one, _n, _seed: cost(REAL, one), 30, SPEC, clock=steps())
    assert found.after == cost(REAL, found.choice) == best
    assert found.before == cost(REAL, start)
    assert found.n_generations == 30
    assert found.n_improved > 0


def test_the_start_stays_where_nothing_is_better_in_the_end() -> None:
    start = solve((0.0,) * N_PARTS)

    def fitness(choice: Choice, n_tokens: int, _seed: int) -> float:
        # What looks better on few tokens is worse on many.
        return float(choice == start) if n_tokens < 40 else float(choice != start)

    found = search(start, N_PARTS, solve, fitness, 5, SPEC, clock=steps())
    assert found.choice == start
    assert found.n_improved > 0
    assert found.before == found.after == 0


def test_choices_are_compared_on_the_same_tokens_and_parents_in_the_last_stage_only() -> None:
    seen: dict[int, list[tuple[Choice, int]]] = {}
    start = solve((0.0,) * N_PARTS)

    def fitness(choice: Choice, n_tokens: int, seed: int) -> float:
        seen.setdefault(seed, []).append((choice, n_tokens))
        return cost(REAL, choice)

    search(start, N_PARTS, solve, fitness, 5, SPEC, clock=steps())
    assert all(len({n_tokens for _, n_tokens in some}) == 1 for some in seen.values())
    assert len(seen) == 2 * 5 + 1, "each stage of each generation draws its own, and the end"
    few, many = list(seen.values())[:2]
    assert (start, 10) not in few
    assert (start, 20) in many
