"""Expert weights below which a selected expert may be skipped: published rules, with thresholds of this model.

NAEE (arXiv 2402.14800) compares a token's second expert weight with its first; HOBBIT (arXiv 2411.01433) adds up the
weights of the experts that the router ranks before an expert. Their published values are not used. The thresholds have
the same meaning in the engine's lossy modes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from slimoe.converter.methods.layer_weight import router_of, trace_of
from slimoe.converter.stats.statistics import Int, LayerStatistics, RouterSums
from slimoe.offload.errors import UsageError


def bin_quantile(bins: Int, part: float) -> float:
    """The quantile `part` of the values that a histogram of 0 to 1 has counted, taken as evenly spread within a bin."""
    counts = np.concatenate([[0], np.cumsum(bins)])
    if not counts[-1]:
        return 0.0
    wanted = part * counts[-1]
    index = min(int(np.searchsorted(counts, wanted, side="right")) - 1, int(np.flatnonzero(bins)[-1]))
    return float((index + min(1.0, (wanted - counts[index]) / bins[index])) / bins.size)


def skip_ratio(router: RouterSums, part: float = 0.5) -> float:
    """NAEE's beta: for a `part` of the tokens the second expert weight over the first is below it.

    It is 0 for models whose tokens select one expert.
    """
    return bin_quantile(router.ratio_bins, part)


@dataclass(frozen=True, slots=True)
class GateThresholds:
    """HOBBIT's thresholds T1 (`high`) and T2 (`low`) of the sum of a token's expert weights before an expert.

    If the experts that rank before an expert have more than `high` of the sum, its low-bit copy is good enough; if more
    than `low`, the expert may be skipped.
    """

    high: float
    low: float


def gate_thresholds(layers: Sequence[LayerStatistics], high: float = 0.67, skipped: float = 0.03) -> GateThresholds:
    """The thresholds of a whole model with which a part `high` of the selected experts uses the best copy.

    A part `skipped` of them uses none, and the others the low-bit copy. Raises UsageError for parts that cannot be, as
    the first expert of a token always uses the best copy.
    """
    routed = [one for one in layers if one.router is not None]
    n_used = router_of(routed[0]).rank_count.shape[1] if routed else 1
    if not (1 / n_used <= high <= 1 and 0 <= skipped <= 1 - high):
        raise UsageError(
            f"{high:.0%} of the selected experts in high precision and {skipped:.0%} skipped is not possible with "
            f"{n_used} experts per token. Ask for at least {1 / n_used:.0%} in it and skip at most the rest."
        )
    if n_used == 2:
        bins = np.sum([router_of(one).top_bins for one in routed], axis=0)
        return GateThresholds(bin_quantile(bins, 2 * high - 1), bin_quantile(bins, 1 - 2 * skipped))
    # A bias of the choice can put a smaller weight first.
    weights = [-np.sort(-trace_of(one).shares.astype(np.float64), axis=1) for one in routed]
    # Of every selected expert, the part of its token's expert weights that the experts before it have.
    sums = [np.maximum(one.sum(1, keepdims=True), np.finfo(np.float64).tiny) for one in weights]
    parts = [((one.cumsum(1) - one) / whole).ravel() for one, whole in zip(weights, sums, strict=True)]
    before = np.concatenate(parts) if parts else np.zeros(1)
    return GateThresholds(float(np.quantile(before, high)), float(np.quantile(before, 1 - skipped)))


def low_share(thresholds: GateThresholds) -> float:
    """The part of a token's expert weights below which an expert may use its low-bit copy, whatever they sum up to.

    With two experts per token this is T1.
    """
    return 1.0 - thresholds.high
