"""Scores of experts, by several published measures: [E] numbers per layer, the highest for the most useful expert.

They are sums over the tokens that selected an expert, of router weights w that are renormalised as the model does it
and of the norm of the expert's output f. An expert that no token selected scores 0; `unseen` lists those.
"""

from collections.abc import Callable, Sequence

import numpy as np

from slimoe.converter.methods.layer_weight import by_expert, outputs_of, routed_tokens, router_of
from slimoe.converter.stats.statistics import Double, Int, LayerStatistics
from slimoe.offload.errors import UsageError

Score = Callable[[LayerStatistics, Sequence[int]], Double]
"""From a layer's statistics and the experts that its router's rows mean; raises UsageError if the statistics lack a
part.
"""


def unseen(layer: LayerStatistics, least: int = 1) -> tuple[int, ...]:
    """The experts that fewer than `least` tokens selected, whose scores are unreliable.

    Raises UsageError for statistics without sums of the experts' outputs.
    """
    return tuple(np.flatnonzero(outputs_of(layer).n_pick < least).tolist())


def _mean(sums: Double, counts: Int) -> Double:
    return np.divide(sums, counts, out=np.zeros(sums.shape), where=counts > 0)


def _per_token(sums: Double, layer: LayerStatistics) -> Double:
    return sums / max(1, routed_tokens(layer))


def frequency(layer: LayerStatistics, target: Sequence[int]) -> Double:
    """How often the expert is selected, per token."""
    return _per_token(outputs_of(layer).n_pick.astype(np.float64), layer)


def probability(layer: LayerStatistics, target: Sequence[int]) -> Double:
    """The mean of the router's softmax over all tokens, selected or not (arXiv 2406.02500, as released for Mixtral)."""
    n_expert = outputs_of(layer).n_pick.size
    return _per_token(by_expert(router_of(layer).probability, target, n_expert), layer)


def mean_weight(layer: LayerStatistics, target: Sequence[int]) -> Double:
    """The mean expert weight over all tokens, 0 where a token selected others (arXiv 2406.02500, as written)."""
    n_expert = outputs_of(layer).n_pick.size
    return _per_token(by_expert(router_of(layer).share, target, n_expert), layer)


def reap(layer: LayerStatistics, target: Sequence[int]) -> Double:
    """The mean of w |f| over the tokens that selected the expert (REAP, arXiv 2510.13999)."""
    outputs = outputs_of(layer)
    return _mean(outputs.share_norm, outputs.n_pick)


def ean(layer: LayerStatistics, target: Sequence[int]) -> Double:
    """The sum of |f| per token of the text (expert activation norm, arXiv 2510.13999)."""
    return _per_token(outputs_of(layer).norm, layer)


def man(layer: LayerStatistics, target: Sequence[int]) -> Double:
    """The mean of |f| over the tokens that selected the expert (arXiv 2606.15716)."""
    outputs = outputs_of(layer)
    return _mean(outputs.norm, outputs.n_pick)


def msan(layer: LayerStatistics, target: Sequence[int]) -> Double:
    """The mean of |f|^2 over the tokens that selected the expert (arXiv 2606.15716)."""
    outputs = outputs_of(layer)
    return _mean(outputs.norm_square, outputs.n_pick)


def loss(layer: LayerStatistics, target: Sequence[int]) -> Double:
    """The expected KL divergence in nats per token without the expert, by the gradient along the change.

    Raises UsageError for statistics without sensitivities.
    """
    if layer.removals is None:
        problem = "The score loss needs the backward pass, which these statistics are without"
        raise UsageError(f"{problem}. Calibrate without --no-sensitivity, or choose another --score.")
    return layer.removals.skipped


def shares_of_loss(scores: Double, layer: LayerStatistics) -> Double:
    """Scores [E] that mean the same in all layers: shares of what the model loses without the layer's experts.

    Layers differ more in this than their experts do, which no score of one layer knows. Without sensitivities the
    scores stay as they are.
    """
    if layer.removals is None or not scores.sum() > 0:
        return scores
    return np.asarray(scores * (layer.removals.ffn / scores.sum()))


SCORES: dict[str, Score] = {
    "frequency": frequency,
    "probability": probability,
    "share": mean_weight,
    "reap": reap,
    "ean": ean,
    "man": man,
    "msan": msan,
    "loss": loss,
}
"""The scores by the names that recipes use."""
