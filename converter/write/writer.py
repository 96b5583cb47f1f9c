"""Makes a compressed file of a source and a plan: layer by layer, a matrix at a time, all of it or nothing."""

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
from slimoe.converter.layout.offsets import FileLayout, lay_out, matrix_bytes
from slimoe.converter.layout.plan import CompressPlan
from slimoe.converter.plain.plan_pieces import copy_blocks
from slimoe.converter.quant.mixes import layer_and_role
from slimoe.converter.quant.quantize import BadWeightsError
from slimoe.converter.source.model_source import PROJECTIONS, Blocks, ModelSource
from slimoe.converter.stats.statistics import Statistics
from slimoe.converter.write.matrix import copy_rows, kept_rows, origin_of, read_matrix, stored_blocks
from slimoe.converter.write.quantiser import PlainQuantiser, Quantiser
from slimoe.offload.errors import ModelFileError, UsageError
from slimoe.offload.files.whole_file import Destination

_COPY_BYTES = 1 << 24


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
    """Writes what `plan` makes of `source`. `quantiser` turns weights into blocks, by default `PlainQuantiser`.

    Memory is two matrices in float32, what merging and `quantiser` need, and a few matrices in blocks. Matrices that
    the source stores as blocks of their type are copied. Raises what `lay_out` and `write_pieces` do, ModelFileError
    for weights that their type cannot express, and UsageError for a plan that needs statistics without them.
    """
    begin = time.monotonic()
    if plan.importance and statistics is None:
        raise UsageError("The plan fits types to what matrices read, which is not known. Give statistics.")
    layout = lay_out(source, plan, statistics)
    if quantiser is None:
        known = statistics if plan.importance else None
        quantiser = PlainQuantiser(known, is_tied=plan.output_type is None, n_threads=n_threads)
    pieces = FilePieces(source, layout, quantiser)
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
    return WriteReport(path, layout.n_bytes, pieces.n_copied, seconds, len(layout.tensors), layout.bytes_by_type)


class FilePieces:
    """Draws a file's pieces from a source, strictly in the order that `Quantiser` promises. `n_copied` counts bytes."""

    def __init__(self, source: ModelSource, layout: FileLayout, quantiser: Quantiser) -> None:
        self.n_copied = 0
        self._source, self._quantiser = source, quantiser
        begin = len(layout.header)
        self._offsets = {tensor.name: begin + tensor.offset for tensor in layout.tensors}
        self._matrices = [matrix for tensor in layout.tensors for matrix in tensor.matrices]

    def all(self) -> Iterator[Piece]:
        """Every matrix, fitted when it is drawn; raises as `write_planned` does."""
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

    def _pieces(self, matrix: Matrix, weights: NDArray[np.float32] | None) -> Iterator[Piece]:
        offset = self._offsets[matrix.tensor] + matrix.slot * matrix_bytes(matrix)
        if weights is None:
            if not matrix.is_constant:
                self._quantiser.kept(matrix)
            yield from self._copies(matrix, offset)
        elif matrix.is_constant:
            yield _piece(offset, weights.reshape(-1).view(np.uint8))
        else:
            yield _piece(offset, self._fitted(matrix, weights))

    def _fitted(self, matrix: Matrix, weights: NDArray[np.float32]) -> NDArray[np.uint8]:
        try:
            blocks = self._quantiser.quantise(matrix, weights)
        except BadWeightsError as error:
            raise ModelFileError(self._source.path, f"tensor {origin_of(matrix) or matrix.key} {error}.") from None
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
        blocks, rows = stored_blocks(self._source, matrix), kept_rows(matrix)
        assert blocks is not None
        self.n_copied += matrix_bytes(matrix)
        if rows is not None:
            yield Piece(offset, matrix_bytes(matrix), partial(copy_rows, blocks, matrix, rows))
            return
        name = str(origin_of(matrix) or matrix.key)
        step = _COPY_BYTES // GGML_QUANT_SIZES[blocks.type][1] * GGML_QUANT_SIZES[blocks.type][1]
        for begin in range(0, blocks.n_bytes, step):
            n_bytes = min(step, blocks.n_bytes - begin)
            part = Blocks(blocks.type, blocks.path, blocks.offset + begin, n_bytes)
            yield Piece(offset + begin, n_bytes, partial(copy_blocks, part, name))


def _piece(offset: int, data: NDArray[np.uint8]) -> Piece:
    return Piece(offset, data.nbytes, lambda: data)


def _layer(matrix: Matrix) -> int:
    return layer_and_role(matrix.key.name)[0]


def _use(matrix: Matrix) -> tuple[int, ...]:
    """Sorts a layer's matrices into the order that `Quantiser` promises."""
    if matrix.key.expert >= 0:
        return 1, matrix.copy, matrix.key.expert, PROJECTIONS.index(matrix.projection)
    return (2,) if "ffn_gate_inp" in matrix.key.name else (0,)


def chosen_quantiser(
    source: ModelSource, plan: CompressPlan, statistics: Statistics | None, n_threads: int
) -> Quantiser:
    """The quantiser that carries the plan out; raises UsageError for one that needs statistics without them."""
    plain = PlainQuantiser(
        statistics if plan.importance else None, is_tied=plan.output_type is None, n_threads=n_threads
    )
    if not plan.feedback and not plan.refit:
        return plain
    if statistics is None:
        raise UsageError(
            "Feedback and refitted routers need calibration tokens. Run slimoe calibrate, give --stats FILE."
        )
    # torch is heavy, and all other ways of converting do without.
    from slimoe.converter.write.error_feedback import FeedbackQuantiser

    return FeedbackQuantiser(source, plan, statistics, plain, n_threads=n_threads)
