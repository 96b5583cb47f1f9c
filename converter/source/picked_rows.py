"""Rows of stored tensors in another order, or with other values, as GGUF files have them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

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


def picked_rows(stored: StoredMatrix, order: Order) -> StoredMatrix:
    """The rows of a matrix in that order, all or some of them; the numbers must be those of rows."""
    return StoredMatrix((len(order), *stored.shape[1:]), PickedRows(stored.rows, order))


def picked_columns(rows: StoredRows, order: Order) -> ChangedRows:
    """The rows of a tensor, their elements in that order; of a vector, its elements."""
    return ChangedRows(rows, partial(np.take, indices=order, axis=1))
