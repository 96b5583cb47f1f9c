"""What a calibration says of the columns of a slimmed model's matrices: their importance for whoever quantises them."""

import numpy as np
from numpy.typing import NDArray

from slimoe.converter.layout.layer import Matrix
from slimoe.converter.layout.plan import ExpertPlan
from slimoe.converter.quant.mixes import layer_and_role
from slimoe.converter.stats.statistics import InputSums, Statistics

_ATTENTION = {"attn_q": "attention", "attn_k": "attention", "attn_v": "attention", "attn_output": "mixed"}


def matrix_importance(statistics: Statistics, matrix: Matrix, *, is_tied: bool = False) -> NDArray[np.float32] | None:
    """Sums of squares [n_per_row] of what a matrix is multiplied with; None where nothing is known.

    Of the token table, which is only read, they are the sensitivities to its columns.
    An expert that no token picked reads what its layer's others read; its neurons all count the same (zeros).
    `is_tied` tells that the token table is the output matrix as well.
    """
    _, role = layer_and_role(matrix.key.name)
    if role == "output" or (role == "token_embd" and is_tied):
        return statistics.output_input
    if role == "token_embd":
        return statistics.token_gradient
    if matrix.block < 0 or matrix.is_vector:
        return None
    inputs = statistics.layers[matrix.block].inputs
    if matrix.expert is not None:
        return _hidden(inputs, matrix.expert) if matrix.projection == "down" else _read(inputs, matrix.expert)
    field = _ATTENTION.get(role)
    values: NDArray[np.float32] | None = getattr(inputs, field) if field else None
    return values


def _read(inputs: InputSums, expert: ExpertPlan) -> NDArray[np.float32]:
    read: NDArray[np.float32] = inputs.expert[list(expert.members)].sum(0)
    every: NDArray[np.float32] = inputs.expert.sum(0)
    return read if read.any() else every


def _hidden(inputs: InputSums, expert: ExpertPlan) -> NDArray[np.float32]:
    first, *others = expert.members
    hidden: NDArray[np.float32] = inputs.hidden[first].copy()
    for member, order in zip(others, expert.neurons, strict=True):
        hidden += inputs.hidden[member][order]
    return hidden if expert.kept is None else hidden[expert.kept]
