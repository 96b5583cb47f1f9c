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


class StoredRows(Protocol):
    """A matrix [n_rows, n_per_row], or a vector as its only row; any number of threads may read.

    `name` and `path` are the stored tensor's, for messages. Reading begins at multiples of `step` rows.
    """

    @property
    def name(self) -> str:
        """What the file calls the tensor."""
        ...

    @property
    def path(self) -> Path:
        """The file."""
        ...

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        ...

    @property
    def n_per_row(self) -> int:
        """Weights in a row."""
        ...

    @property
    def step(self) -> int:
        """Where reading can begin."""
        ...

    @property
    def blocks(self) -> Blocks | None:
        """Where all rows lie in ggml's own blocks; None where they are stored otherwise."""
        ...

    def read(self, first: int, n_rows: int) -> NDArray[np.float32]:
        """`n_rows` rows from `first` on, contiguous; raises ModelFileError."""
        ...


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """A matrix or vector of `shape` (numpy's order), which `rows` has."""

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
        """The tensor's."""
        return self.tensor.name

    @property
    def path(self) -> Path:
        """The tensor's."""
        return self.tensor.path

    @property
    def n_rows(self) -> int:
        """Rows of all its matrices."""
        return self.tensor.n_elements // self.n_per_row

    @property
    def n_per_row(self) -> int:
        """Its last axis."""
        return self.tensor.shape[-1] if self.tensor.shape else 1

    def read(self, first: int, n_rows: int) -> NDArray[np.float32]:
        """Rows as float32; raises ModelFileError."""
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
        """The file."""
        return self.blocks.path

    def read(self, first: int, n_rows: int) -> NDArray[np.float32]:
        """Rows as ggml itself decodes them; raises ModelFileError."""
        return dequantize_rows(self.read_blocks(first, n_rows), self.blocks.type, self.n_per_row)

    def read_blocks(self, first: int, n_rows: int) -> NDArray[np.uint8]:
        """The bytes of some rows; raises ModelFileError."""
        block, block_bytes = GGML_QUANT_SIZES[self.blocks.type]
        row_bytes = self.n_per_row // block * block_bytes
        return read_bytes(self.path, self.blocks.offset + first * row_bytes, n_rows * row_bytes)


@dataclass(frozen=True, slots=True)
class PartRows:
    """`n_rows` rows of others, from `first_row` on."""

    rows: StoredRows
    first_row: int
    n_rows: int
    step: int = 1
    blocks: Blocks | None = None

    @property
    def name(self) -> str:
        """The others'."""
        return self.rows.name

    @property
    def path(self) -> Path:
        """The others'."""
        return self.rows.path

    @property
    def n_per_row(self) -> int:
        """The others'."""
        return self.rows.n_per_row

    def read(self, first: int, n_rows: int) -> NDArray[np.float32]:
        """Rows of the part; raises ModelFileError."""
        return self.rows.read(self.first_row + first, n_rows)


@dataclass(frozen=True, slots=True)
class RotatedRows:
    """Query or key rows of a Hugging Face model, or the elements of their bias, in ggml's order of rotation."""

    rows: StoredRows
    n_embd_head: int
    blocks: Blocks | None = None

    @property
    def name(self) -> str:
        """The others'."""
        return self.rows.name

    @property
    def path(self) -> Path:
        """The others'."""
        return self.rows.path

    @property
    def n_rows(self) -> int:
        """The others'."""
        return self.rows.n_rows

    @property
    def n_per_row(self) -> int:
        """The others'."""
        return self.rows.n_per_row

    @property
    def step(self) -> int:
        """Whole heads are reordered; a bias has one row."""
        return self.n_embd_head if self.n_rows > 1 else 1

    def read(self, first: int, n_rows: int) -> NDArray[np.float32]:
        """Rows of whole heads, reordered; raises ModelFileError."""
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
        """Its length."""
        return self.values.size

    def read(self, first: int, n_rows: int) -> NDArray[np.float32]:
        """The vector as a row."""
        return self.values.reshape(1, -1)[first : first + n_rows]
