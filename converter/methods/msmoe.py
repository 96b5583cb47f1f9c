"""Merging of experts that are wanted alike (M-SMoE, arXiv 2310.01334): the most used experts of the whole model are
kept and every other one joins that of its layer whose router logits are most like its own.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from slimoe.converter.methods.expert_groups import ExpertGroups, weighted_groups
from slimoe.converter.methods.parts import outputs_of, router_of
from slimoe.converter.stats.statistics import LayerStatistics, RouterSums
from slimoe.offload.errors import UsageError

Double = NDArray[np.float64]


def logit_similarity(router: RouterSums, target: Sequence[int], n_expert: int) -> Double:
    """Cosines [E, E] of the experts' router logits over all tokens; with several rows, of the rows' mean.

    `target` says which stored expert each row means; rows of novices are left out.
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
