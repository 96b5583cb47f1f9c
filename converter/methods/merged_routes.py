"""How tokens reach merged experts: every row of the router stays and means its group, or a group gets one row.

All rows: exact where the merged experts were equal, as both can be picked and their shares add up; native files only.
One row: no linear row has the logit log(e^a + e^b) that a group deserves, so a stock file's rows are near it at best.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slimoe.converter.methods.expert_groups import ExpertGroups
from slimoe.offload.errors import UsageError

Single = NDArray[np.float32]
Double = NDArray[np.float64]
Int = NDArray[np.int64]

_RIDGE = 1e-4


@dataclass(frozen=True, slots=True)
class MergedRoutes:
    """What a `LayerPlan` needs: rows of the source's router that are kept, the group that each means, new values."""

    rows: tuple[int, ...]
    target: tuple[int, ...]
    router: Single | None = None


def keep_rows(target: Sequence[int], groups: ExpertGroups) -> MergedRoutes:
    """All rows, each for the group that its expert is in, or its constant expert; `target` is as in `SourceLayer`."""
    meant = tuple(expert if expert < 0 else groups.group_of(expert) for expert in target)
    return MergedRoutes(tuple(range(len(target))), meant)


@dataclass(frozen=True, slots=True)
class RouterRows:
    """A layer's router [R, d], what each row means, how often it was picked [R], and inputs [n, d] to fit rows on."""

    weight: Single
    target: tuple[int, ...]
    use: Double
    x: Single


def merge_rows(router: RouterRows, groups: ExpertGroups, how: str) -> MergedRoutes:
    """One row for each group, made as `ROW_MERGES` names it; a group of one row keeps it bit for bit.

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
    use = router.use[own]
    shares = use / use.sum() if use.sum() > 0 else np.full(len(own), 1 / len(own))
    return (shares @ router.weight[own]).astype(np.float32)


def _log_sum(router: RouterRows, own: Int) -> Single:
    """Least squares over the inputs, by its difference to the mean row, which it is where inputs say nothing.

    What all groups' logits have in common changes no softmax; the solution is the same with and without such an offset.
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
"""The dominant's row; the mean weighted by use; a least-squares fit to the logarithm of the sum of exponentials."""
