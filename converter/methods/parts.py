"""The parts of a layer's statistics: a method that cannot do without one asks here, and is refused in words."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from slimoe.converter.stats.statistics import LayerStatistics, OutputSums, RouterSums, Sketch, TokenTrace
from slimoe.offload.errors import UsageError

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
    """Sums [n_expert] of values [R] over the rows of the router that mean an expert; rows of novices are left out."""
    sums = np.zeros(n_expert)
    means = np.array(target, np.int64)
    np.add.at(sums, means[means >= 0], values[means >= 0])
    return sums
