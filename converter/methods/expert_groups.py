"""Experts of a layer that become one: which, with which weights, and the plans of the experts that result."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slimoe.converter.layout.plan import ExpertPlan, Types
from slimoe.converter.methods.alignment import align
from slimoe.converter.methods.expert_matrices import Int, read_matrices
from slimoe.converter.source.model_source import ModelSource


@dataclass(frozen=True, slots=True)
class ExpertGroups:
    """A layer's stored experts, each in one group. A group's first member is the one that the others are fitted to.

    `weights` are those of the members in the mean that takes their place; each group's sum to 1.
    """

    members: tuple[tuple[int, ...], ...]
    weights: tuple[tuple[float, ...], ...]

    def group_of(self, expert: int) -> int:
        """The group that a stored expert of the source is in."""
        return next(group for group, members in enumerate(self.members) if expert in members)


def weighted_groups(members: Iterable[Iterable[int]], use: NDArray[np.float64]) -> ExpertGroups:
    """Groups whose members weigh as often as they were used; `use` [E] are counts, or anything like them.

    The most used member of a group comes first, and groups are in the order of their first members. Members weigh the
    same in a group that was never used.
    """
    ordered = sorted(tuple(sorted(group, key=lambda expert: (-use[expert], expert))) for group in members)
    return ExpertGroups(tuple(ordered), tuple(_shares(use[list(group)]) for group in ordered))


def _shares(use: NDArray[np.float64]) -> tuple[float, ...]:
    total = float(use.sum())
    shares = use / total if total > 0 else np.full(len(use), 1 / len(use))
    return tuple(map(float, shares))


def plan_groups(
    source: ModelSource, layer: int, groups: ExpertGroups, types: Sequence[Types], aligned: bool = True
) -> tuple[ExpertPlan, ...]:
    """The result's experts, one per group, of `types` per group; unless `aligned`, neurons are averaged as they lie.

    Holds two experts and what alignment takes. Raises ModelFileError.
    """
    return tuple(
        ExpertPlan(members, kinds, weights=weights, neurons=_orders(source, layer, members, aligned))
        for members, weights, kinds in zip(groups.members, groups.weights, types, strict=True)
    )


def _orders(source: ModelSource, layer: int, members: tuple[int, ...], aligned: bool) -> tuple[Int, ...]:
    if len(members) == 1:
        return ()
    first = read_matrices(source, layer, members[0])
    if not aligned:
        return tuple(np.arange(first.n_ff) for _ in members[1:])
    return tuple(align(first, read_matrices(source, layer, member)) for member in members[1:])
