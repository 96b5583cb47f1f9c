"""Puts the search to work on a plan: candidates are evaluated by what the model with them says of calibration texts."""

import random
from collections.abc import Callable

import torch
from torch import Tensor

from slimoe.converter.budget.knapsack import Allocation
from slimoe.converter.budget.planned_source import FittedMatrices, PlannedSource
from slimoe.converter.budget.search import Choice, Found, SearchSpec, search, start_choice
from slimoe.converter.budget.types import TypeAllocator
from slimoe.converter.forward.stream import Sequences, final_logits, run
from slimoe.converter.layout.plan import CompressPlan
from slimoe.converter.source.model_source import MatrixKey, ModelSource
from slimoe.converter.stats.statistics import Statistics
from slimoe.converter.write.quantiser import PlainQuantiser, statistics_importance

_POOL_SEQUENCES = 64
_ROWS_AT_ONCE = 512
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
        return _divergence(self._source, torch.cat([self._behind[number] for number in chosen]), model, behind)


def _divergence(source: ModelSource, expected: Tensor, model: ModelSource, found: Tensor) -> float:
    total = 0.0
    for begin in range(0, len(expected), _ROWS_AT_ONCE):
        rows = slice(begin, begin + _ROWS_AT_ONCE)
        wanted, said = (final_logits(m, h[rows]).log_softmax(-1) for m, h in ((source, expected), (model, found)))
        total += float((wanted.exp() * (wanted - said)).sum(dtype=torch.float64))
    return total / len(expected)


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
    parts = [part for part in allocator.parts if part.name in allocation.chosen]
    evaluator = _Evaluator(source, statistics, cache_bytes, n_threads)

    def planned(choice: Choice) -> CompressPlan:
        chosen = {part.name: part.options[number] for part, number in zip(parts, choice, strict=True)}
        return allocator.typed(plan, Allocation(chosen, allocation.given_up, allocation.cost_of_groups))

    def fitness(choice: Choice, n_tokens: int, seed: int) -> float:
        one = planned(choice)
        # Alignment is not among the parts' bytes.
        return evaluator.divergence(one, n_tokens, seed) if allocator.size.of(one) <= budget else float("inf")

    start = start_choice(parts, allocation)
    found = search(parts, start, allocation.n_bytes, fitness, seconds, SearchSpec(), on_progress)
    return planned(found.choice), found
