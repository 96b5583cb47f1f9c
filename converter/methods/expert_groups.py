"""Experts of a layer that become one: which, with which weights, and the plans of the experts that result.

HC-SMoE (arXiv 2410.08589) merges experts that answer alike: clusters of their mean outputs, then a mean weighted by
use, with any number of experts left in each layer. M-SMoE (arXiv 2310.01334) merges experts that are wanted alike: the
most used experts of the whole model are kept, and every other one joins that of its layer whose router logits are most
like its own.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from slimoe.converter.layout.plan import ExpertPlan, Types
from slimoe.converter.methods.expert_matrices import Int, align, read_matrices
from slimoe.converter.methods.layer_weight import outputs_of, router_of
from slimoe.converter.source.model_source import ModelSource
from slimoe.converter.stats.statistics import LayerStatistics, OutputSums, RouterSums
from slimoe.offload.errors import UsageError


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


Metric = Literal["euclidean", "cosine"]


def mean_outputs(outputs: OutputSums) -> NDArray[np.float64]:
    """Each expert's mean output [E, d] over the tokens that picked it; the layer's mean for one that none picked."""
    sums = outputs.output.astype(np.float64)
    layer_mean = sums.sum(0) / max(int(outputs.n_pick.sum()), 1)
    counts = outputs.n_pick[:, None]
    return np.where(counts > 0, sums / np.maximum(counts, 1), layer_mean)


def merge_by_output(outputs: OutputSums, n_keep: int, metric: Metric = "euclidean") -> ExpertGroups:
    """`n_keep` groups: the two clusters with the least mean distance between their members' mean outputs become one,
    again and again.

    Raises UsageError unless there are as many experts.
    """
    n_expert = len(outputs.n_pick)
    if not 1 <= n_keep <= n_expert:
        raise UsageError(f"{n_keep} experts cannot be left of {n_expert}. Choose 1 to {n_expert}.")
    clusters = {expert: [expert] for expert in range(n_expert)}
    if n_keep < n_expert:
        for step, (a, b, _, _) in enumerate(_tree(mean_outputs(outputs), metric)[: n_expert - n_keep]):
            clusters[n_expert + step] = clusters.pop(int(a)) + clusters.pop(int(b))
    return weighted_groups(clusters.values(), outputs.n_pick.astype(np.float64))


def _tree(means: NDArray[np.float64], metric: Metric) -> NDArray[np.float64]:
    """scipy's list of merges; directions are taken by hand, as an expert of zeros has none."""
    # It takes a second to load, and most plans merge nothing.
    from scipy.cluster.hierarchy import linkage

    if metric == "cosine":
        means = means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), np.finfo(np.float64).tiny)
        tree: NDArray[np.float64] = linkage(means, "average", "sqeuclidean")  # twice the distance by cosine
        return tree
    tree = linkage(means, "average", "euclidean")
    return tree


Double = NDArray[np.float64]


def logit_similarity(router: RouterSums, target: Sequence[int], n_expert: int) -> Double:
    """Cosines [E, E] of the experts' router logits over all tokens; with several rows, of the rows' mean.

    `target` says which stored expert each row means; rows of constant experts are left out.
    """
    of_row = np.zeros((n_expert, len(target)))
    for row, expert in enumerate(target):
        if expert >= 0:
            of_row[expert, row] = 1.0
    of_row /= np.maximum(of_row.sum(1, keepdims=True), 1.0)
    products = of_row @ router.logit_product @ of_row.T
    norms = np.sqrt(np.maximum(np.diag(products), np.finfo(np.float64).tiny))
    cosines: Double = products / np.outer(norms, norms)
    return cosines


def dominant_experts(use: Sequence[Double], n_total: int, n_least: int = 1) -> tuple[tuple[int, ...], ...]:
    """The experts of every layer that are kept: those used most in the whole model, each layer's use over its greatest.

    Every layer keeps `n_least`, or all if it has fewer, its own most used. Layers without experts have none. Raises
    UsageError for a total that is too small for this, or larger than all.
    """
    least = sum(min(n_least, len(counts)) for counts in use)
    n_all = sum(map(len, use))
    if not least <= n_total <= n_all:
        raise UsageError(f"{n_total} experts cannot be left of the model's {n_all}. Choose {least} to {n_all}.")
    ranked = sorted(
        (rank >= n_least, -float(counts[expert]) / max(float(counts.max()), 1.0), layer, int(expert))
        for layer, counts in enumerate(use)
        for rank, expert in enumerate(np.argsort(-counts, kind="stable"))
    )
    kept: list[list[int]] = [[] for _ in use]
    for _, _, layer, expert in ranked[:n_total]:
        kept[layer].append(expert)
    return tuple(tuple(sorted(experts)) for experts in kept)


def merge_by_router(similarity: Double, dominant: Sequence[int], use: Double) -> ExpertGroups:
    """Every expert joins the dominant one that `similarity` [E, E] says is most like it; `use` [E] are the weights."""
    groups = {expert: [expert] for expert in dominant}
    for expert in range(len(use)):
        if expert not in groups:
            groups[max(dominant, key=lambda one: (float(similarity[expert, one]), -one))].append(expert)
    return weighted_groups(groups.values(), use)


def msmoe(
    layers: Sequence[LayerStatistics], targets: Sequence[Sequence[int]], n_total: int, n_least: int = 1
) -> tuple[ExpertGroups, ...]:
    """The groups of every layer, `n_total` in all, at least `n_least` in each; no groups in a layer without experts.

    `targets` are the layers' rows, as `SourceLayer` has them. Raises UsageError for a total that cannot be, and
    for statistics without sums of routers or outputs.
    """
    pairs = list(zip(layers, targets, strict=True))
    use = [outputs_of(one).n_pick.astype(np.float64) if target else np.zeros(0) for one, target in pairs]
    groups = []
    for (one, target), counts, dominant in zip(pairs, use, dominant_experts(use, n_total, n_least), strict=True):
        similar = logit_similarity(router_of(one), target, len(counts)) if target else np.zeros((0, 0))
        groups.append(merge_by_router(similar, dominant, counts))
    return tuple(groups)
