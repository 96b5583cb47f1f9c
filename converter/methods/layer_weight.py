"""What an error in a layer's output costs, so that layers can be compared: nats of KL divergence per token.

To second order the divergence is half the sum over the output's components of squared error times sensitivity (C1 of
the statistics; GEMQ, arXiv 2605.23078, and AdapMoE, arXiv 2408.10284, weigh layers like this). Most errors are known
as one sum over the components, so that their profile has to be assumed.

For noise this is what comes of it, but two things raise the cost of real errors: experts answer in directions in which
the model listens, so that leaving one out costs two to three times as much; and a changed stream moves tokens to other
experts in later layers, which no gradient sees. Compare options of one kind and layer by it; measure across them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from slimoe.converter.stats.statistics import (
    Double,
    LayerStatistics,
    OutputSums,
    RouterSums,
    Single,
    Sketch,
    TokenTrace,
)
from slimoe.offload.errors import UsageError


@dataclass(frozen=True, slots=True)
class LayerWeight:
    """`per_square` is nats per token for each unit of squared error of the layer's output y, per token.

    Where no sensitivity `is_measured` it is one over the stream's mean square instead: good for comparing options, but
    no divergence.
    """

    per_square: float
    is_measured: bool

    def cost(self, squared_error: float) -> float:
        """Nats per token of a mean squared error |y' - y|^2 per token."""
        return self.per_square * squared_error


def layer_weight(layer: LayerStatistics, profile: Single | Double | None = None) -> LayerWeight:
    """The weight of errors that are spread over the components of y as `profile` [d] is, evenly if None.

    Raises UsageError when the statistics have nothing to weigh with.
    """
    if layer.sensitivity is None:
        return LayerWeight(_inverse_stream(layer), False)
    update = layer.sensitivity.update.astype(np.float64)
    if profile is None or not np.any(profile):
        return LayerWeight(0.5 * float(update.mean()), True)
    return LayerWeight(0.5 * float(np.average(update, weights=profile.astype(np.float64))), True)


def _inverse_stream(layer: LayerStatistics) -> float:
    """One over the mean square of the stream that y is added to."""
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
    """How tokens were routed; raises UsageError."""
    return _found(layer.router, "sums of the router")


def outputs_of(layer: LayerStatistics) -> OutputSums:
    """What experts answered; raises UsageError."""
    return _found(layer.outputs, "sums of the experts' outputs")


def sketch_of(layer: LayerStatistics) -> Sketch:
    """Inner products of what experts answered; raises UsageError."""
    return _found(layer.sketch, "inner products of the experts' outputs")


def trace_of(layer: LayerStatistics) -> TokenTrace:
    """Every token's routing; raises UsageError."""
    return _found(layer.trace, "record of every token's routing")


def routed_tokens(layer: LayerStatistics) -> int:
    """Tokens that the sums of a layer with experts run over; raises UsageError."""
    return int(router_of(layer).rank_count[:, 0].sum())


def by_expert(values: NDArray[np.float64], target: Sequence[int], n_expert: int) -> NDArray[np.float64]:
    """Sums [n_expert] of values [R] over the router's rows that mean an expert, without those of constant experts."""
    sums = np.zeros(n_expert)
    means = np.array(target, np.int64)
    np.add.at(sums, means[means >= 0], values[means >= 0])
    return sums
