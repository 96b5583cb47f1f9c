"""Reads experts from the file in the background: demanded ones first, those that are only likely when nothing waits.

Reads are positioned and go around the page cache where the system allows it (O_DIRECT): inside a memory limit the
cache would compete with the arena for the same bytes, and copying out of it takes a core that computes.
"""

import contextlib
import ctypes
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from offload.errors import ModelFileError, SlimoeError
from offload.gguf_file import GGUFFile
from offload.weight_source import Span

PAGE = 4096
"""What direct reads are aligned to: file offsets, lengths and memory."""
_CHUNK = 2 << 20
"""A demanded read waits for at most one of these per thread that began before it."""


def padded(n_bytes: int) -> int:
    """Memory that a span of so many bytes needs, wherever in a page of the file it begins."""
    return -(-n_bytes // PAGE) * PAGE + PAGE


class ReadFailedError(SlimoeError):
    """The file could not be read while the model was running."""

    exit_code = 3


@dataclass(slots=True, eq=False)
class Read:
    """One expert on its way: chunks not yet taken, and how many are not yet done."""

    chunks: deque[tuple[int, int, int, int]]
    n_bytes: int
    n_left: int
    is_demanded: bool
    is_cancelled: bool = False
    error: SlimoeError | None = None
    n_taken: int = field(default=0)

    @property
    def is_done(self) -> bool:
        """Whether nothing of it is under way any more."""
        return self.n_left == 0


@dataclass(frozen=True, slots=True)
class _Stamp:
    """What tells a file that was written to from the one that was opened."""

    n_bytes: int
    modified_ns: int


class DiskReader:
    """Threads that read spans of a GGUF file to addresses.

    `n_read` counts bytes read, `n_wasted` those of cancelled reads, `busy_seconds` the time with reads under way.
    """

    def __init__(self, gguf: GGUFFile, n_threads: int = 2, direct: bool = True) -> None:
        self._paths = gguf.paths
        self._opened = contextlib.ExitStack()
        self._files = [self._open(index, direct) for index in range(len(gguf.paths))]
        self._stamps = [_stamp(file) for file in self._files]
        self._demanded: deque[Read] = deque()
        self._likely: deque[Read] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._n_active, self._began = 0, 0.0
        self.n_read = self.n_wasted = 0
        self.busy_seconds = 0.0
        self._threads = [threading.Thread(target=self._work, name=f"disk-{n}", daemon=True) for n in range(n_threads)]
        for thread in self._threads:
            thread.start()

    def _open(self, index: int, direct: bool) -> int:
        path = self._paths[index]
        try:
            file = _open_direct(path) if direct else None
            if file is None:
                file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise ModelFileError(path, f"the file cannot be opened ({error.strerror}).") from None
        self._opened.callback(os.close, file)
        return file

    # --- for the engine's thread ---------------------------------------------------------------------------

    def submit(self, parts: Sequence[tuple[Span, int]], *, demanded: bool) -> Read:
        """Begins to read spans, each to a page-aligned address; the data begins at `offset % PAGE` behind it."""
        chunks = deque(chunk for span, address in parts for chunk in _chunks(span, address))
        read = Read(chunks, sum(chunk[3] for chunk in chunks), len(chunks), demanded)
        with self._changed:
            (self._demanded if demanded else self._likely).append(read)
            self._changed.notify_all()
        return read

    def demand(self, read: Read) -> None:
        """Lets a read that was only likely go before all that still are."""
        if read.is_demanded:
            return
        with self._changed:
            read.is_demanded = True
            if read in self._likely:
                self._likely.remove(read)
                self._demanded.append(read)

    def cancel(self, read: Read) -> None:
        """Drops what is not yet under way and returns when nothing writes to the addresses any more."""
        with self._changed:
            self._drop(read)
            self._changed.wait_for(lambda: read.is_done)
            self.n_wasted += read.n_taken

    def wait(self, read: Read) -> None:
        """Returns when the read is complete; raises ReadFailedError when it failed."""
        if not read.is_done:
            self.demand(read)
            with self._changed:
                self._changed.wait_for(lambda: read.is_done)
        if read.error is not None:
            raise read.error

    @property
    def is_idle(self) -> bool:
        """Whether no demanded read waits to be taken."""
        return not self._demanded

    def _drop(self, read: Read) -> None:
        read.is_cancelled = True
        for queue in (self._demanded, self._likely):
            if read in queue:
                queue.remove(read)
        read.n_left -= len(read.chunks)
        read.chunks.clear()

    # --- the threads ---------------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed or self._demanded or self._likely)
                if self._is_closed:
                    return
                read, chunk = self._take()
            error = self._read(*chunk)
            with self._changed:
                self._finish(read, chunk, error)

    def _take(self) -> tuple[Read, tuple[int, int, int, int]]:
        queue = self._demanded or self._likely
        read = queue[0]
        chunk = read.chunks.popleft()
        if not read.chunks:
            queue.popleft()
        read.n_taken += chunk[3]
        if not self._n_active:
            self._began = time.perf_counter()
        self._n_active += 1
        return read, chunk

    def _finish(self, read: Read, chunk: tuple[int, int, int, int], error: SlimoeError | None) -> None:
        self._n_active -= 1
        if not self._n_active:
            self.busy_seconds += time.perf_counter() - self._began
        self.n_read += chunk[3]
        if error is not None:
            read.error = error
            self._drop(read)
        read.n_left -= 1
        if read.is_done:
            self._changed.notify_all()

    def _read(self, shard: int, offset: int, address: int, n_bytes: int) -> SlimoeError | None:
        """Reads a chunk; `n_bytes` may reach past the end of the file by less than a page."""
        path = self._paths[shard]
        target = memoryview((ctypes.c_uint8 * n_bytes).from_address(address)).cast("B")
        try:
            stamp = _stamp(self._files[shard])
            n_wanted = min(n_bytes, self._stamps[shard].n_bytes - offset)
            n_done = 0
            while n_done < n_wanted:
                n_read = os.preadv(self._files[shard], [target[n_done:]], offset + n_done)
                n_done += n_read
                if not n_read:
                    break
        except OSError as error:
            return ReadFailedError(f"{path}: reading failed ({error.strerror}). Check the disk, then start again.")
        if n_done < n_wanted or stamp != self._stamps[shard]:
            return ReadFailedError(f"{path}: the file was changed while it was open. Start again with the new file.")
        return None

    def close(self) -> None:
        """Ends the threads and closes the files; reads that are under way are finished first."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._opened.close()


def _open_direct(path: os.PathLike[str]) -> int | None:
    """The file opened for direct reads, None where the system or the file system has none."""
    flag = getattr(os, "O_DIRECT", None)
    if flag is None:
        return None
    try:
        return os.open(path, os.O_RDONLY | flag)
    except OSError:
        return None


def _stamp(file: int) -> _Stamp:
    status = os.fstat(file)
    return _Stamp(status.st_size, status.st_mtime_ns)


def _chunks(span: Span, address: int) -> Iterator[tuple[int, int, int, int]]:
    """A span, widened to whole pages, as (shard, offset, address, bytes)."""
    begin = span.offset // PAGE * PAGE
    end = -(-(span.offset + span.n_bytes) // PAGE) * PAGE
    for offset in range(begin, end, _CHUNK):
        yield span.shard, offset, address + offset - begin, min(_CHUNK, end - offset)
