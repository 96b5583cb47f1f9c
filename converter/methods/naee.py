"""Which experts of a layer can go together: the subset whose output is nearest to the layer's, by trying all.

Source: NAEE (arXiv 2402.14800), which runs the layer for each subset; here the sketch of inner products answers
exactly, on its tokens. Tokens of a dropped expert pick among the others. Where subsets are too many, experts go one by
one, each time the one that then harms least.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np

from slimoe.converter.methods.sketch_policy import LayerSketch, policy_error, row_shares
from slimoe.converter.stats.statistics import Double
from slimoe.offload.errors import UsageError

MOST_SUBSETS = 1000
"""Of so many, all are tried."""


@dataclass(frozen=True, slots=True)
class Subset:
    """Experts that stay, ascending, and the mean squared error per token of the layer's output without the others."""

    kept: tuple[int, ...]
    error: float


def best_subset(sketch: LayerSketch, n_keep: int, most_subsets: int = MOST_SUBSETS) -> Subset:
    """The best `n_keep` experts; raises UsageError when they leave the router fewer rows than a token picks."""
    n_expert = sketch.n_expert
    if comb(n_expert, n_keep) <= most_subsets:
        experts = range(n_expert)
        tried = [_subset(sketch, kept) for kept in combinations(experts, n_keep) if _can_keep(sketch, kept)]
    else:
        tried = [one for one in removals(sketch) if len(one.kept) == n_keep]
    if not tried:
        raise UsageError(
            f"Of {n_expert} experts, {n_keep} cannot be kept: a token picks {sketch.experts.n_expert_used}. "
            f"Keep {sketch.experts.n_expert_used} to {n_expert} of them."
        )
    return min(tried, key=lambda one: one.error)


def _can_keep(sketch: LayerSketch, kept: tuple[int, ...]) -> bool:
    return int(sketch.rows_of(kept).sum()) >= sketch.experts.n_expert_used


def _subset(sketch: LayerSketch, kept: tuple[int, ...]) -> Subset:
    dropped = set(range(sketch.n_expert)) - set(kept)
    return Subset(kept, float(sketch.error(sketch.redirected(dropped)).mean()) if dropped else 0.0)


def removals(sketch: LayerSketch) -> Iterator[Subset]:
    """All experts, then one fewer each time while the router has rows enough; the best to remove, not the best set."""
    kept = tuple(range(sketch.n_expert))
    errors, shares = np.zeros(sketch.logits.shape[0]), sketch.shares
    yield Subset(kept, 0.0)
    while True:
        tried = []
        for expert in kept:
            rest = tuple(one for one in kept if one != expert)
            if _can_keep(sketch, rest):
                tried.append((_errors_after(sketch, rest, shares, errors), rest))
        if not tried:
            return
        errors, kept = min(tried, key=lambda one: float(one[0].sum()))
        shares = row_shares(sketch.logits, sketch.rows_of(kept), sketch.experts)
        yield Subset(kept, float(errors.mean()))


def _errors_after(sketch: LayerSketch, kept: tuple[int, ...], shares: Double, errors: Double) -> Double:
    """Squared errors [S] with fewer experts: only tokens that have picked one of the others now are worked out anew."""
    rows = sketch.rows_of(kept)
    moved = np.flatnonzero((shares[:, ~rows] > 0).any(1))
    new = sketch.coefficients(row_shares(sketch.logits[moved], rows, sketch.experts))
    result = errors.copy()
    result[moved] = policy_error(sketch.gram[moved], new - sketch.coefficients(sketch.shares[moved]))
    return result
