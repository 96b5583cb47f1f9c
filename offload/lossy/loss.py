"""Tables of what it costs to do with less than an expert's best copy, made of a file's hints.

A hint is the rise of the KL divergence, in nats per token, when something else always stands for an expert. An error in
an expert's output enters the layer's sum times the expert's weight, and the divergence is quadratic in small errors; so
one selection with weight w costs the hint times w^2, over the sum of w^2 that the expert has per token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slimoe.offload.model.experts import ExpertLayer

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class LossTable:
    """Losses of one layer's experts; all arrays [n_stored + 1], the last row for selections of no stored expert.

    `last_copy` is the number of the smallest copy, `fallback` the constant expert that can stand in, or -1,
    `is_lowered` whether the only copy at hand is not the file's best. In nats per selection and squared expert weight:
    `low` is the loss of the last copy, `constant` that of the constant expert, `skip` that of nothing; infinite where
    the file does not say. `use` is how often a token is expected to select the expert, `weight_square` the mean square
    of its weights, `high_bytes` the size of the best copy.
    """

    last_copy: Indices
    fallback: Indices
    is_lowered: NDArray[np.bool_]
    low: Floats
    constant: Floats
    skip: Floats
    use: Floats
    weight_square: Floats
    high_bytes: Indices

    def rows(self, stored: Indices) -> Indices:
        """The table's rows for `stored` experts, where -1 - n is constant expert n."""
        return np.where(stored < 0, np.int64(-1), stored)


def loss_tables(
    layers: Sequence[ExpertLayer | None], lowered: Mapping[int, NDArray[np.bool_]] | None = None
) -> tuple[LossTable | None, ...]:
    """A table for each layer that has experts, else None.

    `lowered` [n_stored], by layer, is true for experts whose best copy was left out.
    """
    marks = lowered or {}
    return tuple(
        None if layer is None else _table(layer, marks.get(index, np.zeros(len(layer.experts), np.bool_)))
        for index, layer in enumerate(layers)
    )


def _table(layer: ExpertLayer, is_lowered: NDArray[np.bool_]) -> LossTable:
    hints, n = layer.hints, len(layer.experts)
    use = np.full(n, layer.n_expert_used / max(1, n)) if hints.use is None else np.array(hints.use, np.float64)
    # A mean square is not below that of equal weights.
    least = (layer.weights_scale / (layer.n_expert_used if layer.is_renormalised else len(layer.target))) ** 2
    square = np.full(n, least) if hints.share_square is None else np.array(hints.share_square, np.float64)
    best = np.zeros(n) if hints.error is None else np.array([copies[0] for copies in hints.error], np.float64)
    weight = use * square
    fallback = np.full(n, -1) if hints.fallback is None else np.array(hints.fallback)
    constant = _per_square(None if hints.fallback_error is None else np.array(hints.fallback_error) - best, weight)
    skip = _per_square(None if hints.skip_error is None else np.array(hints.skip_error) - best, weight)
    has_low = np.array([len(copies) > 1 for copies in layer.experts], np.bool_)
    low = _per_square(None if hints.low_error is None else np.array(hints.low_error, np.float64), weight)
    return LossTable(
        np.append(np.array([len(copies) - 1 for copies in layer.experts], np.int64), 0),
        np.append(fallback.astype(np.int64), -1),
        np.append(is_lowered, False),
        np.append(np.where(has_low | is_lowered, low, np.inf), 0.0),
        np.append(np.where(fallback >= 0, constant, np.inf), 0.0),
        np.append(skip, 0.0),
        np.append(use, 0.0),
        np.append(square, 0.0),
        np.array([*(copies[0].n_bytes for copies in layer.experts), 0], np.int64),
    )


def _per_square(errors: Floats | None, weight: Floats) -> Floats:
    """Errors per selection and squared weight. An expert never selected was not measured: it counts as the worst."""
    if errors is None:
        return np.full(weight.size, np.inf)
    rates = np.divide(np.maximum(errors, 0.0), weight, out=np.zeros(weight.size), where=weight > 0)
    return np.where(weight > 0, rates, rates.max(initial=0.0))
