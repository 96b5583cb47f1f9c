"""The rows of the token table that a step needs, read from the file: the whole table would waste a tight budget."""

import contextlib
import os

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from slimoe.offload.cache.disk_reader import FileStamp, changed_file, unreadable_file
from slimoe.offload.ggml import buffers as ggml_backend
from slimoe.offload.ggml import ops as ggml
from slimoe.offload.ggml.cpu_backend import Backend
from slimoe.offload.gguf.header import GGUFFile
from slimoe.offload.model.tensors import WeightSource

_ALIGNMENT = 256


def row_bytes(table: WeightSource, n_rows: int) -> int:
    """Memory of `n_rows` rows of the token table."""
    return table.n_bytes // table.ne[1] * n_rows + _ALIGNMENT


class TokenRows:
    """A tensor [n_embd, n_batch] of the table's type in host memory, filled with the rows of a step's tokens."""

    def __init__(self, gguf: GGUFFile, table: WeightSource, backend: Backend, n_batch: int) -> None:
        assert backend.is_host
        (span,) = table.spans
        self._path = gguf.paths[span.shard]
        self._offset, self._row_bytes = span.offset, table.n_bytes // table.ne[1]
        self._file = os.open(self._path, os.O_RDONLY)
        self._stamp = FileStamp.of(self._file)
        with contextlib.suppress(OSError, AttributeError):
            # A row is one page or two; reading ahead around it would only push others out.
            os.posix_fadvise(self._file, span.offset, span.n_bytes, os.POSIX_FADV_RANDOM)
        self._ctx = ggml.ggml_init(ggml.InitParams(4 * ggml.ggml_tensor_overhead(), None, True))
        kind: GGMLQuantizationType = table.type
        self.tensor: int = ggml.ggml_new_tensor_2d(self._ctx, kind, table.ne[0], n_batch)
        self._buffer = backend.allocate(row_bytes(table, n_batch))
        base = ggml_backend.ggml_backend_buffer_get_base(self._buffer)
        ggml_backend.ggml_backend_tensor_alloc(self._buffer, self.tensor, base)
        self._rows = ggml.array_at(base, np.uint8, self._row_bytes * n_batch)

    @property
    def n_bytes(self) -> int:
        """Memory of the rows."""
        return int(self._rows.nbytes)

    def load(self, tokens: NDArray[np.int32]) -> None:
        """Makes row i of the tensor that of `tokens[i]`. Raises ReadFailedError."""
        size = self._row_bytes
        view = self._rows.data
        for index, token in enumerate(tokens.tolist()):
            target = view[index * size : (index + 1) * size]
            try:
                n_read = os.preadv(self._file, [target], self._offset + token * size)
            except OSError as error:
                raise unreadable_file(self._path, error) from None
            if n_read < size:
                raise changed_file(self._path)
        self.check_file()

    def check_file(self) -> None:
        """Raises FileChangedError when the file was written to since it was opened."""
        if FileStamp.of(self._file) != self._stamp:
            raise changed_file(self._path)

    def close(self) -> None:
        """Frees the tensor and closes the file."""
        if self._buffer:
            ggml_backend.ggml_backend_buffer_free(self._buffer)
            ggml.ggml_free(self._ctx)
            os.close(self._file)
            self._buffer = 0
