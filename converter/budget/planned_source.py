"""A plan's result as a model to read, before it is written: what a search evaluates candidates by."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from slimoe.converter.layout.layer import Matrix
from slimoe.converter.layout.offsets import lay_out
from slimoe.converter.layout.plan import CompressPlan
from slimoe.converter.quant.quantize import dequantize_rows
from slimoe.converter.source.model_source import Blocks, MatrixKey, ModelSource, SourceLayer, constant_key
from slimoe.converter.write.matrix import read_matrix
from slimoe.converter.write.quantiser import Quantiser
from slimoe.offload.gguf.header import Value
from slimoe.offload.model.spec import ModelSpec

_FittedKey = tuple[MatrixKey, Type, int, object]


class FittedMatrices:
    """Values of matrices after they were fitted to a type, kept for other plans that choose the same; at most
    `n_bytes` of them, the longest unused ones go first.
    """

    def __init__(self, source: ModelSource, quantiser: Quantiser, n_bytes: int) -> None:
        self._source, self._quantiser, self._room = source, quantiser, n_bytes
        self._values: OrderedDict[_FittedKey, NDArray[np.float32]] = OrderedDict()

    def read(self, matrix: Matrix) -> NDArray[np.float32]:
        """The values [n_rows, n_per_row] that the result would have; raises as reading and fitting do."""
        if matrix.is_constant or matrix.type is Type.F32:
            return read_matrix(self._source, matrix)
        what = matrix.origin if matrix.expert is None else (matrix.expert.members, matrix.block)
        key = (matrix.key, matrix.type, matrix.shape[0], what)
        if key in self._values:
            self._values.move_to_end(key)
            return self._values[key]
        blocks = self._quantiser.quantise(matrix, read_matrix(self._source, matrix))
        values = self._values[key] = dequantize_rows(blocks, matrix.type, matrix.shape[1])
        self._room -= values.nbytes
        while self._room < 0 and len(self._values) > 1:
            self._room += self._values.popitem(last=False)[1].nbytes
        return values


class MadeMatrices(Protocol):
    """Says what a result's matrices are read as."""

    def read(self, matrix: Matrix) -> NDArray[np.float32]:
        """The values [n_rows, n_per_row]."""
        ...


class ExactMatrices:
    """Values of matrices as if every type could hold them."""

    def __init__(self, source: ModelSource) -> None:
        self._source = source

    def read(self, matrix: Matrix) -> NDArray[np.float32]:
        """The values [n_rows, n_per_row] before they are quantised; raises ModelFileError."""
        return read_matrix(self._source, matrix)


class PlannedSource:
    """A ModelSource of what a plan would make; the best copies of experts are read."""

    def __init__(self, source: ModelSource, plan: CompressPlan, fitted: MadeMatrices) -> None:
        layout = lay_out(source, plan)
        self._source, self._fitted, self._plan = source, fitted, plan
        self._matrices = {
            matrix.key: matrix
            for tensor in layout.tensors
            for matrix in tensor.matrices
            if not matrix.copy and ".ffn_novice." not in matrix.tensor
        }
        self._constants = {
            constant_key(index, number): vector
            for index, layer in enumerate(plan.layers)
            for number, vector in enumerate([] if layer.constants is None else layer.constants)
        }
        self.spec: ModelSpec = layout.spec
        self.layers: Sequence[SourceLayer] = tuple(
            SourceLayer(len(layer.experts), layer.target, layer.has_attention, layer.has_ffn) for layer in plan.layers
        )
        self.shapes: Mapping[MatrixKey, tuple[int, ...]] = {
            key: matrix.stored_shape for key, matrix in self._matrices.items()
        } | {key: vector.shape for key, vector in self._constants.items()}
        self.path: Path = source.path
        self.source_hash: str = source.source_hash
        self.metadata: Mapping[str, Value] = source.metadata

    def read(self, key: MatrixKey) -> NDArray[np.float32]:
        """The values that a reader of the written file would see; raises as fitting does."""
        if key in self._constants:
            vector: NDArray[np.float32] = self._constants[key]
            return vector
        matrix = self._matrices[key]
        values: NDArray[np.float32] = self._fitted.read(matrix)
        return values.reshape(self.shapes[key])

    def blocks(self, key: MatrixKey) -> Blocks | None:
        """None: nothing is written yet."""
        return None
