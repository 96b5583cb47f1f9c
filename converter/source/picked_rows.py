"""Rows of stored tensors in another order, or with other values, as GGUF files have them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from slimoe.converter.source.model_source import Blocks
from slimoe.converter.source.stored_rows import RowsOfOthers, StoredMatrix, StoredRows

Order = NDArray[np.int64]
Values = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class PickedRows(RowsOfOthers):
    """Of a tensor's rows those of the numbers `order`, in that order."""

    order: Order
    step: int = 1
    blocks: Blocks | None = None

    @property
    def n_rows(self) -> int:
        """The number of rows that are picked."""
        return len(self.order)

    def read(self, first: int, n_rows: int) -> Values:
        """Reads picked rows, neighbours at once; raises ModelFileError."""
        picked = self.order[first : first + n_rows]
        runs = np.split(picked, np.flatnonzero(np.diff(picked) != 1) + 1)
        return np.concatenate([self._run(int(run[0]), len(run)) for run in runs])

    def _run(self, first: int, n_rows: int) -> Values:
        begin = first - first % self.rows.step
        end = min(self.rows.n_rows, first + n_rows + -(first + n_rows) % self.rows.step)
        return self.rows.read(begin, end - begin)[first - begin : first - begin + n_rows]


@dataclass(frozen=True, slots=True, eq=False)
class ChangedRows(RowsOfOthers):
    """The rows of a tensor with what `change` makes of their values."""

    change: Callable[[Values], Values]
    blocks: Blocks | None = None

    @property
    def n_rows(self) -> int:
        """The number of rows of the tensor."""
        return self.rows.n_rows

    @property
    def step(self) -> int:
        """As the tensor's."""
        return self.rows.step

    def read(self, first: int, n_rows: int) -> Values:
        """Reads rows and changes their values; raises ModelFileError."""
        return np.ascontiguousarray(self.change(self.rows.read(first, n_rows)))


@dataclass(frozen=True, slots=True, eq=False)
class FoldedRows:
    """The elements of a vector as `n_rows` rows, all of one length."""

    vector: StoredRows
    n_rows: int
    step: int = 1
    blocks: Blocks | None = None

    @property
    def name(self) -> str:
        """The name of the tensor, for messages."""
        return self.vector.name

    @property
    def path(self) -> Path:
        """The file that the tensor lies in."""
        return self.vector.path

    @property
    def n_per_row(self) -> int:
        """The number of elements in a row."""
        return self.vector.n_per_row // self.n_rows

    def read(self, first: int, n_rows: int) -> Values:
        """Reads the vector, and gives some of its rows; raises ModelFileError."""
        return self.vector.read(0, 1).reshape(self.n_rows, -1)[first : first + n_rows]


def folded(stored: StoredMatrix, n_rows: int) -> StoredMatrix:
    """A vector as a matrix of so many rows; one of another length as it is, to be refused by its shape."""
    if len(stored.shape) != 1 or stored.shape[0] % n_rows:
        return stored
    return StoredMatrix((n_rows, stored.shape[0] // n_rows), FoldedRows(stored.rows, n_rows))


def picked_rows(stored: StoredMatrix, order: Order) -> StoredMatrix:
    """The rows of a matrix in that order, all or some of them; the numbers must be those of rows."""
    return StoredMatrix((len(order), *stored.shape[1:]), PickedRows(stored.rows, order))


def picked_columns(rows: StoredRows, order: Order) -> ChangedRows:
    """The rows of a tensor, their elements in that order; of a vector, its elements."""
    return ChangedRows(rows, partial(np.take, indices=order, axis=1))
