"""Refines an allocation by measured divergence: factors on what statistics say of costs, each of which gives a plan.

What statistics foretell is off by a factor of two or three, mostly by whole layers and kinds of change rather than by
single matrices, so that steps of single matrices hardly show in a measurement. What evolves here are factors, one for
the costs of each group of parts; a knapsack makes the best choice of them, which always spends the whole budget.
EvoPress (arXiv 2410.14649) has the stages, few tokens first and fresh ones each time, with the parents in the last one
only. EEP (arXiv 2407.00945) has the crossover: each factor from one of two good parents.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

Choice = tuple[int, ...]
"""The number of each part's option."""
Factors = tuple[float, ...]
"""The logarithm of the factor of each group's costs."""
Solve = Callable[[Factors], Choice]
"""The best choice within the budget if costs are multiplied by such factors."""
Fitness = Callable[[Choice, int, int], float]
"""The divergence of a choice: on so many tokens, drawn by a seed that is the same for all that are compared."""


@dataclass(frozen=True, slots=True)
class SearchSpec:
    """`stages` are (candidates that survive, tokens that they are evaluated on); the last also evaluates the parents.

    A child has `spread` as the standard deviation of the factors that it changes. The best of all is compared with the
    start on `n_final` tokens.
    """

    n_children: int = 10
    stages: tuple[tuple[int, int], ...] = ((3, 1024), (2, 4096))
    n_final: int = 8192
    spread: float = 0.7
    seed: int = 1


@dataclass(frozen=True, slots=True)
class Found:
    """The best choice, the generations, in how many the best changed, and the divergences that decided at the end.

    `before` is that of the start and `after` that of the choice, both on the same tokens; `after` is never greater.
    """

    choice: Choice
    n_generations: int
    n_improved: int
    before: float
    after: float


_Candidate = tuple[Factors, Choice]


def search(
    start: Choice,
    n_factors: int,
    solve: Solve,
    fitness: Fitness,
    seconds: float,
    spec: SearchSpec | None = None,
    on_progress: Callable[[int, float], None] = lambda _generation, _best: None,
    clock: Callable[[], float] = time.monotonic,
) -> Found:
    """Searches for so long, a generation at least; the result is never worse than `start` on the tokens of the end."""
    spec = spec or SearchSpec()
    rng = random.Random(spec.seed)
    parents: list[_Candidate] = [((0.0,) * n_factors, start)]
    generation, improved, end = 0, 0, clock() + seconds
    while not generation or clock() < end:
        candidates = _children(parents, solve, spec, rng)
        scores: dict[Choice, float] = {}
        for stage, (n_kept, n_tokens) in enumerate(spec.stages):
            if stage == len(spec.stages) - 1:
                candidates = [*parents, *candidates]
            seed = rng.getrandbits(32)
            scores = {choice: fitness(choice, n_tokens, seed) for _, choice in candidates}
            candidates = sorted(candidates, key=lambda one: scores[one[1]])[:n_kept]
        generation += 1
        improved += candidates[0][1] != parents[0][1]
        parents = candidates
        on_progress(generation, scores[parents[0][1]])
    seed, best = rng.getrandbits(32), parents[0][1]
    before = after = fitness(start, spec.n_final, seed)
    if best != start:
        after = fitness(best, spec.n_final, seed)
    if after >= before:
        best, after = start, before
    return Found(best, generation, improved, before, after)


def _children(parents: list[_Candidate], solve: Solve, spec: SearchSpec, rng: random.Random) -> list[_Candidate]:
    """New choices, each once; fewer where factors change nothing."""
    known, children = {choice for _, choice in parents}, list[_Candidate]()
    for _ in range(2 * spec.n_children):
        if len(children) == spec.n_children:
            break
        first, other = rng.choice(parents)[0], rng.choice(parents)[0]
        factors = [rng.choice(pair) for pair in zip(first, other, strict=True)]
        for _ in range(min(rng.randint(1, 4), rng.randint(1, 4), len(factors))):
            factors[rng.randrange(len(factors))] += rng.gauss(0.0, spec.spread)
        choice = solve(tuple(factors))
        if choice not in known:
            known.add(choice)
            children.append((tuple(factors), choice))
    return children
