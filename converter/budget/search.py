"""Refines an allocation by measured divergence: small changes of the best plan so far, of which the best one stays.

Source: EvoPress (arXiv 2410.14649), a (1 + n) evolution whose children are evaluated in stages, few tokens first, each
time fresh ones; the parent takes part in the last stage only. It starts here from the allocator's optimum, and a change
moves bytes from some parts to others, within the budget.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from slimoe.converter.budget.knapsack import Allocation, Part

Choice = tuple[int, ...]
"""The number of each part's option."""
Fitness = Callable[[Choice, int, int], float]
"""The divergence of a choice: on so many tokens, drawn by a seed that is the same for all that are compared."""


@dataclass(frozen=True, slots=True)
class SearchSpec:
    """`stages` are (children that survive, tokens that they are evaluated on); the last also evaluates the parent."""

    n_children: int = 16
    stages: tuple[tuple[int, int], ...] = ((4, 1024), (1, 4096))
    seed: int = 1


@dataclass(frozen=True, slots=True)
class Found:
    """The best choice, its divergence and the first parent's in the last stage of the last generation, generations."""

    choice: Choice
    n_generations: int
    n_improved: int


def start_choice(parts: Sequence[Part], allocation: Allocation) -> Choice:
    """The allocation as numbers of options; the parts must all be in it."""
    return tuple(part.options.index(allocation.chosen[part.name]) for part in parts)


def search(
    parts: Sequence[Part],
    start: Choice,
    budget: int,
    fitness: Fitness,
    seconds: float,
    spec: SearchSpec | None = None,
    on_progress: Callable[[int, float], None] = lambda _generation, _best: None,
    clock: Callable[[], float] = time.monotonic,
) -> Found:
    """Searches for so long; every choice that is evaluated has at most `budget` bytes, or as few as the start has."""
    spec = spec or SearchSpec()
    rng = random.Random(spec.seed)
    budget = max(budget, choice_bytes(parts, start))
    parent, generation, improved, end = start, 0, 0, clock() + seconds
    while clock() < end:
        found: dict[Choice, None] = {}
        for _ in range(8 * spec.n_children):
            child = _mutated(parts, parent, budget, rng)
            if child is not None and child != parent:
                found[child] = None
            if len(found) == spec.n_children:
                break
        children = list(found)
        if not children:
            break
        for stage, (n_kept, n_tokens) in enumerate(spec.stages):
            is_last = stage == len(spec.stages) - 1
            evaluated = [*children, parent] if is_last else children
            seed = rng.getrandbits(32)
            scores = {child: fitness(child, n_tokens, seed) for child in evaluated}
            children = sorted(evaluated, key=lambda child: scores[child])[:n_kept]
        generation += 1
        improved += children[0] != parent
        parent = children[0]
        on_progress(generation, scores[parent])
    return Found(parent, generation, improved)


def choice_bytes(parts: Sequence[Part], choice: Choice) -> int:
    """Bytes of all parts."""
    return sum(part.options[number].n_bytes for part, number in zip(parts, choice, strict=True))


def _mutated(parts: Sequence[Part], parent: Choice, budget: int, rng: random.Random) -> Choice | None:
    """One to three steps up, mostly one, and as many steps down elsewhere as bring the bytes back under the budget."""
    child, ups = list(parent), set()
    for _ in range(min(rng.randint(1, 3), rng.randint(1, 3))):
        part = rng.randrange(len(parts))
        larger = _steps(parts[part], child[part], up=True)
        if larger:
            child[part] = rng.choice(larger)
            ups.add(part)
    others = [part for part in range(len(parts)) if part not in ups]
    rng.shuffle(others)
    for part in others:
        if choice_bytes(parts, tuple(child)) <= budget:
            return tuple(child)
        smaller = _steps(parts[part], child[part], up=False)
        if smaller:
            child[part] = rng.choice(smaller)
    return tuple(child) if choice_bytes(parts, tuple(child)) <= budget else None


def _steps(part: Part, number: int, *, up: bool) -> list[int]:
    """The next sizes in a direction that are worth it: options that no smaller one beats by the statistics."""
    now = part.options[number]
    useful = [
        index
        for index, option in enumerate(part.options)
        if not any(other.n_bytes < option.n_bytes and other.cost < option.cost for other in part.options)
    ]
    ahead = [i for i in useful if (part.options[i].n_bytes > now.n_bytes) == up and i != number]
    ahead = [i for i in ahead if part.options[i].n_bytes != now.n_bytes]
    return sorted(ahead, key=lambda i: abs(part.options[i].n_bytes - now.n_bytes))[:2]
