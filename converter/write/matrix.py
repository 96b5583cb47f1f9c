"""A result's matrix from its source: the values it is made of, or the stored blocks that it is a copy of."""

import numpy as np
from numpy.typing import NDArray

from slimoe.converter.layout.layer import Matrix
from slimoe.converter.layout.offsets import matrix_bytes
from slimoe.converter.methods.expert_matrices import merged_matrix, merged_vectors
from slimoe.converter.quant.quantize import ggml_validate_row_data
from slimoe.converter.source.model_source import Blocks, MatrixKey, ModelSource, expert_key
from slimoe.converter.source.stored_model import StoredModel
from slimoe.converter.source.stored_rows import StoredRows
from slimoe.offload.errors import ModelFileError


def read_matrix(source: ModelSource, matrix: Matrix) -> NDArray[np.float32]:
    """The values of a result's matrix or vector, of its shape, before they are fitted; raises ModelFileError."""
    if matrix.values is not None:
        weights = matrix.values
    elif matrix.experts:
        assert matrix.origin is not None
        weights = merged_vectors(source, matrix.origin, matrix.experts, matrix.shape[1])
    elif matrix.expert is not None:
        weights = merged_matrix(source, matrix.block, matrix.expert, matrix.projection)
    else:
        assert matrix.origin is not None
        weights = source.read(matrix.origin)
        weights = weights if matrix.rows is None else weights[list(matrix.rows)]
    return np.ascontiguousarray(weights, np.float32).reshape(matrix.shape)


def stored_blocks(source: ModelSource, matrix: Matrix) -> Blocks | None:
    """The source's blocks that are the matrix, or hold it as some of their rows; None where it must be made."""
    origin = origin_of(matrix)
    blocks = source.blocks(origin) if origin else None
    return blocks if blocks and blocks.type is matrix.type else None


def stored_rows(source: ModelSource, matrix: Matrix) -> StoredRows | None:
    """The rows in the source's files that the matrix has, all of them; None where it is made in memory."""
    origin = origin_of(matrix)
    if origin is None or kept_rows(matrix) is not None or not isinstance(source, StoredModel):
        return None
    return source.matrices[origin].rows


def origin_of(matrix: Matrix) -> MatrixKey | None:
    """The source's matrix that this is, whole or some rows of it."""
    expert = matrix.expert
    if expert is None:
        return None if matrix.experts else matrix.origin
    cuts_columns = matrix.projection == "down" and (expert.kept is not None or expert.down is not None)
    if len(expert.members) > 1 or cuts_columns:
        return None
    return expert_key(matrix.block, matrix.projection, expert.members[0])


def kept_rows(matrix: Matrix) -> NDArray[np.int64] | None:
    """The rows of the source's matrix that are left; None for all."""
    if matrix.rows is not None:
        return np.asarray(matrix.rows, np.int64)
    return matrix.expert.kept if matrix.expert else None


def copy_blocks(blocks: Blocks, name: str, begin: int, n_bytes: int) -> NDArray[np.uint8]:
    """Some bytes of blocks; raises ModelFileError where they cannot be read or hold NaN or infinity."""
    data = blocks.read(begin, n_bytes)
    if not ggml_validate_row_data(blocks.type, data.ctypes.data, data.size):
        raise ModelFileError(blocks.path, f"tensor {name} holds NaN or infinity; the file is damaged.")
    return data


def copy_rows(blocks: Blocks, matrix: Matrix, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Blocks of some rows of a stored matrix, or elements of a vector; raises ModelFileError."""
    row_bytes = matrix_bytes(matrix) // len(rows)
    stored = copy_blocks(blocks, str(origin_of(matrix) or matrix.key), 0, blocks.n_bytes)
    return np.ascontiguousarray(stored.reshape(-1, row_bytes)[rows])
