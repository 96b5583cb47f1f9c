"""How weights become blocks of their type: the part of slimming that a better method can take the place of."""

from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from slimoe.converter.layout.layer import Matrix
from slimoe.converter.quant.quantize import needs_importance, quantize_rows
from slimoe.converter.stats.statistics import Statistics
from slimoe.converter.write.importance import matrix_importance
from slimoe.offload.errors import UsageError

_ROWS_AT_ONCE = 256


class Fit(Protocol):
    """Is asked by one thread for one matrix after the other, in the order in which the model uses them.

    First the token table, then the result's layers: `begin_layer`, queries, keys, values, attention's output, each
    expert's gate, up and down, second copies after all best ones, the router last, `end_layer`; then the output matrix.
    Vectors do not come here. Matrices whose blocks the source has already are only told of.
    """

    def begin_layer(self, layer: int) -> None:
        """The result's layer `layer` begins; all before are complete."""
        ...

    def fit(self, matrix: Matrix, weights: NDArray[np.float32]) -> NDArray[np.uint8]:
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


class PlainFit:
    """Every matrix by itself, with the importance of its columns where `statistics` are given."""

    def __init__(self, statistics: Statistics | None = None, *, is_tied: bool = False, n_threads: int = 1) -> None:
        self._statistics, self._is_tied, self._n_threads = statistics, is_tied, n_threads

    def begin_layer(self, layer: int) -> None:
        """Nothing to prepare."""

    def end_layer(self, layer: int) -> None:
        """Nothing to tidy up."""

    def kept(self, matrix: Matrix) -> None:
        """Nothing depends on it."""

    def fit(self, matrix: Matrix, weights: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Blocks of the matrix; raises UsageError for a type that needs importance where there is none."""
        importance = self.importance(matrix)
        if importance is None and needs_importance(matrix.type):
            problem = f"{matrix.key} cannot be {matrix.type.name}: it is not known which of its weights matter."
            raise UsageError(f"{problem} Give statistics, or use IQ3_S or larger there.")
        parts = [weights[begin : begin + _ROWS_AT_ONCE] for begin in range(0, len(weights), _ROWS_AT_ONCE)]
        with ThreadPoolExecutor(self._n_threads) as pool:
            return np.concatenate(list(pool.map(lambda part: quantize_rows(part, matrix.type, importance), parts)))

    def importance(self, matrix: Matrix) -> NDArray[np.float32] | None:
        """Of the matrix's columns [n_per_row]."""
        if self._statistics is None:
            return None
        return matrix_importance(self._statistics, matrix, is_tied=self._is_tied)
