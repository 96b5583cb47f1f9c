"""Merging of experts that answer alike (HC-SMoE, arXiv 2410.08589): clusters of their mean outputs, then a mean
weighted by use. Needs no pass of its own; every layer may keep another number.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from slimoe.converter.methods.expert_groups import ExpertGroups, weighted_groups
from slimoe.converter.stats.statistics import OutputSums
from slimoe.offload.errors import UsageError

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
