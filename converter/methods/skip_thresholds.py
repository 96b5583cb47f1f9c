"""From which shares on a pick is worth its expert: the thresholds of published rules, measured on this model.

NAEE (arXiv 2402.14800) compares a token's second share with its first, HOBBIT (arXiv 2411.01433) adds up the shares
before a pick. None of their published values are used. The same thresholds mean the same in the engine's lossy modes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from slimoe.converter.methods.layer_weight import router_of, trace_of
from slimoe.converter.stats.statistics import Double, Int, LayerStatistics, RouterSums, TokenTrace
from slimoe.offload.errors import UsageError


def bin_quantile(bins: Int, part: float) -> float:
    """The value below which a `part` of what a histogram of 0 to 1 has counted lies, evenly spread within a bin."""
    counts = np.concatenate([[0], np.cumsum(bins)])
    if not counts[-1]:
        return 0.0
    wanted = part * counts[-1]
    index = min(int(np.searchsorted(counts, wanted, side="right")) - 1, int(np.flatnonzero(bins)[-1]))
    return float((index + min(1.0, (wanted - counts[index]) / bins[index])) / bins.size)


def skip_ratio(router: RouterSums, part: float = 0.5) -> float:
    """NAEE's beta: the second share over the first is below it for a `part` of the tokens. 0 for one pick."""
    return bin_quantile(router.ratio_bins, part)


@dataclass(frozen=True, slots=True)
class GateThresholds:
    """HOBBIT's T1 and T2: a pick behind others that have more than `high` of a token's shares in sum may use a copy of
    fewer bytes, behind more than `low` none.
    """

    high: float
    low: float


def gate_thresholds(layers: Sequence[LayerStatistics], high: float = 0.67, skipped: float = 0.03) -> GateThresholds:
    """Thresholds for a whole model so that a part `high` of the picks uses the best copy and `skipped` none.

    Raises UsageError for parts that cannot be, as the first pick of a token always is high.
    """
    routed = [one for one in layers if one.router is not None]
    n_used = router_of(routed[0]).rank_count.shape[1] if routed else 1
    if not (1 / n_used <= high <= 1 and 0 <= skipped <= 1 - high):
        raise UsageError(
            f"{high:.0%} of the picks in high precision and {skipped:.0%} skipped is not possible with {n_used} picks "
            f"per token. Ask for at least {1 / n_used:.0%} and at most the rest."
        )
    if n_used == 2:
        bins = np.sum([router_of(one).top_bins for one in routed], axis=0)
        return GateThresholds(bin_quantile(bins, 2 * high - 1), bin_quantile(bins, 1 - 2 * skipped))
    before = np.concatenate([_before(trace_of(one)) for one in routed]) if routed else np.zeros(1)
    return GateThresholds(float(np.quantile(before, high)), float(np.quantile(before, 1 - skipped)))


def _before(trace: TokenTrace) -> Double:
    """For every pick, what part of its token's shares the picks before it have."""
    shares = trace.shares.astype(np.float64)
    before: Double = (shares.cumsum(1) - shares) / shares.sum(1, keepdims=True)
    return before.ravel()


def low_share(thresholds: GateThresholds) -> float:
    """The share below which a pick may use a copy of fewer bytes; of two picks those that T1 names."""
    return 1.0 - thresholds.high
