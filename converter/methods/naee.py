"""Which experts of a layer can be dropped together: the subset to keep is found by trying all subsets.

Source: NAEE (arXiv 2402.14800), which runs the layer for each subset; here the Gram matrices of the layer's outputs
give the exact error, on their sample of tokens. Tokens of a dropped expert select among the others. If there are too
many subsets, experts are dropped one by one, each time the one whose loss then adds the least error.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, combinations, product
from math import comb, prod

import numpy as np
from numpy.typing import NDArray

from slimoe.converter.methods.expert_drop import group_experts, kept_in_group
from slimoe.converter.methods.gram_policy import LayerGram, policy_error
from slimoe.converter.stats.statistics import Double
from slimoe.offload.errors import UsageError

MOST_SUBSETS = 1000
"""The number of subsets up to which all are tried."""


@dataclass(frozen=True, slots=True)
class Subset:
    """Experts that are kept, ascending, and the mean squared error per token of the layer's output with only them."""

    kept: tuple[int, ...]
    error: float


def best_subset(gram: LayerGram, n_keep: int, most_subsets: int = MOST_SUBSETS, n_group: int = 1) -> Subset:
    """The best `n_keep` experts, as many in each of the `n_group` groups that a router selects first.

    Raises UsageError if they leave the router fewer rows than a token selects, or do not divide into the groups.
    """
    n_expert, n_each = gram.n_expert, kept_in_group(n_keep, n_group)
    groups = group_experts(n_expert, n_group)
    if prod(comb(len(group), n_each) for group in groups) <= most_subsets:
        tried = []
        for parts in product(*(combinations(group, n_each) for group in groups)):
            kept = tuple(chain.from_iterable(parts))
            if _can_keep(gram, kept):
                dropped = set(range(n_expert)) - set(kept)
                tried.append(Subset(kept, float(gram.error(gram.redirected(dropped)).mean()) if dropped else 0.0))
    else:
        tried = [one for one in removals(gram, groups, n_each) if len(one.kept) == n_keep]
    if not tried:
        raise UsageError(
            f"Of {n_expert} experts, {n_keep} cannot be kept: a token selects {gram.spec.n_expert_used}. "
            f"Keep {gram.spec.n_expert_used} to {n_expert} of them."
        )
    return min(tried, key=lambda one: one.error)


def best_subsets(layers: Sequence[tuple[LayerGram, float]], n_keep: int) -> tuple[tuple[int, ...], ...]:
    """The experts to keep of layers, `n_keep` in all, each layer with what a squared error of its output costs.

    Experts are dropped one by one, each time from the layer where that then costs least. Raises UsageError for a number
    that cannot be kept.
    """
    ways = [list(removals(gram)) for gram, _ in layers]
    fewest, most = sum(len(way[-1].kept) for way in ways), sum(len(way[0].kept) for way in ways)
    if not fewest <= n_keep <= most:
        raise UsageError(f"Keeping {n_keep} experts in all is not possible. Keep {fewest} to {most} of them.")
    steps = [0] * len(ways)
    for _ in range(most - n_keep):
        costs = {
            number: weight * (way[step + 1].error - way[step].error)
            for number, (way, step, (_, weight)) in enumerate(zip(ways, steps, layers, strict=True))
            if step + 1 < len(way)
        }
        steps[min(costs, key=lambda number: costs[number])] += 1
    return tuple(way[step].kept for way, step in zip(ways, steps, strict=True))


def _can_keep(gram: LayerGram, kept: tuple[int, ...]) -> bool:
    return int(gram.rows_of(kept).sum()) >= gram.spec.n_expert_used


def removals(gram: LayerGram, groups: Sequence[Sequence[int]] = (), n_each: int = 0) -> Iterator[Subset]:
    """Yields all experts, then one expert fewer each time, as long as the router has rows enough for a token.

    Each time the expert is dropped whose loss adds the least error, so that the result need not be the best subset. At
    least `n_each` experts of each of the `groups` stay.
    """
    kept = tuple(range(gram.n_expert))
    errors, decides = np.zeros(gram.logits.shape[0]), gram.deciding_rows(gram.rows_of(kept))
    yield Subset(kept, 0.0)
    while True:
        staying = {one for group in groups if len({*group} & {*kept}) <= n_each for one in group}
        tried = []
        for expert in kept:
            rest = tuple(one for one in kept if one != expert)
            if expert not in staying and _can_keep(gram, rest):
                tried.append((_errors_after(gram, rest, decides, errors), rest))
        if not tried:
            return
        errors, kept = min(tried, key=lambda one: float(one[0].sum()))
        decides = gram.deciding_rows(gram.rows_of(kept))
        yield Subset(kept, float(errors.mean()))


def _errors_after(gram: LayerGram, kept: tuple[int, ...], decides: NDArray[np.bool_], errors: Double) -> Double:
    """Squared errors [S] with fewer experts; only those of tokens that a dropped row `decides` [S, R] for change."""
    rows = gram.rows_of(kept)
    moved = np.flatnonzero(decides[:, ~rows].any(1))
    new = gram.coefficients(gram.row_weights(rows, moved))
    result = errors.copy()
    result[moved] = policy_error(gram.products[moved], new - gram.coefficients(gram.weights[moved]))
    return result
