"""Hints of a native file for the engine: how often a layer's experts are selected, and what doing with less costs.

Errors are KL divergences in nats per token if all tokens that selected an expert did without it, as `LayerHints` has
them: the squared error of the layer's output per token, times the layer's weight for errors whose profile over the
components of the output is that of the expert's own output.
"""

from dataclasses import dataclass, replace

import numpy as np

from slimoe.converter.methods.constant_experts import constant_costs
from slimoe.converter.methods.expert_drop import Survivors
from slimoe.converter.methods.gram_policy import LayerGram, policy_error, renormalised
from slimoe.converter.methods.layer_weight import layer_weight, outputs_of, routed_tokens, router_of
from slimoe.converter.stats.statistics import Double, Int, LayerStatistics, RouterSums
from slimoe.offload.model.native_layout import LayerHints

LOW_PART = 0.33
"""Of the bytes that low-bit copies could save, the part that they do: HOBBIT (arXiv 2411.01433) keeps 67 % high."""
_FEWEST_TOKENS = 16
"""With fewer tokens of an expert in the Gram matrices, the sums over all tokens are the better estimate, unless the
Gram matrices have every token that selected the expert.
"""


@dataclass(frozen=True, slots=True)
class SkipRules:
    """When the engine's lossy modes may skip experts of a layer; None for what is not known.

    `skip_ratio` is a threshold of expert weights next to the token's largest, as the function of that name finds it.
    `fallback` has for each stored expert of the compressed model the number of the constant that can replace it, or -1.
    """

    skip_ratio: float | None = None
    fallback: tuple[int, ...] | None = None


def hints_for(
    layer: LayerStatistics, survivors: Survivors, gram: LayerGram | None = None, rules: SkipRules | None = None
) -> LayerHints:
    """The hints for the experts that `survivors` keeps.

    `gram`, if given, tells which experts the tokens of dropped experts select instead, and how the outputs of a token's
    experts go together. Without measured sensitivities there are no errors, since their unit would not be nats.
    `sensitivity` is nats per squared expert weight of skipped experts (AdapMoE, arXiv 2408.10284). Raises UsageError
    for statistics without sums of the router or of the experts' outputs.
    """
    rules = rules or SkipRules()
    kept, n_tokens = list(survivors.experts), max(1, routed_tokens(layer))
    use, square = _uses(layer, survivors, gram)
    hints = LayerHints(
        use=tuple(use.tolist()),
        share_square=tuple(np.divide(square, use, out=np.zeros_like(use), where=use > 0).tolist()),
        fallback=rules.fallback,
        skip_ratio=rules.skip_ratio,
    )
    if layer.sensitivity is None:
        return hints
    skip = _skip_rates(layer, survivors, gram)[kept] * square
    sensitivity = float(skip.sum() / square.sum()) if square.sum() else 0.0
    hints = replace(hints, skip_error=tuple(skip.tolist()), sensitivity=sensitivity)
    if rules.fallback is None:
        return hints
    constant = _ratio(constant_costs(layer) * n_tokens, outputs_of(layer).share_square)[kept] * square
    return replace(hints, fallback_error=tuple(np.where(np.array(rules.fallback) >= 0, constant, 0.0).tolist()))


def _uses(layer: LayerStatistics, survivors: Survivors, gram: LayerGram | None) -> tuple[Double, Double]:
    """Of each kept expert per token: how often it is selected, and the sum of its squared expert weights."""
    outputs, n_tokens, kept = outputs_of(layer), max(1, routed_tokens(layer)), list(survivors.experts)
    use, square = outputs.n_pick[kept] / n_tokens, outputs.share_square[kept] / n_tokens
    if gram is None or len(survivors.rows) == gram.target.size:
        return use, square
    before, after = np.zeros((2, 2, gram.n_expert))
    for weights, (uses, squares) in ((gram.weights, before), (_weights(gram, survivors), after)):
        np.add.at(uses, gram.target, (weights > 0).mean(0))
        np.add.at(squares, gram.target, np.square(weights).mean(0))
    # Gram matrices have fewer tokens: only what tokens of dropped experts add is taken from them.
    more_use, more_square = np.maximum(after - before, 0.0)[:, kept]
    return use + more_use, square + more_square


def _weights(gram: LayerGram, survivors: Survivors) -> Double:
    """Expert weights [S, R] with only the rows that are left."""
    rows = np.zeros(gram.target.size, np.bool_)
    rows[list(survivors.rows)] = True
    return gram.row_weights(rows)


def _skip_rates(layer: LayerStatistics, survivors: Survivors, gram: LayerGram | None) -> Double:
    """Nats per squared expert weight [E] if an expert is skipped and the token's other expert weights renormalised."""
    outputs, n_others = outputs_of(layer), router_of(layer).rank_count.shape[1] - 1
    rates = _ratio(outputs.share_square_norm_square, outputs.share_square)
    if n_others and outputs.n_pick.any():
        # In f's place comes the mean of the token's other experts, taken for orthogonal to it and to each other.
        rates += outputs.norm_square.sum() / outputs.n_pick.sum() / n_others
    if gram is not None:
        weights = _weights(gram, survivors)
        for expert in survivors.experts:
            is_own = gram.rows_of((expert,))
            tokens = np.flatnonzero((weights[:, is_own] > 0).any(1))
            if tokens.size >= max(1, min(int(outputs.n_pick[expert]), _FEWEST_TOKENS)):
                before = weights[tokens]
                after = renormalised(np.where(is_own, 0.0, before), before)
                change = gram.coefficients(after - before, survivors.replaced)
                rates[expert] = policy_error(gram.products[tokens], change).sum() / np.square(before[:, is_own]).sum()
    rates *= [layer_weight(layer, profile).per_square for profile in outputs.output_square.astype(np.float64)]
    if layer.removals is None or len(survivors.rows) < router_of(layer).rank_count.shape[0]:
        return rates
    # All rows are left: tokens select as when it was measured, but fewer tokens, which may have left out some expert.
    measured = _ratio(layer.removals.skipped * max(1, routed_tokens(layer)), outputs.share_square)
    return np.where(measured > 0, measured, rates)


def _ratio(errors: Double, squares: Double) -> Double:
    return np.divide(errors, squares, out=np.zeros_like(errors), where=squares > 0)


def bin_quantile(bins: Int, part: float) -> float:
    """The quantile `part` of the values that a histogram of 0 to 1 has counted, taken as evenly spread within a bin."""
    counts = np.concatenate([[0], np.cumsum(bins)])
    if not counts[-1]:
        return 0.0
    wanted = part * counts[-1]
    index = min(int(np.searchsorted(counts, wanted, side="right")) - 1, int(np.flatnonzero(bins)[-1]))
    return float((index + min(1.0, (wanted - counts[index]) / bins[index])) / bins.size)


def skip_ratio(router: RouterSums, part: float = 0.5) -> float:
    """NAEE's beta (arXiv 2402.14800): for a `part` of the tokens the second expert weight over the first is below it.

    It is 0 for models whose tokens select one expert.
    """
    return bin_quantile(router.ratio_bins, part)


def price_of_bytes(losses: Double, saved_bytes: Double, part: float = LOW_PART) -> float:
    """The price of a byte, in nats, at which low-bit copies save a `part` of the bytes that they could.

    Of each selection of an expert, `losses` [n] says what its low-bit copy would lose, in nats, and `saved_bytes` [n]
    how many bytes fewer it has: it answers where it loses less than these are worth. 0 without any.
    """
    prices = np.divide(losses, saved_bytes, out=np.full(losses.size, np.inf), where=saved_bytes > 0)
    order = np.argsort(prices, kind="stable")
    sums = saved_bytes[order].cumsum()
    if not sums.size or not sums[-1]:
        return 0.0
    return float(prices[order][np.searchsorted(sums, part * sums[-1])])
