"""What an error in a layer's output costs as KL divergence in nats per token, so that layers can be compared.

To second order the divergence is half the sum over the output's components of squared error times sensitivity (C1 of
the statistics; GEMQ, arXiv 2605.23078, and AdapMoE, arXiv 2408.10284, weigh layers like this). Most errors are known
as one sum over the components, so that their profile has to be assumed.

For noise the estimate holds, but two things raise the cost of real errors: experts answer in directions to which the
model is sensitive, so that leaving one out costs two to three times as much; and a changed residual stream makes tokens
select other experts in later layers, which no gradient sees. So compare only options of one kind and layer by it, and
measure all others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from slimoe.converter.stats.statistics import (
    Double,
    GramSample,
    LayerStatistics,
    OutputSums,
    RouterSums,
    Single,
    TokenTrace,
)
from slimoe.offload.errors import UsageError


@dataclass(frozen=True, slots=True)
class LayerWeight:
    """`per_square` is the KL divergence in nats for each unit of squared error of the layer's output y, both per token.

    If the sensitivity is not measured (`is_measured`), it is one over the mean square of the residual stream instead,
    by which options can be compared, but which is no divergence.
    """

    per_square: float
    is_measured: bool

    def cost(self, squared_error: float) -> float:
        """The cost in nats per token of a mean squared error |y' - y|^2 per token."""
        return self.per_square * squared_error


def layer_weight(layer: LayerStatistics, profile: Single | Double | None = None) -> LayerWeight:
    """The weight of errors whose squares are distributed over the components of y like `profile` [d]; evenly if None.

    Raises UsageError for statistics with neither sensitivities nor sums of the experts' outputs.
    """
    if layer.sensitivity is None:
        return LayerWeight(_inverse_stream(layer), False)
    update = layer.sensitivity.update.astype(np.float64)
    if profile is None or not np.any(profile):
        return LayerWeight(0.5 * float(update.mean()), True)
    return LayerWeight(0.5 * float(np.average(update, weights=profile.astype(np.float64))), True)


def _inverse_stream(layer: LayerStatistics) -> float:
    """One over the mean square of the residual stream that y is added to."""
    if layer.sketch is not None:
        square = float(layer.sketch.gram[:, -1, -1].mean(dtype=np.float64))
        return 1.0 / square if square else 0.0
    if layer.outputs is None:
        raise UsageError(
            "The statistics have neither sensitivities nor sums of the experts' outputs, so that layers cannot be "
            "compared. Calibrate again, leaving nothing out."
        )
    # Outputs of different experts are taken for orthogonal.
    square = float(layer.outputs.share_square_norm_square.sum())
    return layer.similarity.relative_update / square if square else 0.0


Part = TypeVar("Part")


def _found(part: Part | None, what: str) -> Part:
    if part is None:
        raise UsageError(f"The statistics have no {what}. Calibrate again, leaving nothing out.")
    return part


def router_of(layer: LayerStatistics) -> RouterSums:
    """The layer's sums over the router's answers; raises UsageError for statistics without them."""
    return _found(layer.router, "sums of the router")


def outputs_of(layer: LayerStatistics) -> OutputSums:
    """The layer's sums over the experts' outputs; raises UsageError for statistics without them."""
    return _found(layer.outputs, "sums of the experts' outputs")


def gram_of(layer: LayerStatistics) -> GramSample:
    """The layer's Gram matrices of the experts' outputs; raises UsageError for statistics without them."""
    return _found(layer.sketch, "inner products of the experts' outputs")


def trace_of(layer: LayerStatistics) -> TokenTrace:
    """The routing of every token; raises UsageError for statistics without it."""
    return _found(layer.trace, "record of every token's routing")


def routed_tokens(layer: LayerStatistics) -> int:
    """The number of tokens that the sums of a layer with experts run over; raises UsageError for one without."""
    return int(router_of(layer).rank_count[:, 0].sum())


def by_expert(values: NDArray[np.float64], target: Sequence[int], n_expert: int) -> NDArray[np.float64]:
    """Sums [n_expert] of `values` [R] over the router's rows of each expert; rows of constant experts are left out."""
    sums = np.zeros(n_expert)
    means = np.array(target, np.int64)
    np.add.at(sums, means[means >= 0], values[means >= 0])
    return sums
