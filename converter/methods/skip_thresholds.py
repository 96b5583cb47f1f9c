"""From which shares on a pick is worth its expert: the thresholds of published rules, measured on this model.

NAEE (arXiv 2402.14800) and MC's ODP (arXiv 2410.06270) compare a token's second share with its first, AdapMoE (arXiv
2408.10284) weighs shares by layer, HOBBIT (arXiv 2411.01433) adds up the shares before a pick. None of their published
values are used. The same thresholds mean the same in the engine's lossy modes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slimoe.converter.methods.layer_weight import LayerWeight
from slimoe.converter.methods.parts import router_of, trace_of
from slimoe.converter.methods.sketch_policy import LayerSketch
from slimoe.converter.stats.statistics import N_BINS, Double, Int, LayerStatistics, RouterSums, TokenTrace
from slimoe.offload.errors import UsageError

_HALVINGS = 30


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


def importance(trace: TokenTrace, lengths: Sequence[int]) -> Double:
    """ODP's importance [T] of tokens: their norm, times the attention they receive per token that can see them.

    `lengths` are those of the sequences. Attention is summed over queries: over keys it would be 1 for every token.
    """
    seers = np.concatenate([np.arange(length, 0, -1) for length in lengths])
    values: Double = trace.norm.astype(np.float64) * trace.received.astype(np.float64) / seers
    return values


def most_important(values: Double, lengths: Sequence[int], part: float = 0.02) -> NDArray[np.bool_]:
    """Marks [T] the highest `part` of each sequence, at least one token unless `part` is 0."""
    marks, begin = np.zeros(values.size, np.bool_), 0
    for length in lengths:
        order = np.argsort(-values[begin : begin + length], kind="stable")
        marks[begin + order[: int(np.ceil(part * length))]] = True
        begin += length
    return marks


@dataclass(frozen=True, slots=True)
class ProtectedRatio:
    """ODP's mu, and which parts of the tokens would lose their second pick: of all, and of the important ones, which
    the rule protects while a prompt is read, but cannot know while an answer is made.
    """

    ratio: float
    skipped: float
    important_skipped: float


def protected_ratio(
    trace: TokenTrace, lengths: Sequence[int], part: float = 0.5, protected: float = 0.02
) -> ProtectedRatio:
    """The ratio below which the second share of a `part` of the unprotected tokens lies."""
    if trace.shares.shape[1] < 2:
        return ProtectedRatio(0.0, 0.0, 0.0)
    shares = trace.shares.astype(np.float64)
    ratios = np.divide(shares[:, 1], shares[:, 0], out=np.ones(len(shares)), where=shares[:, 0] > 0)
    marks = most_important(importance(trace, lengths), lengths, protected)
    if marks.all():
        return ProtectedRatio(0.0, 0.0, 0.0)
    ratio = float(np.quantile(ratios[~marks], part))
    below = ratios < ratio
    return ProtectedRatio(ratio, float(below.mean()), float(below[marks].mean()) if marks.any() else 0.0)


def share_limit(limit: float, sensitivity: float) -> float:
    """AdapMoE's threshold: picks of a lower share cost less than `limit` nats, `sensitivity` per squared share each."""
    return float(np.sqrt(limit / sensitivity)) if sensitivity > 0 else float("inf")


def part_of_one(router: RouterSums, least_share: float) -> float:
    """The part of tokens of two picks that lose the second if shares below `least_share` are skipped."""
    counts = np.concatenate([[0], np.cumsum(router.top_bins)])
    place = np.clip(1.0 - least_share, 0.0, 1.0) * N_BINS
    return float(1.0 - np.interp(place, np.arange(N_BINS + 1), counts) / max(1, counts[-1]))


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


def ratio_within(sketch: LayerSketch, weight: LayerWeight, limit: float) -> float:
    """The largest ratio of a pick's share to its token's largest, up to 1, below which skipping costs at most `limit`
    nats per token, errors of other picks and the growth of the remaining shares included.
    """
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        is_within = weight.cost(float(sketch.error(sketch.skipping(middle)).mean())) <= limit
        low, high = (middle, high) if is_within else (low, middle)
    return low
