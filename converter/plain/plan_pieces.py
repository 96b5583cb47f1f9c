"""Cuts a planned conversion into pieces of a few megabytes, so that nothing of a tensor's size is ever held."""

from collections.abc import Iterator
from functools import partial

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from slimoe.converter.gguf.bytes import read_bytes
from slimoe.converter.gguf.writer import Piece
from slimoe.converter.plain.plan import ConvertPlan, TensorPlan
from slimoe.converter.quant.quantize import BadWeightsError, ggml_validate_row_data, quantize_rows
from slimoe.converter.source.model_source import Blocks
from slimoe.converter.source.stored_rows import StoredRows
from slimoe.offload.errors import ModelFileError

_CHUNK_ELEMENTS = 1 << 22
_ALL_CHUNKS_ELEMENTS = 1 << 26


def plan_pieces(plan: ConvertPlan, n_threads: int) -> Iterator[Piece]:
    """Every tensor in pieces of about so many weights that all threads together hold a bounded number of them."""
    n_elements = max(1, min(_CHUNK_ELEMENTS, _ALL_CHUNKS_ELEMENTS // n_threads))
    for tensor in plan.tensors:
        yield from _tensor_pieces(tensor, n_elements)


def _tensor_pieces(tensor: TensorPlan, n_elements: int) -> Iterator[Piece]:
    block, block_bytes = GGML_QUANT_SIZES[tensor.type]
    offset = tensor.offset
    for rows, importance in zip(tensor.target.sources, tensor.importances, strict=True):
        row_bytes = rows.n_per_row // block * block_bytes
        n_at_once = max(1, n_elements // (rows.n_per_row * rows.step)) * rows.step
        for first in range(0, rows.n_rows, n_at_once):
            n_rows = min(n_at_once, rows.n_rows - first)
            if rows.blocks and tensor.is_copied(rows):
                part = Blocks(rows.blocks.type, rows.path, rows.blocks.offset + first * row_bytes, n_rows * row_bytes)
                make = partial(copy_blocks, part, rows.name)
            else:
                make = partial(convert_rows, rows, first, n_rows, tensor.type, importance)
            yield Piece(offset, n_rows * row_bytes, make)
            offset += n_rows * row_bytes


def convert_rows(
    rows: StoredRows, first: int, n_rows: int, kind: GGMLQuantizationType, importance: NDArray[np.float32] | None
) -> NDArray[np.uint8]:
    """Blocks of some rows; raises ModelFileError for weights that cannot be read or are no numbers."""
    try:
        return quantize_rows(rows.read(first, n_rows), kind, importance)
    except BadWeightsError as error:
        raise ModelFileError(rows.path, f"tensor {rows.name} {error}.") from None


def copy_blocks(blocks: Blocks, name: str) -> NDArray[np.uint8]:
    """The bytes of blocks; raises ModelFileError where they cannot be read or hold NaN or infinity."""
    data = read_bytes(blocks.path, blocks.offset, blocks.n_bytes)
    if not ggml_validate_row_data(blocks.type, data.ctypes.data, data.size):
        raise ModelFileError(blocks.path, f"tensor {name} holds NaN or infinity; the file is damaged.")
    return data
