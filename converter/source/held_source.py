"""A source that keeps what was read of it, for models small enough to be read again and again."""

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
