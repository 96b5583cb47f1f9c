"""Writes a file from independent pieces in several threads, in bounded memory, all of it or nothing."""

import os
from collections import deque
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from slimoe.offload.errors import DoesNotFitError, UsageError
from slimoe.offload.files.whole_file import Destination, free_bytes, real_path, reserved, whole_file
from slimoe.offload.gguf.header import SHARD_NAME

Progress = Callable[[int, int], None]
"""Called with (bytes written, bytes of the whole file)."""


@dataclass(frozen=True, slots=True)
class Piece:
    """`n_bytes` bytes of the file from `offset` on. `make` computes them, in any thread; it raises what went wrong."""

    offset: int
    n_bytes: int
    make: Callable[[], NDArray[np.uint8]]


def write_pieces(
    header: bytes,
    pieces: Iterable[Piece],
    target: Path | Destination,
    *,
    n_bytes: int,
    n_threads: int,
    force: bool,
    on_progress: Progress,
) -> None:
    """Writes a file of `n_bytes` under a temporary name, syncs it and renames it to `target`.

    No other run may write `target` meanwhile. What neither header nor pieces cover is zero. Pieces are drawn in order
    by the calling thread, at most two a thread ahead of those that are done, and made and written in any order.
    Whatever goes wrong, an interruption included, leaves neither `target` nor the temporary file behind. Raises
    UsageError for a target that exists, cannot be or is being written, DoesNotFitError when the disk lacks the space,
    and whatever a piece raises.
    """
    with reserved(target) as destination:
        path = destination.target
        check_target(path, n_bytes, force=force)
        try:
            with whole_file(path, destination.folder) as part, part.open("r+b") as file:
                file.truncate(n_bytes)
                file.write(header)
                file.flush()
                _write_all(pieces, file.fileno(), n_threads, lambda done: on_progress(len(header) + done, n_bytes))
        except DoesNotFitError as error:
            raise _too_large(path, n_bytes, error.available_bytes) from None


def check_target(target: Path, n_bytes: int, *, force: bool, sources: Collection[Path] = ()) -> None:
    """Refuses a target before anything is written: existing, a source, impossible, or too large for the disk."""
    real = real_path(target)
    if real.exists() and any(source.exists() and real.samefile(source) for source in sources):
        raise UsageError(f"{target} is a file of the model that is read. Choose another name.")
    if real.exists() and not force:
        raise UsageError(f"{target} exists. Choose another name, or overwrite it with --force.")
    if SHARD_NAME.match(target.name):
        raise UsageError(f"{target} is the name of one file of several, and one is written. Choose another name.")
    available = free_bytes(real.parent)
    if available < n_bytes:
        raise _too_large(target, n_bytes, available)


def _too_large(target: Path, n_bytes: int, available: int) -> DoesNotFitError:
    message = f"The file needs {n_bytes:,} bytes, but {target.parent} has only {available:,} free."
    return DoesNotFitError(
        message + " Free some space, or ask for a smaller file.",
        required_bytes=n_bytes,
        available_bytes=available,
    )


def _write_all(pieces: Iterable[Piece], target: int, n_threads: int, on_progress: Callable[[int], None]) -> None:
    waiting, done = iter(pieces), 0
    on_progress(done)
    executor = ThreadPoolExecutor(n_threads, "convert")
    try:
        running = deque(executor.submit(_write_piece, piece, target) for piece in islice(waiting, 2 * n_threads))
        while running:
            # In their order, so that of several pieces that cannot be made the first is told.
            done += running.popleft().result()
            on_progress(done)
            running.extend(executor.submit(_write_piece, piece, target) for piece in islice(waiting, 1))
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _write_piece(piece: Piece, target: int) -> int:
    """Makes and writes one piece; the number of bytes written, padding not counted."""
    data = piece.make()
    assert data.nbytes == piece.n_bytes, (data.nbytes, piece)
    view, offset = data.data.cast("B"), piece.offset
    while view:
        n_written = os.pwrite(target, view, offset)
        view, offset = view[n_written:], offset + n_written
    return piece.n_bytes
