"""Makes a file of a source and its layout: layer by layer, a matrix or some rows at a time, all of it or nothing."""

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from itertools import groupby
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES
from numpy.typing import NDArray

from slimoe.converter.gguf.writer import Piece, Progress, write_pieces
from slimoe.converter.layout.layer import Matrix
from slimoe.converter.layout.offsets import FileLayout, lay_out, matrix_bytes
from slimoe.converter.layout.plan import CompressPlan
from slimoe.converter.quant.mixes import layer_and_role
from slimoe.converter.quant.quantize import BadWeightsError
from slimoe.converter.source.model_source import PROJECTIONS, Blocks, ModelSource
from slimoe.converter.stats.statistics import Statistics
from slimoe.converter.write.matrix import (
    copy_blocks,
    copy_rows,
    kept_rows,
    origin_of,
    read_matrix,
    stored_blocks,
    stored_rows,
)
from slimoe.converter.write.quantiser import PlainQuantiser, Quantiser, statistics_importance
from slimoe.offload.errors import ModelFileError, UsageError
from slimoe.offload.files.whole_file import Destination
from slimoe.offload.model.tensor_list import EXPERT_LATENT

_COPY_BYTES = 1 << 24
_CHUNK_WEIGHTS = 1 << 22
_ALL_CHUNKS_WEIGHTS = 1 << 26
"""Most weights that all threads hold together."""


@dataclass(frozen=True, slots=True)
class WriteReport:
    """What was written: path and bytes, `n_copied` of them as they lie in the source, seconds, bytes by type."""

    path: Path
    n_bytes: int
    n_copied: int
    seconds: float
    n_tensors: int
    bytes_by_type: dict[str, int]


def write_planned(
    source: ModelSource,
    plan: CompressPlan,
    target: Path | Destination,
    statistics: Statistics | None = None,
    *,
    quantiser: Quantiser | None = None,
    n_threads: int = 1,
    force: bool = False,
    on_progress: Progress = lambda _done, _total: None,
) -> WriteReport:
    """Writes what `plan` makes of `source`, as `write_layout` does; by default `PlainQuantiser` makes the blocks.

    Raises what `lay_out` and `write_layout` do, and UsageError for a plan that needs statistics without them.
    """
    if plan.importance and statistics is None:
        raise UsageError("The plan fits types to what matrices read, which is not known. Give statistics.")
    layout = lay_out(source, plan, statistics)
    if quantiser is None:
        quantiser = _plain_quantiser(plan, statistics, n_threads)
    return write_layout(source, layout, target, quantiser, n_threads=n_threads, force=force, on_progress=on_progress)


def write_layout(
    source: ModelSource,
    layout: FileLayout,
    target: Path | Destination,
    quantiser: Quantiser,
    *,
    n_threads: int = 1,
    force: bool = False,
    on_progress: Progress = lambda _done, _total: None,
) -> WriteReport:
    """Writes a file as it is laid out. Matrices that the source stores as blocks of their type are copied.

    A `PlainQuantiser` is asked by `n_threads` threads for a few rows at a time, as they are read from the source's
    files: memory is bounded, whatever size the model has. Any other needs two matrices in float32 and a few in blocks,
    besides its own memory. Raises what `write_pieces` does, and ModelFileError for weights that cannot be read, are no
    numbers or cannot be expressed in their type.
    """
    begin = time.monotonic()
    is_plain = isinstance(quantiser, PlainQuantiser)
    write_pieces(
        layout.header,
        FilePieces(source, layout, quantiser, n_threads).all(),
        target,
        n_bytes=layout.n_bytes,
        # Others make pieces while they are drawn, in order: all that is left for a thread is to write them.
        n_threads=n_threads if is_plain else 1,
        force=force,
        on_progress=on_progress,
    )
    seconds, path = time.monotonic() - begin, target.target if isinstance(target, Destination) else target
    n_copied = copied_bytes(source, layout)
    return WriteReport(path, layout.n_bytes, n_copied, seconds, len(layout.tensors), layout.bytes_by_type)


def copied_bytes(source: ModelSource, layout: FileLayout) -> int:
    """Bytes of a file that are taken over as they lie in the source."""
    matrices = (matrix for tensor in layout.tensors for matrix in tensor.matrices)
    return sum(matrix_bytes(matrix) for matrix in matrices if stored_blocks(source, matrix))


class FilePieces:
    """Draws a file's pieces from a source, strictly in the order that `Quantiser` promises."""

    def __init__(self, source: ModelSource, layout: FileLayout, quantiser: Quantiser, n_threads: int = 1) -> None:
        self._source, self._quantiser = source, quantiser
        self._plain = quantiser if isinstance(quantiser, PlainQuantiser) else None
        self._n_weights = max(1, min(_CHUNK_WEIGHTS, _ALL_CHUNKS_WEIGHTS // n_threads))
        self._offsets: dict[tuple[str, int], int] = {}
        for tensor in layout.tensors:
            offset = len(layout.header) + tensor.offset
            for matrix in tensor.matrices:
                self._offsets[matrix.tensor, matrix.slot] = offset
                offset += matrix_bytes(matrix)
        self._matrices = [matrix for tensor in layout.tensors for matrix in tensor.matrices]

    def all(self) -> Iterator[Piece]:
        """Every matrix, quantised when it is drawn or, by a `PlainQuantiser`, later; raises as `write_layout` does."""
        ordered = [sorted(group, key=_use) for _, group in groupby(self._matrices, _layer)]
        with_weights = self._read_ahead(matrix for group in ordered for matrix in group)
        for group in ordered:
            layer = _layer(group[0])
            if layer >= 0:
                self._quantiser.begin_layer(layer)
            for _ in group:
                yield from self._pieces(*next(with_weights))
            if layer >= 0:
                self._quantiser.end_layer(layer)

    def _read_ahead(self, matrices: Iterable[Matrix]) -> Iterator[tuple[Matrix, NDArray[np.float32] | None]]:
        """Each matrix with its weights, the next one's being read meanwhile; without those that are read in parts."""
        with ThreadPoolExecutor(1, "convert-read") as reader:
            coming = None
            for matrix in matrices:
                before, coming = coming, (matrix, reader.submit(self._weights, matrix))
                if before:
                    yield before[0], before[1].result()
            if coming:
                yield coming[0], coming[1].result()

    def _weights(self, matrix: Matrix) -> NDArray[np.float32] | None:
        is_read_later = self._plain is not None and stored_rows(self._source, matrix) is not None
        return None if is_read_later or self._stored(matrix) else read_matrix(self._source, matrix)

    def _stored(self, matrix: Matrix) -> Blocks | None:
        """What is copied. Routers are not, where the quantiser may change them."""
        if self._plain is None and matrix.key.name.endswith("ffn_gate_inp.weight"):
            return None
        return stored_blocks(self._source, matrix)

    def _pieces(self, matrix: Matrix, weights: NDArray[np.float32] | None) -> Iterator[Piece]:
        offset = self._offsets[matrix.tensor, matrix.slot]
        if blocks := self._stored(matrix):
            if not matrix.is_constant:
                self._quantiser.kept(matrix)
            yield from _copies(matrix, blocks, offset)
        elif self._plain is not None:
            yield from self._parts(matrix, weights, self._plain, offset)
        else:
            assert weights is not None
            make = partial(self._quantiser.quantise, matrix)
            data = weights.reshape(-1).view(np.uint8) if matrix.is_constant else self._made(matrix, weights, make)
            yield Piece(offset, data.nbytes, lambda: data)

    def _parts(
        self, matrix: Matrix, weights: NDArray[np.float32] | None, plain: PlainQuantiser, offset: int
    ) -> Iterator[Piece]:
        """Some rows in each piece, from the source's files if they are not in memory."""
        rows = stored_rows(self._source, matrix) if weights is None else None
        n_rows, n_per_row = matrix.shape
        row_bytes, step = matrix_bytes(matrix) // n_rows, rows.step if rows else 1
        n_at_once = max(1, self._n_weights // (n_per_row * step)) * step

        def read(first: int, n: int) -> NDArray[np.float32]:
            if rows is not None:
                return rows.read(first, n)
            assert weights is not None
            return weights[first : first + n]

        @cache
        def gain() -> float:
            """Measured by the thread that makes the first piece; one that comes meanwhile finds the same."""
            return plain.gain(matrix, read, step)

        def make(first: int, n: int) -> NDArray[np.uint8]:
            return self._made(matrix, read(first, n), lambda values: plain.rows(matrix, values, first, gain()))

        for first in range(0, n_rows, n_at_once):
            n = min(n_at_once, n_rows - first)
            yield Piece(offset + first * row_bytes, n * row_bytes, partial(make, first, n))

    def _made(
        self, matrix: Matrix, weights: NDArray[np.float32], quantise: Callable[[NDArray[np.float32]], NDArray[np.uint8]]
    ) -> NDArray[np.uint8]:
        try:
            return quantise(weights)
        except BadWeightsError as error:
            rows = stored_rows(self._source, matrix)
            path, name = (rows.path, rows.name) if rows else (self._source.path, origin_of(matrix) or matrix.key)
            raise ModelFileError(path, f"tensor {name} {error}.") from None


def _copies(matrix: Matrix, blocks: Blocks, offset: int) -> Iterator[Piece]:
    rows = kept_rows(matrix)
    if rows is not None:
        yield Piece(offset, matrix_bytes(matrix), partial(copy_rows, blocks, matrix, rows))
        return
    name = str(origin_of(matrix) or matrix.key)
    step = _COPY_BYTES // GGML_QUANT_SIZES[blocks.type][1] * GGML_QUANT_SIZES[blocks.type][1]
    for begin in range(0, blocks.n_bytes, step):
        n_bytes = min(step, blocks.n_bytes - begin)
        yield Piece(offset + begin, n_bytes, partial(copy_blocks, blocks, name, begin, n_bytes))


def _layer(matrix: Matrix) -> int:
    return layer_and_role(matrix.key.name)[0]


def _use(matrix: Matrix) -> tuple[int, ...]:
    """Sorts a layer's matrices into the order that `Quantiser` promises."""
    if matrix.key.expert >= 0:
        return 1, matrix.copy, matrix.key.expert, PROJECTIONS.index(matrix.projection)
    if layer_and_role(matrix.key.name)[1] == EXPERT_LATENT[1]:  # It reads the experts' sum.
        return (2,)
    return (3,) if "ffn_gate_inp" in matrix.key.name else (0,)


def _plain_quantiser(plan: CompressPlan, statistics: Statistics | None, n_threads: int) -> PlainQuantiser:
    if statistics is None or not plan.importance:
        return PlainQuantiser(n_threads=n_threads)
    is_tied = plan.output_type is None
    importance = statistics_importance(statistics, is_tied=is_tied)
    return PlainQuantiser(importance, without_gain=True, n_threads=n_threads)


def chosen_quantiser(
    source: ModelSource, plan: CompressPlan, statistics: Statistics | None, n_threads: int
) -> Quantiser:
    """The quantiser that carries the plan out; raises UsageError for one that needs statistics without them."""
    plain = _plain_quantiser(plan, statistics, n_threads)
    if not plan.feedback and not plan.refit:
        return plain
    if statistics is None:
        raise UsageError(
            "Feedback and refitted routers need calibration tokens. Run slimoe calibrate, give --stats FILE."
        )
    # torch is heavy, and all other ways of converting do without.
    from slimoe.converter.write.error_feedback import FeedbackQuantiser

    return FeedbackQuantiser(source, plan, statistics, plain, n_threads=n_threads)
