"""Expert Drop: which experts of each layer are kept, by any score, and what becomes of the router's rows.

Source: Unified MoE Compression (arXiv 2406.02500), layer by layer and globally. Scores are [E] per layer, the best
highest; a layer without experts has none.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from slimoe.converter.stats.statistics import Double
from slimoe.offload.errors import UsageError

Kept = tuple[tuple[int, ...], ...]
"""Stored experts of the source that are kept, ascending, by layer."""


@dataclass(frozen=True, slots=True)
class Survivors:
    """A layer after some of its experts have been dropped, as a `LayerPlan` has it.

    `experts` are the experts of the source that are kept, `rows` the rows of its router that are kept, and `target`
    says for each row its place in `experts`, or -1 - n for constant n. Constants of the source come first, then one for
    each expert of `replaced`.
    """

    experts: tuple[int, ...]
    rows: tuple[int, ...]
    target: tuple[int, ...]
    replaced: tuple[int, ...] = ()


def redirect(target: Sequence[int], kept: Iterable[int]) -> Survivors:
    """Drops the rows of dropped experts from the router, so that tokens select among the others."""
    experts = tuple(sorted(kept))
    place = {expert: index for index, expert in enumerate(experts)}
    rows = tuple(row for row, expert in enumerate(target) if expert < 0 or expert in place)
    return Survivors(experts, rows, tuple(place.get(target[row], target[row]) for row in rows))


def substitute(target: Sequence[int], kept: Iterable[int]) -> Survivors:
    """Keeps all rows of the router; a row of a dropped expert then means a constant (MoNE, arXiv 2507.00390)."""
    experts = tuple(sorted(kept))
    n_before = max((-expert for expert in target if expert < 0), default=0)
    replaced = tuple(sorted({expert for expert in target if expert >= 0} - set(experts)))
    place = {expert: index for index, expert in enumerate(experts)}
    place |= {expert: -1 - n_before - n for n, expert in enumerate(replaced)}
    return Survivors(experts, tuple(range(len(target))), tuple(place.get(one, one) for one in target), replaced)


def group_experts(n_expert: int, n_group: int) -> tuple[range, ...]:
    """The experts of each of the groups, of neighbouring ones and equally large, that a router selects from first."""
    return tuple(range(n * n_expert // n_group, (n + 1) * n_expert // n_group) for n in range(n_group))


def kept_in_group(n_keep: int, n_group: int, otherwise: str = "put constants in the others' place") -> int:
    """How many of `n_keep` experts each group keeps.

    Raises UsageError where they do not divide into the groups, which names what can be done `otherwise`.
    """
    if n_keep % n_group:
        problem = f"{n_keep} experts do not divide into the {n_group} groups of which the router selects some first"
        raise UsageError(f"{problem}. Keep a multiple of {n_group}, or {otherwise}.")
    return n_keep // n_group


def keep_by_layer(scores: Sequence[Double], n_keep: int, least: int, n_group: int = 1) -> Kept:
    """The best `n_keep` experts of every layer, as many in each of the `n_group` groups that a router selects first.

    Raises UsageError for fewer than `least`, more than a layer has, and a number that does not divide into the groups.
    """
    fewest = min((one.size for one in scores if one.size), default=0)
    if not least <= n_keep <= fewest:
        raise UsageError(f"Keeping {n_keep} experts in each layer is not possible. Keep {least} to {fewest} of them.")
    n_each = kept_in_group(n_keep, n_group)
    kept = []
    for one in scores:
        groups = group_experts(one.size, n_group)
        best = (group[place] for group in groups for place in _best(one[group.start : group.stop])[:n_each])
        kept.append(tuple(sorted(best)))
    return tuple(kept)


def keep_overall(scores: Sequence[Double], n_keep: int, least: int) -> Kept:
    """The best `n_keep` experts of all layers together, but at least `least` in each: as many as a token selects.

    Scores must mean the same in all layers, as `scores.shares_of_loss` do. Raises UsageError for a number that cannot
    be kept.
    """
    order = [_best(one) for one in scores]
    fewest, most = sum(min(least, one.size) for one in scores), sum(one.size for one in scores)
    if not fewest <= n_keep <= most:
        raise UsageError(f"Keeping {n_keep} experts in all is not possible. Keep {fewest} to {most} of them.")
    kept = [set(experts[:least]) for experts in order]
    others = [(-scores[layer][expert], layer, expert) for layer, one in enumerate(order) for expert in one[least:]]
    for _, layer, expert in sorted(others)[: n_keep - fewest]:
        kept[layer].add(expert)
    return tuple(tuple(sorted(experts)) for experts in kept)


def _best(scores: Double) -> list[int]:
    """All experts, the best first; of equally good ones the one of the lower number."""
    assert not np.isnan(scores).any(), "a score is not a number"
    best: list[int] = np.argsort(-scores, kind="stable").tolist()
    return best
