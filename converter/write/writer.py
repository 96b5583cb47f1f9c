"""Makes a slimmed file of a source and a plan: layer by layer, a matrix at a time, all of it or nothing."""

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES
from numpy.typing import NDArray

from slimoe.converter.gguf.writer import Piece, Progress, write_pieces
from slimoe.converter.layout.layer import Matrix
from slimoe.converter.layout.offsets import SlimLayout, lay_out, matrix_bytes
from slimoe.converter.layout.plan import SlimPlan
from slimoe.converter.methods.merged import merged_matrix
from slimoe.converter.plain.plan_pieces import copy_blocks
from slimoe.converter.quant.mixes import layer_and_role
from slimoe.converter.quant.quantize import BadWeightsError
from slimoe.converter.source.model_source import PROJECTIONS, Blocks, MatrixKey, ModelSource, expert_key
from slimoe.converter.stats.statistics import Statistics
from slimoe.converter.write.quantiser import Fit, PlainFit
from slimoe.offload.errors import ModelFileError, UsageError
from slimoe.offload.files.whole_file import Destination

_COPY_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class SlimReport:
    """What was written: path and bytes, `n_copied` of them as they lie in the source, seconds, bytes by type."""

    path: Path
    n_bytes: int
    n_copied: int
    seconds: float
    n_tensors: int
    bytes_by_type: dict[str, int]


def slim(
    source: ModelSource,
    plan: SlimPlan,
    target: Path | Destination,
    statistics: Statistics | None = None,
    *,
    fit: Fit | None = None,
    n_threads: int = 1,
    force: bool = False,
    on_progress: Progress = lambda _done, _total: None,
) -> SlimReport:
    """Writes what `plan` makes of `source`. `fit` turns weights into blocks, by default `PlainFit`.

    Memory is two matrices in float32, what merging and `fit` need, and a few matrices in blocks. Matrices that the
    source stores as blocks of their type are copied. Raises what `lay_out` and `write_pieces` do, ModelFileError for
    weights that their type cannot express, and UsageError for a plan that needs statistics without them.
    """
    begin = time.monotonic()
    if plan.importance and statistics is None:
        raise UsageError("The plan fits types to what matrices read, which is not known. Give statistics.")
    layout = lay_out(source, plan, statistics)
    if fit is None:
        known = statistics if plan.importance else None
        fit = PlainFit(known, is_tied=plan.output_type is None, n_threads=n_threads)
    pieces = SlimPieces(source, layout, fit)
    write_pieces(
        layout.header,
        pieces.all(),
        target,
        n_bytes=layout.n_bytes,
        # Pieces are made while they are drawn, in order: all that is left for a thread is to write them.
        n_threads=1,
        force=force,
        on_progress=on_progress,
    )
    seconds, path = time.monotonic() - begin, target.target if isinstance(target, Destination) else target
    return SlimReport(path, layout.n_bytes, pieces.n_copied, seconds, len(layout.tensors), layout.bytes_by_type)


class SlimPieces:
    """Draws a file's pieces from a source, strictly in the order that `Fit` promises. `n_copied` counts bytes."""

    def __init__(self, source: ModelSource, layout: SlimLayout, fit: Fit) -> None:
        self.n_copied = 0
        self._source, self._fit = source, fit
        begin = len(layout.header)
        self._offsets = {tensor.name: begin + tensor.offset for tensor in layout.tensors}
        self._matrices = [matrix for tensor in layout.tensors for matrix in tensor.matrices]

    def all(self) -> Iterator[Piece]:
        """Every matrix, fitted when it is drawn; raises as `slim` does."""
        ordered = [sorted(group, key=_use) for _, group in groupby(self._matrices, _layer)]
        with_weights = self._read_ahead(matrix for group in ordered for matrix in group)
        for group in ordered:
            layer = _layer(group[0])
            if layer >= 0:
                self._fit.begin_layer(layer)
            for _ in group:
                yield from self._pieces(*next(with_weights))
            if layer >= 0:
                self._fit.end_layer(layer)

    def _pieces(self, matrix: Matrix, weights: NDArray[np.float32] | None) -> Iterator[Piece]:
        offset = self._offsets[matrix.tensor] + matrix.slot * matrix_bytes(matrix)
        if weights is None:
            if not matrix.is_constant:
                self._fit.kept(matrix)
            yield from self._copies(matrix, offset)
        elif matrix.is_constant:
            yield _piece(offset, weights.reshape(-1).view(np.uint8))
        else:
            yield _piece(offset, self._fitted(matrix, weights))

    def _fitted(self, matrix: Matrix, weights: NDArray[np.float32]) -> NDArray[np.uint8]:
        try:
            blocks = self._fit.fit(matrix, weights)
        except BadWeightsError as error:
            raise ModelFileError(self._source.path, f"tensor {_origin(matrix) or matrix.key} {error}.") from None
        assert blocks.nbytes == matrix_bytes(matrix), matrix.key
        return blocks

    def _read_ahead(self, matrices: Iterable[Matrix]) -> Iterator[tuple[Matrix, NDArray[np.float32] | None]]:
        """Each matrix with its weights, the next one's being read meanwhile; without those that are copied."""
        with ThreadPoolExecutor(1, "slim") as reader:
            coming = None
            for matrix in matrices:
                before, coming = coming, (matrix, reader.submit(self._weights, matrix))
                if before:
                    yield before[0], before[1].result()
            if coming:
                yield coming[0], coming[1].result()

    def _weights(self, matrix: Matrix) -> NDArray[np.float32] | None:
        return None if stored_blocks(self._source, matrix) else read_matrix(self._source, matrix)

    def _copies(self, matrix: Matrix, offset: int) -> Iterator[Piece]:
        blocks, rows = stored_blocks(self._source, matrix), _kept_rows(matrix)
        assert blocks is not None
        self.n_copied += matrix_bytes(matrix)
        if rows is not None:
            yield Piece(offset, matrix_bytes(matrix), partial(_rows_of, blocks, matrix, rows))
            return
        name = str(_origin(matrix) or matrix.key)
        step = _COPY_BYTES // GGML_QUANT_SIZES[blocks.type][1] * GGML_QUANT_SIZES[blocks.type][1]
        for begin in range(0, blocks.n_bytes, step):
            n_bytes = min(step, blocks.n_bytes - begin)
            part = Blocks(blocks.type, blocks.path, blocks.offset + begin, n_bytes)
            yield Piece(offset + begin, n_bytes, partial(copy_blocks, part, name))


def read_matrix(source: ModelSource, matrix: Matrix) -> NDArray[np.float32]:
    """The values of a result's matrix or vector, of its shape, before they are fitted; raises ModelFileError."""
    if matrix.values is not None:
        weights = matrix.values
    elif matrix.expert is not None:
        weights = merged_matrix(source, matrix.block, matrix.expert, matrix.projection)
    else:
        assert matrix.origin is not None
        weights = source.read(matrix.origin)
        weights = weights if matrix.rows is None else weights[list(matrix.rows)]
    return np.ascontiguousarray(weights, np.float32).reshape(matrix.shape)


def stored_blocks(source: ModelSource, matrix: Matrix) -> Blocks | None:
    """The source's blocks that are the matrix, or hold it as some of their rows; None where it must be made."""
    origin = _origin(matrix)
    blocks = source.blocks(origin) if origin else None
    return blocks if blocks and blocks.type is matrix.type else None


def _origin(matrix: Matrix) -> MatrixKey | None:
    """The source's matrix that this is, whole or some rows of it."""
    expert = matrix.expert
    if expert is None:
        return matrix.origin
    cuts_columns = matrix.projection == "down" and (expert.kept is not None or expert.down is not None)
    if len(expert.members) > 1 or cuts_columns:
        return None
    return expert_key(matrix.block, matrix.projection, expert.members[0])


def _kept_rows(matrix: Matrix) -> NDArray[np.int64] | None:
    if matrix.rows is not None:
        return np.asarray(matrix.rows, np.int64)
    return matrix.expert.kept if matrix.expert else None


def _rows_of(blocks: Blocks, matrix: Matrix, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
    row_bytes = matrix_bytes(matrix) // matrix.shape[0]
    stored = copy_blocks(blocks, str(_origin(matrix) or matrix.key))
    return np.ascontiguousarray(stored.reshape(-1, row_bytes)[rows])


def _piece(offset: int, data: NDArray[np.uint8]) -> Piece:
    return Piece(offset, data.nbytes, lambda: data)


def _layer(matrix: Matrix) -> int:
    return layer_and_role(matrix.key.name)[0]


def _use(matrix: Matrix) -> tuple[int, ...]:
    """Sorts a layer's matrices into the order that `Fit` promises."""
    if matrix.key.expert >= 0:
        return 1, matrix.copy, matrix.key.expert, PROJECTIONS.index(matrix.projection)
    return (2,) if "ffn_gate_inp" in matrix.key.name else (0,)
