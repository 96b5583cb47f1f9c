"""Which experts of a layer are merged into one, with which weights, and the plans of the merged experts.

HC-SMoE (arXiv 2410.08589) merges experts of similar outputs: their mean outputs are clustered, and the experts of a
cluster averaged, weighted by use; any number of experts can be left in each layer. M-SMoE (arXiv 2310.01334) merges
experts of similar router logits: the most used experts of the whole model are kept, and every other one joins the kept
expert of its layer whose logits are most like its own.

Averages lose nearly all of what experts say that were trained apart: no neuron of one is like any of another, so that
gate, up and down each shrink. Groups can be joined in place of averaged: neurons of all members are then chosen.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from slimoe.converter.layout.plan import ExpertPlan, Types
from slimoe.converter.methods.expert_drop import Kept, group_experts, keep_by_layer, kept_in_group
from slimoe.converter.methods.expert_matrices import align, read_matrices
from slimoe.converter.methods.layer_weight import outputs_of, router_of
from slimoe.converter.source.model_source import ModelSource
from slimoe.converter.stats.statistics import Double, Int, LayerStatistics, OutputSums, RouterSums
from slimoe.offload.errors import UsageError

_NO_GROUPS = "write a native file, whose router keeps all rows"
"""What else can be done where merged experts do not divide into the groups that a router selects first."""


@dataclass(frozen=True, slots=True)
class ExpertGroups:
    """A layer's stored experts, each in one group, whose first member is the one that the others are aligned with.

    `weights` are those of the members in the mean that takes their place; the weights of a group sum to 1.
    """

    members: tuple[tuple[int, ...], ...]
    weights: tuple[tuple[float, ...], ...]

    def group_of(self, expert: int) -> int:
        """The group that a stored expert of the source is in."""
        return next(group for group, members in enumerate(self.members) if expert in members)


def use_weights(use: Double) -> Double:
    """Weights in proportion to `use` that sum to 1; equal ones if nothing was used."""
    total = use.sum()
    return use / total if total > 0 else np.full(len(use), 1 / len(use))


def weighted_groups(members: Iterable[Iterable[int]], use: Double) -> ExpertGroups:
    """Groups whose members weigh as often as they were used; `use` [E] are counts, or anything like them.

    The most used member of a group comes first, and groups are in the order of their first members. The members of a
    group that was never used have equal weights.
    """
    ordered = sorted(tuple(sorted(group, key=lambda expert: (-use[expert], expert))) for group in members)
    return ExpertGroups(tuple(ordered), tuple(tuple(use_weights(use[list(group)]).tolist()) for group in ordered))


def groups_by_number(n_expert: int, n_keep: int, n_router_group: int = 1) -> ExpertGroups:
    """Groups of the sizes that others would have, which mean nothing: all that are too many are in the last one.

    As many are left of each of the groups that a router selects first. Raises UsageError for a number that does not
    divide into these.
    """
    n_each, members = kept_in_group(n_keep, n_router_group, _NO_GROUPS), list[list[int]]()
    for own in group_experts(n_expert, n_router_group):
        members += [[expert] for expert in own[: n_each - 1]] + [list(own[n_each - 1 :])]
    return weighted_groups(members, np.ones(n_expert))


def plan_groups(
    source: ModelSource, layer: int, groups: ExpertGroups, types: Sequence[Types], aligned: bool = True
) -> tuple[ExpertPlan, ...]:
    """The plans of the merged experts, one per group, in the types that `types` has for each group.

    Unless `aligned`, neurons are averaged in the order in which they are stored. Holds two experts and what alignment
    takes. Raises ModelFileError.
    """
    plans = []
    for members, weights, kinds in zip(groups.members, groups.weights, types, strict=True):
        orders: tuple[Int, ...] = ()
        if len(members) > 1:
            first = read_matrices(source, layer, members[0])
            orders = tuple(
                align(first, read_matrices(source, layer, member)) if aligned else np.arange(first.n_ff)
                for member in members[1:]
            )
        plans.append(ExpertPlan(members, kinds, weights=weights, neurons=orders))
    return tuple(plans)


def joined_groups(groups: ExpertGroups, types: Types) -> tuple[ExpertPlan, ...]:
    """The plans of experts whose members lie side by side, with all of their neurons; which are kept is open."""
    pairs = zip(groups.members, groups.weights, strict=True)
    return tuple(ExpertPlan(members, types, weights=weights) for members, weights in pairs)


Metric = Literal["euclidean", "cosine"]


def mean_outputs(outputs: OutputSums) -> Double:
    """Each expert's mean output [E, d] over the tokens that selected it; the layer's mean if no token did."""
    sums = outputs.output.astype(np.float64)
    layer_mean = sums.sum(0) / max(int(outputs.n_pick.sum()), 1)
    counts = outputs.n_pick[:, None]
    return np.where(counts > 0, sums / np.maximum(counts, 1), layer_mean)


def merge_by_output(
    outputs: OutputSums, n_keep: int, metric: Metric = "euclidean", n_router_group: int = 1
) -> ExpertGroups:
    """Groups the experts by average-linkage clustering of their mean outputs, until `n_keep` groups are left.

    Only experts of one of the `n_router_group` groups that a router selects first are merged, and as many are left of
    each. Raises UsageError unless `n_keep` is from 1 to the number of experts, and for one that does not divide.
    """
    n_expert = len(outputs.n_pick)
    if not 1 <= n_keep <= n_expert:
        raise UsageError(f"{n_keep} experts cannot be left of {n_expert}. Choose 1 to {n_expert}.")
    n_each, means = kept_in_group(n_keep, n_router_group, _NO_GROUPS), mean_outputs(outputs)
    clusters = [
        [group[place] for place in cluster]
        for group in group_experts(n_expert, n_router_group)
        for cluster in _clusters(means[group.start : group.stop], n_each, metric)
    ]
    return weighted_groups(clusters, outputs.n_pick.astype(np.float64))


def _clusters(means: Double, n_keep: int, metric: Metric) -> list[list[int]]:
    n_expert = len(means)
    clusters = {expert: [expert] for expert in range(n_expert)}
    if n_keep < n_expert:
        # It takes a second to load, and most plans merge nothing.
        from scipy.cluster.hierarchy import linkage

        distance = "euclidean"
        if metric == "cosine":
            # Normalised here, as scipy's cosine is undefined for an expert of zeros: twice the distance by cosine.
            means = means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), np.finfo(np.float64).tiny)
            distance = "sqeuclidean"
        for step, (a, b, _, _) in enumerate(linkage(means, "average", distance)[: n_expert - n_keep]):
            clusters[n_expert + step] = clusters.pop(int(a)) + clusters.pop(int(b))
    return list(clusters.values())


def logit_similarity(router: RouterSums, target: Sequence[int], n_expert: int) -> Double:
    """Cosines [E, E] of the experts' router logits over all tokens.

    `target` says which stored expert each row of the router means. The logits of an expert of several rows are their
    mean; rows of constant experts are left out.
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
    """The `n_total` most used experts of the whole model, by layer; use is relative to the layer's most used expert.

    Every layer keeps at least its `n_least` most used experts, or all if it has fewer; layers without experts have
    none. Raises UsageError for a total that is too small for this, or larger than the model's number of experts.
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
    """The groups of the `dominant` experts, each joined by the experts most similar to it.

    `similarity` [E, E] compares all experts of the layer; `use` [E] are their weights.
    """
    groups = {expert: [expert] for expert in dominant}
    for expert in range(len(use)):
        if expert not in groups:
            groups[max(dominant, key=lambda one: (float(similarity[expert, one]), -one))].append(expert)
    return weighted_groups(groups.values(), use)


def msmoe(
    layers: Sequence[LayerStatistics], targets: Sequence[Sequence[int]], n_total: int, n_least: int = 1
) -> tuple[ExpertGroups, ...]:
    """M-SMoE's groups of every layer: `n_total` in all, at least `n_least` in each layer with experts.

    `targets` say for each layer what its router's rows mean, as `SourceLayer.target` does. Raises UsageError for a
    total that cannot be, and for statistics without sums of routers or outputs.
    """
    use = _uses(layers, targets)
    return _joining(layers, targets, use, dominant_experts(use, n_total, n_least))


def msmoe_alike(
    layers: Sequence[LayerStatistics], targets: Sequence[Sequence[int]], n_keep: int, n_router_group: int = 1
) -> tuple[ExpertGroups, ...]:
    """M-SMoE's groups with the `n_keep` most used experts left in every layer.

    Only experts of one of the `n_router_group` groups that a router selects first are merged, and as many are left of
    each. Raises UsageError as `msmoe` does, and for a number that does not divide.
    """
    kept_in_group(n_keep, n_router_group, _NO_GROUPS)
    use = _uses(layers, targets)
    return _joining(layers, targets, use, keep_by_layer(use, n_keep, 1, n_router_group), n_router_group)


def _uses(layers: Sequence[LayerStatistics], targets: Sequence[Sequence[int]]) -> list[Double]:
    pairs = zip(layers, targets, strict=True)
    return [outputs_of(one).n_pick.astype(np.float64) if target else np.zeros(0) for one, target in pairs]


def _joining(
    layers: Sequence[LayerStatistics],
    targets: Sequence[Sequence[int]],
    use: Sequence[Double],
    kept: Kept,
    n_router_group: int = 1,
) -> tuple[ExpertGroups, ...]:
    """The groups of the experts `kept`, which the others of the same router's group join."""
    groups = []
    for one, target, counts, dominant in zip(layers, targets, use, kept, strict=True):
        similar = logit_similarity(router_of(one), target, len(counts)) if target else np.zeros((0, 0))
        for own in group_experts(len(counts), n_router_group):
            similar[own.start : own.stop, : own.start] = similar[own.start : own.stop, own.stop :] = -np.inf
        groups.append(merge_by_router(similar, dominant, counts))
    return tuple(groups)
