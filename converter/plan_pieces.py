"""Cuts a planned conversion into pieces of a few megabytes, so that nothing of a tensor's size is ever held."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from converter.architecture import SourceRows, rotation_order
from converter.checkpoint import DTYPE_BYTES
from converter.file_bytes import read_bytes
from converter.plan import ConvertPlan, TensorPlan
from converter.quantize import BadWeightsError, quantize_rows, to_f32
from converter.writer import Piece
from offload.errors import ModelFileError

_CHUNK_ELEMENTS = 1 << 22
_ALL_CHUNKS_ELEMENTS = 1 << 26


@dataclass(frozen=True, slots=True)
class _Chunk:
    plan: TensorPlan
    rows: SourceRows


def plan_pieces(plan: ConvertPlan, n_threads: int) -> Iterator[Piece]:
    """Every tensor in pieces of about so many weights that all threads together hold a bounded number of them."""
    n_elements = max(1, min(_CHUNK_ELEMENTS, _ALL_CHUNKS_ELEMENTS // n_threads))
    for tensor in plan.tensors:
        if tensor.target.values is not None:
            make = partial(quantize_rows, tensor.target.values.reshape(1, -1), tensor.type)
            yield Piece(tensor.offset, tensor.n_bytes, make)
        yield from _tensor_pieces(tensor, n_elements)


def _tensor_pieces(tensor: TensorPlan, n_elements: int) -> Iterator[Piece]:
    """Rows are cut at heads where they are reordered."""
    target = tensor.target
    row_bytes = tensor.n_bytes // max(1, sum(rows.n_rows for rows in target.sources))
    unit = target.n_rotated_head if len(target.ne) > 1 and target.n_rotated_head else 1
    step = max(1, n_elements // (target.ne[0] * unit)) * unit
    offset = tensor.offset
    for rows in target.sources:
        for first in range(0, rows.n_rows, step):
            n_rows = min(step, rows.n_rows - first)
            part = SourceRows(rows.tensor, rows.first_row + first, n_rows)
            yield Piece(offset, n_rows * row_bytes, partial(_convert, _Chunk(tensor, part)))
            offset += n_rows * row_bytes


def _convert(chunk: _Chunk) -> NDArray[np.uint8]:
    tensor, n_per_row = chunk.rows.tensor, chunk.plan.target.ne[0]
    row_bytes = n_per_row * DTYPE_BYTES[tensor.dtype]
    raw = read_bytes(tensor.path, tensor.offset + chunk.rows.first_row * row_bytes, chunk.rows.n_rows * row_bytes)
    values = to_f32(raw, tensor.dtype).reshape(chunk.rows.n_rows, n_per_row)
    n_head = chunk.plan.target.n_rotated_head
    if n_head and len(chunk.plan.target.ne) > 1:
        values = rotation_order(values, n_head)
    elif n_head:
        values = rotation_order(values.reshape(-1, 1), n_head).reshape(1, -1)
    try:
        return quantize_rows(values, chunk.plan.type)
    except BadWeightsError as error:
        raise ModelFileError(tensor.path, f"tensor {tensor.name} {error}.") from None
