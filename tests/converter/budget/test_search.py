"""The search against a known optimum, and what it promises of every choice that it judges."""

import random
from collections.abc import Callable
from itertools import count, product

from slimoe.converter.budget.knapsack import Option, Part
from slimoe.converter.budget.search import Choice, SearchSpec, choice_bytes, search


def steps() -> Callable[[], float]:
    """A clock that ticks once a generation."""
    ticks = count()
    return lambda: float(next(ticks))


def parts(n_parts: int = 5) -> list[Part]:
    rng = random.Random(5)
    result = []
    for name in range(n_parts):
        weight = rng.random()
        options = tuple(Option(i, 10 * (i + 1), weight / 4**i) for i in range(4))
        result.append(Part(name, options))
    return result


def toy_cost(known: list[Part], choice: Choice) -> float:
    return sum(part.options[number].cost for part, number in zip(known, choice, strict=True))


def test_it_finds_the_best_choice_from_a_bad_one() -> None:
    known, budget = parts(), 120
    choices = product(range(4), repeat=len(known))
    best = min(toy_cost(known, one) for one in choices if choice_bytes(known, one) <= budget)
    start = (3, 3, 1, 0, 0)
    assert choice_bytes(known, start) == budget
    found = search(known, start, budget, lambda one, _n, _seed: toy_cost(known, one), 80, clock=steps())
    assert toy_cost(known, found.choice) == best
    assert found.n_generations == 79
    assert found.n_improved > 0


def test_every_judged_choice_keeps_to_the_budget_and_the_parent_is_never_lost() -> None:
    known, evaluated = parts(), []
    start = (1, 1, 1, 1, 1)

    def fitness(choice: Choice, n_tokens: int, _seed: int) -> float:
        evaluated.append((choice, n_tokens))
        return 0.0 if choice == start else 1.0

    found = search(known, start, 100, fitness, 10, SearchSpec(8, ((3, 10), (1, 20))), clock=steps())
    assert found.choice == start
    assert not found.n_improved
    assert all(choice_bytes(known, choice) <= 100 for choice, _ in evaluated)
    assert {n for choice, n in evaluated if choice == start} == {20}, "the parent is evaluated in the last stage only"


def test_choices_are_compared_on_the_same_tokens() -> None:
    seen: dict[int, set[int]] = {}

    def fitness(_choice: Choice, n_tokens: int, seed: int) -> float:
        seen.setdefault(seed, set()).add(n_tokens)
        return 1.0

    search(parts(), (1, 1, 1, 1, 1), 100, fitness, 5, clock=steps())
    assert all(len(sizes) == 1 for sizes in seen.values())
    assert len(seen) == 2 * 4, "each stage of each generation draws its own"
