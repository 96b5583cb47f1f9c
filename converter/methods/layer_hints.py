"""What a native file tells the engine about the experts of a layer: how often they serve, and what doing without costs.

Errors are nats of KL divergence per token if every pick of an expert took an action, as `LayerHints` has them: the
layer's weight times the squared error of its output per token. The weight is taken with the profile over components
that the error of each expert has.
"""

from dataclasses import dataclass, replace

import numpy as np

from slimoe.converter.methods.constant_experts import constant_costs
from slimoe.converter.methods.expert_drop import Survivors
from slimoe.converter.methods.layer_weight import layer_weight, outputs_of, routed_tokens, router_of
from slimoe.converter.methods.sketch_policy import LayerSketch, grown, policy_error, row_shares
from slimoe.converter.stats.statistics import Double, Int, LayerStatistics
from slimoe.offload.model.native_layout import LayerHints

_FEWEST_PICKS = 16
"""With fewer picks in the sketch, the sums over all tokens say more, unless it has all picks that there are."""


@dataclass(frozen=True, slots=True)
class SkipRules:
    """A layer's thresholds, as `skip_thresholds` finds them, None for none; and for each stored expert of the result
    the constant that can stand in for it, or -1.
    """

    skip_ratio: float | None = None
    low_share: float | None = None
    fallback: tuple[int, ...] | None = None


def hints_for(
    layer: LayerStatistics, survivors: Survivors, sketch: LayerSketch | None = None, rules: SkipRules | None = None
) -> LayerHints:
    """Hints of the experts that `survivors` keeps.

    The sketch, if there is one, tells how tokens of dropped experts move and how the outputs of a token's experts go
    together. Without measured sensitivities there are no errors, since they would be no nats. `sensitivity` is nats per
    squared share of skipped picks, as AdapMoE (arXiv 2408.10284) has it. Raises UsageError.
    """
    rules = rules or SkipRules()
    kept = list(survivors.experts)
    use, square = _uses(layer, survivors, sketch)
    hints = LayerHints(
        use=tuple(use.tolist()),
        share_square=tuple(np.divide(square, use, out=np.zeros_like(use), where=use > 0).tolist()),
        fallback=rules.fallback,
        skip_ratio=rules.skip_ratio,
        low_share=rules.low_share,
    )
    if layer.sensitivity is None:
        return hints
    skip = _skip_rates(layer, survivors, sketch)[kept] * square
    sensitivity = float(skip.sum() / square.sum()) if square.sum() else 0.0
    hints = replace(hints, skip_error=tuple(skip.tolist()), sensitivity=sensitivity)
    if rules.fallback is None:
        return hints
    novice = np.where(np.array(rules.fallback) >= 0, _constant_rates(layer)[kept] * square, 0.0)
    return replace(hints, fallback_error=tuple(novice.tolist()))


def _uses(layer: LayerStatistics, survivors: Survivors, sketch: LayerSketch | None) -> tuple[Double, Double]:
    """Picks per token of the kept experts, and the sums of their squared shares per token."""
    outputs, n_tokens, kept = outputs_of(layer), max(1, routed_tokens(layer)), list(survivors.experts)
    use, square = outputs.n_pick[kept] / n_tokens, outputs.share_square[kept] / n_tokens
    if sketch is None or len(survivors.rows) == sketch.target.size:
        return use, square
    before, after = _sketched_uses(sketch, sketch.shares), _sketched_uses(sketch, _shares(sketch, survivors))
    # The sketch has fewer tokens: only what tokens of dropped experts add is taken from it.
    more_use, more_square = np.maximum(after - before, 0.0)[:, kept]
    return use + more_use, square + more_square


def _sketched_uses(sketch: LayerSketch, shares: Double) -> Double:
    """Picks and squared shares [2, E] per token of the sketch."""
    result = np.zeros((2, sketch.n_expert))
    np.add.at(result[0], sketch.target, (shares > 0).mean(0))
    np.add.at(result[1], sketch.target, np.square(shares).mean(0))
    return result


def _shares(sketch: LayerSketch, survivors: Survivors) -> Double:
    """Shares [S, R] of the rows that are left."""
    rows = np.zeros(sketch.target.size, np.bool_)
    rows[list(survivors.rows)] = True
    return row_shares(sketch.logits, rows, sketch.experts)


def _skip_rates(layer: LayerStatistics, survivors: Survivors, sketch: LayerSketch | None) -> Double:
    """Nats per squared share [E] of picks that are skipped, while the token's other shares grow."""
    outputs, n_others = outputs_of(layer), router_of(layer).rank_count.shape[1] - 1
    rates = _ratio(outputs.share_square_norm_square, outputs.share_square)
    if n_others and outputs.n_pick.any():
        # In f's place comes the mean of the token's other experts, taken for orthogonal to it and to each other.
        rates += outputs.norm_square.sum() / outputs.n_pick.sum() / n_others
    if sketch is not None:
        rates = _sketched_rates(sketch, survivors, rates, np.minimum(outputs.n_pick, _FEWEST_PICKS))
    rates *= _weights(layer, outputs.output_square.astype(np.float64))
    if layer.removals is None or len(survivors.rows) < router_of(layer).rank_count.shape[0]:
        return rates
    # All rows are left: tokens pick as when it was measured, by fewer of them, which may not have picked every expert.
    measured = _ratio(layer.removals.skipped * max(1, routed_tokens(layer)), outputs.share_square)
    return np.where(measured > 0, measured, rates)


def _sketched_rates(sketch: LayerSketch, survivors: Survivors, rates: Double, fewest: Int) -> Double:
    """Squared errors per squared share [E]: exact for experts of which the sketch has `fewest` picks, or `rates`."""
    result, shares = rates.copy(), _shares(sketch, survivors)
    for expert in survivors.experts:
        is_own = sketch.rows_of((expert,))
        tokens = np.flatnonzero((shares[:, is_own] > 0).any(1))
        if tokens.size >= max(1, fewest[expert]):
            before = shares[tokens]
            after = grown(np.where(is_own, 0.0, before), before)
            change = sketch.coefficients(after - before, survivors.replaced)
            result[expert] = policy_error(sketch.gram[tokens], change).sum() / np.square(before[:, is_own]).sum()
    return result


def _constant_rates(layer: LayerStatistics) -> Double:
    """Nats per squared share [E] of picks for which the expert's constant stands in."""
    return _ratio(constant_costs(layer) * max(1, routed_tokens(layer)), outputs_of(layer).share_square)


def _ratio(errors: Double, squares: Double) -> Double:
    return np.divide(errors, squares, out=np.zeros_like(errors), where=squares > 0)


def _weights(layer: LayerStatistics, profiles: Double) -> Double:
    return np.array([layer_weight(layer, profile).per_square for profile in profiles])
