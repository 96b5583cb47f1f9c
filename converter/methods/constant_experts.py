"""Constants in place of experts: which experts hardly vary, the best constant for each, and what it costs.

Source: MoNE (arXiv 2507.00390). Its constant is the mean output over picks; the one here minimises the sum of
share^2 |f - c|^2, which is what the layer's output loses. The router keeps all rows, so that no token moves.
"""

import numpy as np

from slimoe.converter.methods.layer_weight import layer_weight, outputs_of, routed_tokens
from slimoe.converter.stats.statistics import Double, LayerStatistics, OutputSums, Single


def constant_vectors(layer: LayerStatistics) -> Single:
    """The constants [E, d], sum of share^2 f over sum of share^2; that of all experts for one that was never picked.

    Raises UsageError.
    """
    outputs = outputs_of(layer)
    sums, weights = outputs.share_square_output.astype(np.float64), outputs.share_square[:, None]
    common = sums.sum(0) / max(float(weights.sum()), np.finfo(np.float64).tiny)
    vectors = np.divide(sums, weights, out=np.tile(common, (sums.shape[0], 1)), where=weights > 0)
    result: Single = vectors.astype(np.float32)
    return result


def constant_errors(layer: LayerStatistics) -> Double:
    """Mean squared errors [E] per token of the layer's output if each expert alone became its constant.

    In the units of `LayerSketch.error`, for whose cross terms this is the diagonal. Raises UsageError.
    """
    outputs = outputs_of(layer)
    constant = np.square(outputs.share_square_output.astype(np.float64)).sum(1)
    saved = np.divide(constant, outputs.share_square, out=np.zeros_like(constant), where=outputs.share_square > 0)
    errors: Double = np.maximum(outputs.share_square_norm_square - saved, 0.0) / max(1, routed_tokens(layer))
    return errors


def constant_costs(layer: LayerStatistics) -> Double:
    """Nats per token [E] if each expert alone became its constant; `layer` has sensitivities.

    As measured along the change; by the squared error where that is more or all there is: gradients are those of fewer
    tokens, which may not have picked every expert. Raises UsageError.
    """
    weights = [layer_weight(layer, profile).per_square for profile in variances(outputs_of(layer))]
    costs: Double = constant_errors(layer) * np.array(weights)
    return costs if layer.removals is None else np.maximum(costs, layer.removals.novice)


def variances(outputs: OutputSums) -> Double:
    """Variance [E, d] of each component of the experts' outputs over their picks."""
    n = np.maximum(outputs.n_pick, 1)[:, None]
    means = outputs.output.astype(np.float64) / n
    return np.maximum(outputs.output_square.astype(np.float64) / n - np.square(means), 0.0)
