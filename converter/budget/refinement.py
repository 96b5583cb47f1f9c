"""Puts the search to work on a plan: candidates are evaluated by what the model with them says of calibration texts."""

import math
import random
from collections.abc import Callable, Hashable
from dataclasses import replace

import torch
from torch import Tensor

from slimoe.converter.budget.knapsack import Allocation, Option, Part, allocate, least_bytes
from slimoe.converter.budget.options import CONSTANT
from slimoe.converter.budget.planned_source import FittedMatrices, PlannedSource
from slimoe.converter.budget.search import Choice, Factors, Found, SearchSpec, search
from slimoe.converter.budget.trial import divergence
from slimoe.converter.budget.types import TypeAllocator
from slimoe.converter.forward.stream import Sequences, run
from slimoe.converter.layout.plan import CompressPlan
from slimoe.converter.source.model_source import MatrixKey, ModelSource
from slimoe.converter.stats.statistics import Statistics
from slimoe.converter.write.quantiser import PlainQuantiser, statistics_importance

_POOL_SEQUENCES = 64
_TRIES = 4
_CACHE_BYTES = 1 << 32
"""Of values of matrices that were fitted to some type: more makes candidates of large models faster."""


class _Evaluator:
    """Knows the source's answers to a pool of sequences, and compares a plan's with them."""

    def __init__(self, source: ModelSource, statistics: Statistics, cache_bytes: int, n_threads: int) -> None:
        self._source = source
        step = max(1, len(statistics.tokens) // _POOL_SEQUENCES)
        self._pool = statistics.tokens[::step]
        self._behind: dict[int, Tensor] = {}
        is_tied = MatrixKey("output.weight") not in source.shapes
        importance = statistics_importance(statistics, is_tied=is_tied)
        quantiser = PlainQuantiser(importance, without_gain=True, n_threads=n_threads)
        self._fitted = FittedMatrices(source, quantiser, cache_bytes)

    def divergence(self, plan: CompressPlan, n_tokens: int, seed: int) -> float:
        """Mean KL divergence in nats over whole sequences that have about so many tokens."""
        chosen = list(range(len(self._pool)))
        random.Random(seed).shuffle(chosen)
        length = max(1, sum(map(len, self._pool)) // len(self._pool))
        chosen = chosen[: max(1, n_tokens // length)]
        for number in chosen:
            if number not in self._behind:
                self._behind[number] = run(self._source, Sequences((self._pool[number],)))
        model = PlannedSource(self._source, plan, self._fitted)
        behind = run(model, Sequences(tuple(self._pool[number] for number in chosen)))
        return divergence(self._source, torch.cat([self._behind[number] for number in chosen]), model, behind)


def refine(
    source: ModelSource,
    statistics: Statistics,
    allocator: TypeAllocator,
    plan: CompressPlan,
    allocation: Allocation,
    *,
    budget: int,
    seconds: float,
    cache_bytes: int = _CACHE_BYTES,
    n_threads: int = 1,
    on_progress: Callable[[int, float], None] = lambda _generation, _divergence: None,
) -> tuple[CompressPlan, Found]:
    """The best plan that was found in so many seconds, its file of at most `budget` bytes; never worse than `plan` on
    the tokens that the two were compared by. Parts of groups that were given up stay so.

    `plan` has open types, `allocation` is the allocator's. Raises what reading the model does.
    """
    evaluator = _Evaluator(source, statistics, cache_bytes, n_threads)
    plans = _Plans(allocator, plan, allocation, budget)

    def fitness(choice: Choice, n_tokens: int, seed: int) -> float:
        return evaluator.divergence(plans.of(choice), n_tokens, seed)

    found = search(plans.start, plans.n_factors, plans.solve, fitness, seconds, SearchSpec(), on_progress)
    return plans.of(found.choice), found


class _Plans:
    """The plans of choices, and the best choice by factors on the costs: of each layer's attention, of its feed-forward
    part, and of constants in place of its experts.
    """

    def __init__(self, allocator: TypeAllocator, plan: CompressPlan, allocation: Allocation, budget: int) -> None:
        self._allocator, self._plan, self._allocation, self._budget = allocator, plan, allocation, budget
        self._parts = [part for part in allocator.parts if part.name in allocation.chosen]
        keys = {_factor_key(part, option) for part in self._parts for option in part.options}
        self._numbers = {key: number for number, key in enumerate(sorted(keys, key=repr))}
        self.start: Choice = self._choice(allocation)

    @property
    def n_factors(self) -> int:
        """The number of groups of costs."""
        return len(self._numbers)

    def _choice(self, found: Allocation) -> Choice:
        names = [[option.choice for option in part.options] for part in self._parts]
        return tuple(
            options.index(found.chosen[part.name].choice) for part, options in zip(self._parts, names, strict=True)
        )

    def of(self, choice: Choice) -> CompressPlan:
        """The plan of a choice."""
        chosen = {part.name: part.options[number] for part, number in zip(self._parts, choice, strict=True)}
        found = replace(self._allocation, chosen=chosen)
        return self._allocator.typed(self._plan, found)

    def solve(self, factors: Factors) -> Choice:
        """The best choice whose file is within the budget, with costs multiplied; the start's if none is found."""
        scaled = [
            replace(part, options=tuple(self._scaled(part, option, factors) for option in part.options))
            for part in self._parts
        ]
        start_bytes = self._allocation.n_bytes
        room = start_bytes + self._budget - self._allocator.size.of(self.of(self.start))
        for _ in range(_TRIES):
            choice = self._choice(allocate(scaled, max(room, least_bytes(scaled))))
            # Alignment and the header are not among the parts' bytes.
            excess = self._allocator.size.of(self.of(choice)) - self._budget
            if excess <= 0:
                return choice
            room -= excess
        return self.start

    def _scaled(self, part: Part, option: Option, factors: Factors) -> Option:
        return replace(option, cost=option.cost * math.exp(factors[self._numbers[_factor_key(part, option)]]))


def _factor_key(part: Part, option: Option) -> Hashable:
    """Costs with the same key are off alike."""
    return part.name if part.group is None else part.group, option.choice == CONSTANT
