"""Constant experts: for each expert the constant vector that replaces it best, and what the replacement costs.

Source: MoNE (arXiv 2507.00390), which calls them novices. Its constant is the mean of the outputs f over the tokens
that selected the expert; the one here minimises the sum of w^2 |f - c|^2, w being the expert weight, which is the error
of the layer's output. The router keeps all rows, so that no token selects other experts than before.
"""

import numpy as np

from slimoe.converter.methods.layer_weight import layer_weight, outputs_of, routed_tokens
from slimoe.converter.stats.statistics import Double, LayerStatistics, OutputSums, Single

_PRIOR = 4.0
_ENOUGH = 64.0
"""Tokens of an expert from which on gradients count more than squared errors."""


def constant_vectors(layer: LayerStatistics) -> Single:
    """The constants [E, d]: the sum of w^2 f over the sum of w^2, w being the expert weight.

    An expert that no token selected gets the constant of all experts together. Raises UsageError for statistics without
    sums of the experts' outputs.
    """
    outputs = outputs_of(layer)
    sums, weights = outputs.share_square_output.astype(np.float64), outputs.share_square[:, None]
    common = sums.sum(0) / max(float(weights.sum()), np.finfo(np.float64).tiny)
    vectors = np.divide(sums, weights, out=np.tile(common, (sums.shape[0], 1)), where=weights > 0)
    result: Single = vectors.astype(np.float32)
    return result


def constant_errors(layer: LayerStatistics) -> Double:
    """Mean squared errors [E] per token of the layer's output if each expert alone became its constant.

    They are in the units of `LayerGram.error`, which also knows the cross terms of several experts. Raises UsageError
    for statistics without sums of the experts' outputs.
    """
    outputs = outputs_of(layer)
    constant = np.square(outputs.share_square_output.astype(np.float64)).sum(1)
    saved = np.divide(constant, outputs.share_square, out=np.zeros_like(constant), where=outputs.share_square > 0)
    errors: Double = np.maximum(outputs.share_square_norm_square - saved, 0.0) / max(1, routed_tokens(layer))
    return errors


def constant_costs(layer: LayerStatistics) -> Double:
    """KL divergence in nats per token [E] if each expert alone became its constant; `layer` has sensitivities.

    It is that on other tokens than those that the constant is the mean of. These are nearer to their mean: what n of
    them lose is (n - 1) / n of their variance, and others lose (n + 1) / n of it, so that an expert of one token would
    seem to cost nothing. The variance is drawn to the layer's, as if `_PRIOR` more tokens had that one. Raises
    UsageError for statistics without sums of the experts' outputs.
    """
    n = outputs_of(layer).n_pick.astype(np.float64)
    own = _own_costs(layer, n)
    of_layer = own.sum() / max(1.0, np.maximum(n - 1, 0).sum())
    variance = (own + _PRIOR * of_layer) / (np.maximum(n - 1, 0) + _PRIOR)
    return np.asarray(variance * (n + 1))


def _own_costs(layer: LayerStatistics, n: Double) -> Double:
    """What constants cost on the tokens [E] that they are the means of.

    Gradients along the change know most, but have seen fewer tokens. Where an expert has few, squared errors of the
    output count too, scaled as they differ from gradients in the layer.
    """
    weights = [layer_weight(layer, profile).per_square for profile in variances(outputs_of(layer))]
    squares: Double = constant_errors(layer) * np.array(weights)
    if layer.removals is None or not squares.any():
        return squares
    scaled = squares * max(1.0, float(layer.removals.novice.sum() / squares.sum()))
    return (n * layer.removals.novice + _ENOUGH * scaled) / (n + _ENOUGH)


def variances(outputs: OutputSums) -> Double:
    """Variance [E, d] of each component of the experts' outputs, over the tokens that selected them."""
    n = np.maximum(outputs.n_pick, 1)[:, None]
    means = outputs.output.astype(np.float64) / n
    return np.maximum(outputs.output_square.astype(np.float64) / n - np.square(means), 0.0)
