"""Carries a plan out: reads, converts and writes chunk by chunk in several threads, in bounded memory.

A chunk is a few megabytes of rows, so that nothing of a tensor's size is ever held. Chunks are independent: each
worker reads its rows with a positioned read and writes its blocks with a positioned write.
"""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from converter.architecture import SourceRows, rotation_order
from converter.checkpoint import DTYPE_BYTES
from converter.plan import ConvertPlan, TensorPlan
from converter.quantize import BadWeightsError, quantize_rows, to_f32
from offload.errors import DoesNotFitError, ModelFileError, UsageError

Progress = Callable[[int, int], None]
"""Called with (bytes written, bytes of the whole file)."""

_CHUNK_ELEMENTS = 1 << 22
_ALL_CHUNKS_ELEMENTS = 1 << 26


@dataclass(frozen=True, slots=True)
class _Chunk:
    """`n_rows` rows of a source from `first_row` on, and where their blocks belong in the file."""

    plan: TensorPlan
    rows: SourceRows
    offset: int
    n_bytes: int


def write_gguf(plan: ConvertPlan, target: Path, *, n_threads: int, force: bool, on_progress: Progress) -> None:
    """Writes the planned file under a temporary name, syncs it and renames it to `target`.

    Whatever goes wrong, an interruption included, leaves neither `target` nor the temporary file behind. Raises
    UsageError for a target that exists or cannot be, DoesNotFitError when the disk lacks the space, and
    ModelFileError for weights that are not numbers or a source that changes meanwhile.
    """
    check_target(plan, target, force=force)
    part = target.with_name(target.name + ".part")
    try:
        with part.open("wb") as file:
            file.truncate(plan.n_bytes)
            file.write(plan.header)
            file.flush()
            _write_tensors(plan, file.fileno(), n_threads, on_progress)
            os.fsync(file.fileno())
        os.replace(part, target)
        _sync_directory(target.parent)
    except OSError as error:
        raise _explained(error, plan, target) from None
    finally:
        part.unlink(missing_ok=True)


def check_target(plan: ConvertPlan, target: Path, *, force: bool) -> None:
    """Refuses a target before anything is written: existing, impossible, or too large for the disk."""
    if target.is_dir():
        raise UsageError(f"{target} is a directory. Name the file to write, such as {target / 'model.gguf'}.")
    if target.exists() and not force:
        raise UsageError(f"{target} exists. Choose another name, or overwrite it with --force.")
    if not target.parent.is_dir():
        raise UsageError(f"{target.parent} is no directory. Create it first.")
    available = shutil.disk_usage(target.parent).free
    if available < plan.n_bytes:
        raise _too_large(plan, target, available)


def _too_large(plan: ConvertPlan, target: Path, available: int) -> DoesNotFitError:
    message = f"The file needs {plan.n_bytes:,} bytes, but {target.parent} has only {available:,} free."
    return DoesNotFitError(
        message + " Free some space or choose a smaller --type.",
        required_bytes=plan.n_bytes,
        available_bytes=available,
    )


def _explained(error: OSError, plan: ConvertPlan, target: Path) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return _too_large(plan, target, shutil.disk_usage(target.parent).free)
    return UsageError(f"{target} cannot be written ({error.strerror}). Choose another place.")


def _sync_directory(path: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_tensors(plan: ConvertPlan, target: int, n_threads: int, on_progress: Progress) -> None:
    chunks = _chunks(plan, max(1, min(_CHUNK_ELEMENTS, _ALL_CHUNKS_ELEMENTS // n_threads)))
    done = len(plan.header) + _write_values(plan, target)
    on_progress(done, plan.n_bytes)
    with ExitStack() as stack:
        sources = _open_sources(plan, stack)
        executor = stack.enter_context(ThreadPoolExecutor(n_threads, "convert"))
        stack.callback(executor.shutdown, wait=True, cancel_futures=True)
        running = {executor.submit(_convert_chunk, c, sources, target) for c in islice(chunks, 2 * n_threads)}
        while running:
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            done += sum(future.result() for future in finished)
            on_progress(done, plan.n_bytes)
            running |= {executor.submit(_convert_chunk, c, sources, target) for c in islice(chunks, len(finished))}


def _write_values(plan: ConvertPlan, target: int) -> int:
    """Writes the few small tensors that are computed and not stored; the number of bytes written."""
    n_written = 0
    for tensor in plan.tensors:
        if tensor.target.values is not None:
            blocks = quantize_rows(tensor.target.values.reshape(1, -1), tensor.type)
            _write_exactly(target, blocks, tensor.offset)
            n_written += blocks.size
    return n_written


def _open_sources(plan: ConvertPlan, stack: ExitStack) -> dict[Path, int]:
    paths = {rows.tensor.path for tensor in plan.tensors for rows in tensor.target.sources}
    return {path: stack.enter_context(path.open("rb", buffering=0)).fileno() for path in sorted(paths)}


def _chunks(plan: ConvertPlan, n_elements: int) -> Iterator[_Chunk]:
    """Cuts every tensor into chunks of about `n_elements` weights, at heads where rows are reordered."""
    for tensor in plan.tensors:
        target = tensor.target
        n_rows_all = max(1, sum(rows.n_rows for rows in target.sources))
        row_bytes = tensor.n_bytes // n_rows_all
        unit = target.n_rotated_head if len(target.ne) > 1 and target.n_rotated_head else 1
        step = max(1, n_elements // (target.ne[0] * unit)) * unit
        offset = tensor.offset
        for rows in target.sources:
            for first in range(0, rows.n_rows, step):
                n_rows = min(step, rows.n_rows - first)
                part = SourceRows(rows.tensor, rows.first_row + first, n_rows)
                yield _Chunk(tensor, part, offset, n_rows * row_bytes)
                offset += n_rows * row_bytes


def _convert_chunk(chunk: _Chunk, sources: dict[Path, int], target: int) -> int:
    """Converts and writes one chunk; the number of bytes written, padding not counted."""
    tensor, n_per_row = chunk.rows.tensor, chunk.plan.target.ne[0]
    row_bytes = n_per_row * DTYPE_BYTES[tensor.dtype]
    raw = np.empty(chunk.rows.n_rows * row_bytes, np.uint8)
    _read_exactly(sources[tensor.path], raw, tensor.offset + chunk.rows.first_row * row_bytes, tensor.path)
    values = to_f32(raw, tensor.dtype).reshape(chunk.rows.n_rows, n_per_row)
    n_head = chunk.plan.target.n_rotated_head
    if n_head and len(chunk.plan.target.ne) > 1:
        values = rotation_order(values, n_head)
    elif n_head:
        values = rotation_order(values.reshape(-1, 1), n_head).reshape(1, -1)
    try:
        blocks = quantize_rows(values, chunk.plan.type)
    except BadWeightsError as error:
        raise ModelFileError(tensor.path, f"tensor {tensor.name} {error}.") from None
    assert blocks.size == chunk.n_bytes
    _write_exactly(target, blocks, chunk.offset)
    return chunk.n_bytes


def _read_exactly(source: int, into: NDArray[np.uint8], offset: int, path: Path) -> None:
    view = into.data
    while view:
        try:
            n_read = os.preadv(source, [view], offset)
        except OSError as error:
            raise ModelFileError(path, f"the file cannot be read ({error.strerror}).") from None
        if n_read == 0:
            raise ModelFileError(path, "the file became shorter while it was read.", "Download the checkpoint again.")
        view, offset = view[n_read:], offset + n_read


def _write_exactly(target: int, data: NDArray[np.uint8], offset: int) -> None:
    view = data.data
    while view:
        n_written = os.pwrite(target, view, offset)
        view, offset = view[n_written:], offset + n_written
