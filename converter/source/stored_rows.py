"""Rows of matrices where they lie in files: read as float32, a few at a time, whatever they are stored as."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from gguf import GGML_QUANT_SIZES
from numpy.typing import NDArray

from slimoe.converter.gguf.bytes import read_bytes
from slimoe.converter.quant.quantize import dequantize_rows, to_f32
from slimoe.converter.source.checkpoint import DTYPE_BYTES, CheckpointTensor
from slimoe.converter.source.model_source import Blocks
from slimoe.converter.source.mxfp4 import Mxfp4Blocks


class StoredRows(Protocol):
    """A matrix [n_rows, n_per_row], or a vector as its only row; any number of threads may read.

    `name` and `path` are the stored tensor's, for messages. Reading begins at multiples of `step` rows.
    """

    @property
    def name(self) -> str:
        """The name of the tensor, for messages."""
        ...

    @property
    def path(self) -> Path:
        """The file that the tensor lies in."""
        ...

    @property
    def n_rows(self) -> int:
        """The number of rows of the tensor."""
        ...

    @property
    def n_per_row(self) -> int:
        """The number of weights in a row."""
        ...

    @property
    def step(self) -> int:
        """Reading begins at multiples of so many rows."""
        ...

    @property
    def blocks(self) -> Blocks | None:
        """Where all rows lie in ggml's own blocks; None where they are stored otherwise."""
        ...

    def read(self, first: int, n_rows: int) -> NDArray[np.float32]:
        """Reads `n_rows` rows from `first` on as float32, contiguous; raises ModelFileError."""
        ...


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """A matrix or vector of `shape`, in numpy's order, and the rows that it is read from."""

    shape: tuple[int, ...]
    rows: StoredRows


@dataclass(frozen=True, slots=True)
class TensorRows:
    """All rows of a safetensors tensor of floating-point numbers."""

    tensor: CheckpointTensor
    step: int = 1
    blocks: Blocks | None = None

    @property
    def name(self) -> str:
        """The name of the tensor, for messages."""
        return self.tensor.name

    @property
    def path(self) -> Path:
        """The file that the tensor lies in."""
        return self.tensor.path

    @property
    def n_rows(self) -> int:
        """The number of rows of the tensor."""
        return self.tensor.n_elements // self.n_per_row

    @property
    def n_per_row(self) -> int:
        """The number of weights in a row."""
        return self.tensor.shape[-1] if self.tensor.shape else 1

    def read(self, first: int, n_rows: int) -> NDArray[np.float32]:
        """Reads rows as float32; raises ModelFileError."""
        row_bytes = self.n_per_row * DTYPE_BYTES[self.tensor.dtype]
        raw = read_bytes(self.path, self.tensor.offset + first * row_bytes, n_rows * row_bytes)
        return to_f32(raw, self.tensor.dtype).reshape(n_rows, self.n_per_row)


@dataclass(frozen=True, slots=True)
class BlockRows:
    """Rows of a GGUF tensor, in ggml's blocks."""

    name: str
    blocks: Blocks
    n_rows: int
    n_per_row: int
    step: int = 1

    @property
    def path(self) -> Path:
        """The file that the tensor lies in."""
        return self.blocks.path

    def read(self, first: int, n_rows: int) -> NDArray[np.float32]:
        """Reads rows as ggml itself decodes them; raises ModelFileError."""
        return dequantize_rows(self.read_blocks(first, n_rows), self.blocks.type, self.n_per_row)

    def read_blocks(self, first: int, n_rows: int) -> NDArray[np.uint8]:
        """Reads the bytes of some rows; raises ModelFileError."""
        block, block_bytes = GGML_QUANT_SIZES[self.blocks.type]
        row_bytes = self.n_per_row // block * block_bytes
        return self.blocks.read(first * row_bytes, n_rows * row_bytes)


@dataclass(frozen=True, slots=True)
class RowsOfOthers:
    """Rows that are made of those of another tensor, which has the same name, file and row length."""

    rows: StoredRows

    @property
    def name(self) -> str:
        """The name of the tensor, for messages."""
        return self.rows.name

    @property
    def path(self) -> Path:
        """The file that the tensor lies in."""
        return self.rows.path

    @property
    def n_per_row(self) -> int:
        """The number of weights in a row."""
        return self.rows.n_per_row


@dataclass(frozen=True, slots=True)
class PartRows(RowsOfOthers):
    """The `n_rows` rows of a tensor from `first_row` on, of which every `stride`-th counts."""

    first_row: int
    n_rows: int
    stride: int = 1
    step: int = 1

    @property
    def blocks(self) -> Blocks | None:
        """Where the rows lie in ggml's own blocks, if they do."""
        whole = self.rows.blocks
        return whole.part(self.first_row, self.n_rows, self.stride) if isinstance(whole, Mxfp4Blocks) else None

    def read(self, first: int, n_rows: int) -> NDArray[np.float32]:
        """Reads rows of the part; raises ModelFileError."""
        stored = self.rows.read(self.first_row + first * self.stride, (n_rows - 1) * self.stride + 1)
        return np.ascontiguousarray(stored[:: self.stride])


@dataclass(frozen=True, slots=True)
class EveryNthColumn(RowsOfOthers):
    """The rows of a tensor, with every `n`-th of their elements from `first_column` on; `n` divides their length."""

    first_column: int
    n: int
    step: int = 1
    blocks: Blocks | None = None

    @property
    def n_rows(self) -> int:
        """The number of rows of the tensor."""
        return self.rows.n_rows

    @property
    def n_per_row(self) -> int:
        """The number of weights in a row."""
        return self.rows.n_per_row // self.n

    def read(self, first: int, n_rows: int) -> NDArray[np.float32]:
        """Reads the columns of some rows; raises ModelFileError."""
        return np.ascontiguousarray(self.rows.read(first, n_rows)[:, self.first_column :: self.n])


@dataclass(frozen=True, slots=True)
class HeadRows(RowsOfOthers):
    """The same part of each head: `n_part` rows from `first_part` on, of `n_each` rows in each of `n_head` heads."""

    n_head: int
    n_each: int
    first_part: int
    n_part: int
    blocks: Blocks | None = None

    @property
    def n_rows(self) -> int:
        """The number of rows of all heads' parts."""
        return self.n_head * self.n_part

    @property
    def step(self) -> int:
        """Whole heads are read."""
        return self.n_part

    def read(self, first: int, n_rows: int) -> NDArray[np.float32]:
        """Reads rows of whole heads; raises ModelFileError."""
        assert first % self.step == 0
        heads = range(first // self.n_part, (first + n_rows) // self.n_part)
        return np.concatenate([self.rows.read(head * self.n_each + self.first_part, self.n_part) for head in heads])


@dataclass(frozen=True, slots=True)
class TransposedRows:
    """The matrix of each head transposed, of rows that have `n_head` matrices below each other."""

    rows: HeadRows
    n_head: int
    blocks: Blocks | None = None

    @property
    def name(self) -> str:
        """The name of the tensor, for messages."""
        return self.rows.name

    @property
    def path(self) -> Path:
        """The file that the tensor lies in."""
        return self.rows.path

    @property
    def n_rows(self) -> int:
        """The number of rows of all transposed matrices."""
        return self.n_head * self.rows.n_per_row

    @property
    def n_per_row(self) -> int:
        """The number of weights in a row, which were a head's rows."""
        return self.rows.n_part

    @property
    def step(self) -> int:
        """Whole heads are read."""
        return self.rows.n_per_row

    def read(self, first: int, n_rows: int) -> NDArray[np.float32]:
        """Reads rows of whole heads; raises ModelFileError."""
        n_part = self.rows.n_part
        stored = self.rows.read(first // self.step * n_part, n_rows // self.step * n_part)
        heads = stored.reshape(-1, n_part, self.step).swapaxes(1, 2)
        return np.ascontiguousarray(heads).reshape(-1, n_part)


@dataclass(frozen=True, slots=True)
class RotatedRows(RowsOfOthers):
    """Query or key rows of a Hugging Face model, or the elements of their bias, in ggml's order of rotation."""

    n_embd_head: int
    blocks: Blocks | None = None

    @property
    def n_rows(self) -> int:
        """The number of rows of the tensor."""
        return self.rows.n_rows

    @property
    def step(self) -> int:
        """The rows of a head, since whole heads are reordered; a bias has one row."""
        return self.n_embd_head if self.n_rows > 1 else 1

    def read(self, first: int, n_rows: int) -> NDArray[np.float32]:
        """Reads rows of whole heads, reordered; raises ModelFileError."""
        assert first % self.step == 0
        rows = self.rows.read(first, n_rows)
        if self.n_rows > 1:
            return rotation_order(rows, self.n_embd_head)
        return rotation_order(rows.reshape(-1, 1), self.n_embd_head).reshape(1, -1)


def rotation_order(rows: NDArray[np.float32], n_embd_head: int) -> NDArray[np.float32]:
    """Reorders rows within each head [.., n_embd_head]: Hugging Face rotates (i, i + half), ggml (2i, 2i + 1)."""
    halves = rows.reshape(-1, 2, n_embd_head // 2, rows.shape[-1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


@dataclass(frozen=True, slots=True, eq=False)
class GivenRows:
    """A vector that is computed and not stored; `path` is where its constants come from."""

    name: str
    path: Path
    values: NDArray[np.float32]
    n_rows: int = 1
    step: int = 1
    blocks: Blocks | None = None

    @property
    def n_per_row(self) -> int:
        """The number of weights in a row."""
        return self.values.size

    def read(self, first: int, n_rows: int) -> NDArray[np.float32]:
        """The vector as a row."""
        return self.values.reshape(1, -1)[first : first + n_rows]
