"""A model whose matrices lie in files: what all checkpoints and files have in common once their parts are found."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from slimoe.converter.source.model_source import Blocks, MatrixKey, SourceLayer
from slimoe.converter.source.stored_rows import StoredMatrix
from slimoe.offload.errors import ModelFileError, UnsupportedModelError
from slimoe.offload.gguf.header import Value
from slimoe.offload.model.spec import ModelSpec

_BLOCK = re.compile(r"blk\.(\d+)\.")


LATER_BLOCKS = "Of several blocks that predict further tokens (MTP) the first is kept: nothing runs the others."
"""What is told of a model that has more than the block which a file can keep."""


def no_mtp_block(path: Path) -> UnsupportedModelError:
    """What is raised where a block is to be kept that is not there, or that cannot be run."""
    problem = "the model has no block that predicts further tokens (MTP), or none that slimoe runs."
    return UnsupportedModelError(path, problem, "Leave --mtp out.")


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A ModelSource, and for converters the rows behind each matrix, which are put in the order of use.

    `notes` are sentences on what else the files have, which is not read.
    """

    path: Path
    spec: ModelSpec
    source_hash: str
    metadata: Mapping[str, Value]
    layers: Sequence[SourceLayer]
    matrices: Mapping[MatrixKey, StoredMatrix]
    notes: tuple[str, ...] = ()
    shapes: Mapping[MatrixKey, tuple[int, ...]] = field(init=False)

    def __post_init__(self) -> None:
        tensors = self.spec.architecture.tensors
        places = {tensor.stored_as or tensor.role: place for place, tensor in enumerate(tensors)}
        last = {tensor.stored_as or tensor.role for tensor in tensors if tensor.role.startswith("output")}

        def place(key: MatrixKey) -> tuple[int, int, str, int]:
            """Where the architecture's list has the tensor, layer by layer."""
            block = _BLOCK.match(key.name)
            name = key.name[block.end() :] if block else key.name
            role, kind = name.rsplit(".", 1) if "." in name else (name, "")
            layer = int(block[1]) if block else self.spec.n_layer if role in last else -1
            return layer, places.get(role, len(places)), kind, key.expert

        object.__setattr__(self, "matrices", {key: self.matrices[key] for key in sorted(self.matrices, key=place)})
        object.__setattr__(self, "shapes", {key: matrix.shape for key, matrix in self.matrices.items()})

    @property
    def is_tied(self) -> bool:
        """Whether the token table is the output matrix too."""
        return MatrixKey("output.weight") not in self.matrices

    def read(self, key: MatrixKey) -> NDArray[np.float32]:
        """The values of a matrix; raises ModelFileError, also for NaN and infinity."""
        matrix = self.matrices[key]
        values = matrix.rows.read(0, matrix.rows.n_rows)
        if not (np.isfinite(values.min()) and np.isfinite(values.max())):
            problem = f"tensor {matrix.rows.name} holds NaN or infinity; the checkpoint is damaged."
            raise ModelFileError(matrix.rows.path, problem)
        return values.reshape(matrix.shape)

    def blocks(self, key: MatrixKey) -> Blocks | None:
        """Where the matrix lies in ggml's own blocks, if it does."""
        return self.matrices[key].rows.blocks
