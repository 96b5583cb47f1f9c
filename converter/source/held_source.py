"""Sources in front of another one: one that keeps what was read, and one some of whose values are others."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from slimoe.converter.source.model_source import Blocks, MatrixKey, ModelSource, SourceLayer
from slimoe.offload.gguf.header import Value
from slimoe.offload.model.spec import ModelSpec


class HeldSource:
    """A ModelSource whose float32 values stay in memory once they were read; nobody may write into them."""

    def __init__(self, source: ModelSource) -> None:
        self._source = source
        self._values: dict[MatrixKey, NDArray[np.float32]] = {}

    @property
    def path(self) -> Path:
        """The path of the source."""
        return self._source.path

    @property
    def spec(self) -> ModelSpec:
        """The sizes and constants of the source."""
        return self._source.spec

    @property
    def source_hash(self) -> str:
        """The digest of the source's checkpoint."""
        return self._source.source_hash

    @property
    def metadata(self) -> Mapping[str, Value]:
        """The keys that the source carries over."""
        return self._source.metadata

    @property
    def layers(self) -> Sequence[SourceLayer]:
        """What each layer of the source has."""
        return self._source.layers

    @property
    def shapes(self) -> Mapping[MatrixKey, tuple[int, ...]]:
        """All matrices and vectors of the source, in the order of use."""
        return self._source.shapes

    def read(self, key: MatrixKey) -> NDArray[np.float32]:
        """Returns the values, read the first time and then from memory; raises ModelFileError."""
        values = self._values.get(key)
        if values is None:
            values = self._values[key] = self._source.read(key)
        return values

    def blocks(self, key: MatrixKey) -> Blocks | None:
        """Where the source has a matrix in ggml's blocks."""
        return self._source.blocks(key)


class FittedSource(HeldSource):
    """A ModelSource some of whose values were replaced, such as by those that quantising left of them."""

    def replace(self, key: MatrixKey, values: NDArray[np.float32]) -> None:
        """Takes over other values of a matrix, in any shape of as many."""
        self._values[key] = values.reshape(self.shapes[key])

    def restore(self) -> None:
        """Has the source's own values again."""
        self._values.clear()

    def read(self, key: MatrixKey) -> NDArray[np.float32]:
        """Returns the values, those of the source where none replaced them; raises ModelFileError."""
        values = self._values.get(key)
        return self._source.read(key) if values is None else values
