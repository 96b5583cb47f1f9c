"""What an expert is worth, by several published measures: [E] numbers per layer, the highest for the most useful.

They are sums over the tokens that picked an expert, with shares that are renormalised as the model does it. An expert
that no token picked scores 0; `unseen` tells.
"""

from collections.abc import Callable, Sequence

import numpy as np

from slimoe.converter.methods.layer_weight import by_expert, outputs_of, routed_tokens, router_of
from slimoe.converter.stats.statistics import Double, Int, LayerStatistics

Score = Callable[[LayerStatistics, Sequence[int]], Double]
"""Of a layer and its router's target; raises UsageError when the statistics lack a part."""


def unseen(layer: LayerStatistics, least: int = 1) -> tuple[int, ...]:
    """Experts picked fewer than `least` times, whose scores say little; raises UsageError."""
    return tuple(np.flatnonzero(outputs_of(layer).n_pick < least).tolist())


def _mean(sums: Double, counts: Int) -> Double:
    return np.divide(sums, counts, out=np.zeros(sums.shape), where=counts > 0)


def _per_token(sums: Double, layer: LayerStatistics) -> Double:
    return sums / max(1, routed_tokens(layer))


def frequency(layer: LayerStatistics, target: Sequence[int]) -> Double:
    """Picks per token."""
    return _per_token(outputs_of(layer).n_pick.astype(np.float64), layer)


def probability(layer: LayerStatistics, target: Sequence[int]) -> Double:
    """Mean of the softmax over all tokens, picked or not (arXiv 2406.02500, as released for Mixtral)."""
    n_expert = outputs_of(layer).n_pick.size
    return _per_token(by_expert(router_of(layer).probability, target, n_expert), layer)


def share(layer: LayerStatistics, target: Sequence[int]) -> Double:
    """Mean over all tokens of the share, 0 for a token that picked others (arXiv 2406.02500, as written)."""
    n_expert = outputs_of(layer).n_pick.size
    return _per_token(by_expert(router_of(layer).share, target, n_expert), layer)


def reap(layer: LayerStatistics, target: Sequence[int]) -> Double:
    """Mean of share |f| over picks (REAP, arXiv 2510.13999)."""
    outputs = outputs_of(layer)
    return _mean(outputs.share_norm, outputs.n_pick)


def ean(layer: LayerStatistics, target: Sequence[int]) -> Double:
    """|f| per token of the text: how often, times how much (expert activation norm, arXiv 2510.13999)."""
    return _per_token(outputs_of(layer).norm, layer)


def man(layer: LayerStatistics, target: Sequence[int]) -> Double:
    """Mean of |f| over picks (arXiv 2606.15716)."""
    outputs = outputs_of(layer)
    return _mean(outputs.norm, outputs.n_pick)


def msan(layer: LayerStatistics, target: Sequence[int]) -> Double:
    """Mean of |f|^2 over picks (arXiv 2606.15716)."""
    outputs = outputs_of(layer)
    return _mean(outputs.norm_square, outputs.n_pick)


SCORES: dict[str, Score] = {
    "frequency": frequency,
    "probability": probability,
    "share": share,
    "reap": reap,
    "ean": ean,
    "man": man,
    "msan": msan,
}
"""By the names that recipes use."""
