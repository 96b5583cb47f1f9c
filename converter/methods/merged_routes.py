"""How tokens reach merged experts: either all rows of the router are kept and mean the group, or a group gets one row.

With all rows the result is exact if the merged experts were equal: a token can select several of them, and their expert
weights add up. Only native files can hold it. With one row it is an approximation, as no linear row has the logit
log(e^a + e^b) of the group; stock files need it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from slimoe.converter.methods.expert_groups import ExpertGroups, use_weights
from slimoe.converter.stats.statistics import Double, Int, Single
from slimoe.offload.errors import UsageError

_RIDGE = 1e-4


@dataclass(frozen=True, slots=True)
class MergedRoutes:
    """What a `LayerPlan` needs: the rows of the source's router that are kept, the group that each of them means, and
    `router` [rows, d], their new values; None for those of the source.
    """

    rows: tuple[int, ...]
    target: tuple[int, ...]
    router: Single | None = None


def keep_rows(target: Sequence[int], groups: ExpertGroups) -> MergedRoutes:
    """Keeps all rows: each means the group that its expert is in, or its constant expert.

    `target` says what each row means in the source, as `SourceLayer.target` does.
    """
    meant = tuple(expert if expert < 0 else groups.group_of(expert) for expert in target)
    return MergedRoutes(tuple(range(len(target))), meant)


@dataclass(frozen=True, slots=True)
class RouterRows:
    """A layer's router: `weight` [R, d] and the stored expert that each row means.

    `use` [R] is how often each row was selected, and `x` [n, d] are inputs to fit new rows to.
    """

    weight: Single
    target: tuple[int, ...]
    use: Double
    x: Single


def merge_rows(router: RouterRows, groups: ExpertGroups, how: str) -> MergedRoutes:
    """Makes one row for each group, in the way of `ROW_MERGES` that `how` names; a group of one row keeps its row.

    Raises UsageError for an unknown name, and for a layer with constant experts, which no stock file holds.
    """
    if how not in ROW_MERGES:
        raise UsageError(f"Router rows cannot be merged by '{how}'. Choose one of {', '.join(ROW_MERGES)}.")
    if min(router.target) < 0:
        raise UsageError(
            "Rows that mean constant experts cannot be merged into those of experts. Keep all rows (native format)."
        )
    weight, rows = router.weight.copy(), []
    for members in groups.members:
        own = np.flatnonzero(np.isin(router.target, members))
        rows.append(int(own[np.argmax(router.use[own])]))
        if len(own) > 1:
            weight[rows[-1]] = ROW_MERGES[how](router, own)
    return MergedRoutes(tuple(rows), tuple(range(len(rows))), weight[rows])


def _dominant(router: RouterRows, own: Int) -> Single:
    row: Single = router.weight[own[np.argmax(router.use[own])]]
    return row


def _mean(router: RouterRows, own: Int) -> Single:
    return (use_weights(router.use[own]) @ router.weight[own]).astype(np.float32)


def _log_sum(router: RouterRows, own: Int) -> Single:
    """The least-squares fit over the inputs of the difference to the mean row; the mean row where inputs say nothing.

    An offset that the logits of all groups have in common changes no softmax, so none is subtracted.
    """
    x, mean = router.x.astype(np.float64), _mean(router, own)
    logits = x @ router.weight[own].T
    top = logits.max(1)
    wanted = top + np.log(np.exp(logits - top[:, None]).sum(1)) - x @ mean
    products = x.T @ x
    products[np.diag_indices_from(products)] += _RIDGE * max(np.trace(products) / len(products), 1e-30)
    return (mean + np.linalg.solve(products, x.T @ wanted)).astype(np.float32)


ROW_MERGES: Mapping[str, Callable[[RouterRows, Int], Single]] = {
    "dominant": _dominant,
    "mean": _mean,
    "log_sum": _log_sum,
}
"""The row of the most used member; the mean of the rows, weighted by use; and a least-squares fit to the logarithm of
the sum of the members' exponentials.
"""
