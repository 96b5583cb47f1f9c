"""How weights become blocks of their type: the part of compression that a better method can take the place of."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from slimoe.converter.layout.layer import Matrix
from slimoe.converter.quant.gain import divided, gain_of, has_scales, sampled_runs
from slimoe.converter.quant.mixes import layer_and_role
from slimoe.converter.quant.quantize import dequantize_rows, needs_importance, quantize_rows, usable_importance
from slimoe.converter.stats.statistics import Statistics
from slimoe.converter.stats.type_costs import LOSSLESS
from slimoe.offload.errors import UsageError

_ROWS_AT_ONCE = 256


class Quantiser(Protocol):
    """Is asked by one thread for one matrix after the other, in the order in which the model uses them.

    First the token table, then the result's layers: `begin_layer`, queries, keys, values, attention's output, each
    expert's gate, up and down, second copies after all best ones, the router last, `end_layer`; then the output matrix.
    Vectors do not come here. Matrices whose blocks the source has already are only told of, except routers.
    """

    def begin_layer(self, layer: int) -> None:
        """The result's layer `layer` begins; all before are complete."""
        ...

    def quantise(self, matrix: Matrix, weights: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Blocks of `matrix.type` for weights of `matrix.shape`; of F32 for a router, whose values may change.

        Raises BadWeightsError for weights that the type cannot express.
        """
        ...

    def kept(self, matrix: Matrix) -> None:
        """The matrix is copied from the source as it is stored there."""
        ...

    def end_layer(self, layer: int) -> None:
        """All of the layer has been asked for."""
        ...


Importance = Callable[[Matrix], NDArray[np.float32] | None]
"""The importance of a matrix's columns [n_per_row], or [n_head, n_per_row] where each head has a matrix; None where
nothing is known of them."""


class PlainQuantiser:
    """Quantises every matrix by itself, row by row, with the `importance` of its columns where that is known.

    Without its gain (see `quant.gain`) if `without_gain`, else to the bytes of llama.cpp's quantizer.
    """

    def __init__(
        self, importance: Importance = lambda _matrix: None, *, without_gain: bool = False, n_threads: int = 1
    ) -> None:
        self._importance, self._without_gain, self._n_threads = importance, without_gain, n_threads

    def begin_layer(self, layer: int) -> None:
        """Nothing to prepare."""

    def end_layer(self, layer: int) -> None:
        """Nothing to tidy up."""

    def kept(self, matrix: Matrix) -> None:
        """Nothing depends on it."""

    def quantise(self, matrix: Matrix, weights: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Blocks of the matrix, made by all threads; raises as `rows` does."""
        gain = self.gain(matrix, lambda first, n: weights[first : first + n])

        def part(begin: int) -> NDArray[np.uint8]:
            return self.rows(matrix, weights[begin : begin + _ROWS_AT_ONCE], begin, gain)

        with ThreadPoolExecutor(self._n_threads) as pool:
            return np.concatenate(list(pool.map(part, range(0, len(weights), _ROWS_AT_ONCE))))

    def gain(self, matrix: Matrix, read: Callable[[int, int], NDArray[np.float32]], step: int = 1) -> float:
        """The gain that all the matrix's rows are to be freed of, measured on some of them; 1 if it stays.

        `read` reads rows [n, n_per_row] from a number on, both multiples of `step`. Raises what it does, and as `rows`.
        """
        if not self._without_gain or matrix.is_vector or not has_scales(matrix.type):
            return 1.0
        runs = sampled_runs(*matrix.shape, step)
        values = [read(run.start, run.stop - run.start) for run in runs]

        def after(run: slice, before: NDArray[np.float32]) -> NDArray[np.float32]:
            return dequantize_rows(self.rows(matrix, before, run.start), matrix.type, matrix.shape[1])

        with ThreadPoolExecutor(self._n_threads) as pool:
            quantised = list(pool.map(after, runs, values))
        importance = [self._row_importance(matrix, run) for run in runs]
        return gain_of(*map(np.concatenate, (values, quantised, importance)))

    def _row_importance(self, matrix: Matrix, rows: slice) -> NDArray[np.float32]:
        """What the columns of each of some rows count [n, n_per_row]."""
        known = self._importance(matrix)
        heads = np.ones((1, matrix.shape[1]), np.float32) if known is None else np.atleast_2d(known)
        usable = np.stack([usable_importance(one) for one in heads])
        chosen: NDArray[np.float32] = usable[np.arange(rows.start, rows.stop) * len(usable) // matrix.shape[0]]
        return chosen

    def rows(
        self, matrix: Matrix, weights: NDArray[np.float32], first: int = 0, gain: float = 1.0
    ) -> NDArray[np.uint8]:
        """Blocks of some of the matrix's rows from `first` on, or of a vector; any thread may ask, in any order.

        They are freed of their `gain`. Raises UsageError for a type that needs importance where there is none, and
        BadWeightsError for weights that the type cannot express.
        """
        importance = None if matrix.is_vector or matrix.type in LOSSLESS else self._importance(matrix)
        if importance is None and needs_importance(matrix.type):
            problem = f"{matrix.key} cannot be {matrix.type.name}: it is not known which of its weights matter."
            raise UsageError(f"{problem} Give statistics, or use IQ3_S or larger there.")
        scaled = divided(weights, gain)
        if importance is None or importance.ndim == 1:
            return quantize_rows(scaled, matrix.type, importance)
        n_each = matrix.shape[0] // len(importance)
        last = first + len(weights)
        blocks = []
        for head in range(first // n_each, -(-last // n_each)):
            begin, end = max(first, head * n_each), min(last, (head + 1) * n_each)
            blocks.append(quantize_rows(scaled[begin - first : end - first], matrix.type, importance[head]))
        return np.concatenate(blocks)


def statistics_importance(statistics: Statistics, *, is_tied: bool) -> Importance:
    """What statistics say of matrices; `is_tied` tells that the token table is the output matrix as well."""
    return lambda matrix: _of_statistics(statistics, matrix, is_tied=is_tied)


def _of_statistics(statistics: Statistics, matrix: Matrix, *, is_tied: bool) -> NDArray[np.float32] | None:
    """Sums of squares [n_per_row], of a stack [n_head, n_per_row], of what it is multiplied with; None if unknown.

    Of the token table, which is only read, they are the sensitivities to its columns.
    An expert that no token selected reads what its layer's others read; its neurons all count the same (zeros).
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
        first, *others = matrix.expert.members
        if matrix.projection != "down":
            read: NDArray[np.float32] = inputs.expert[[first, *others]].sum(0)
            return read if read.any() else inputs.expert.sum(0)
        if matrix.expert.is_joined:
            picked = matrix.expert.picked(inputs.hidden.shape[1])
            return np.concatenate([inputs.hidden[member][own] for member, own in picked])
        hidden: NDArray[np.float32] = inputs.hidden[first].copy()
        for member, order in zip(others, matrix.expert.neurons, strict=True):
            hidden += inputs.hidden[member][order]
        return hidden if matrix.expert.kept is None else hidden[matrix.expert.kept]
    return inputs.by_role().get(role)
