"""Reads experts from the file in the background: demanded ones first, those that are only likely when nothing waits.

Reads are positioned and go around the page cache where the system allows it (O_DIRECT): inside a memory limit the
cache would compete with the host expert cache for the same bytes, and copying out of it takes a core that computes.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

from slimoe.offload.errors import ModelFileError, SlimoeError
from slimoe.offload.gguf.header import GGUFFile
from slimoe.offload.model.tensors import Span
from slimoe.offload.resources.thread_room import require_threads

PAGE = 4096
"""What direct reads are aligned to: file offsets, lengths and memory."""
_CHUNK_BYTES = 2 << 20


Chunk = tuple[int, int, int, int]
"""Shard, offset in it, address to read to, and bytes; all but the shard are multiples of a page."""


def padded(n_bytes: int) -> int:
    """Memory that a span of `n_bytes` needs, wherever in a page of the file it begins."""
    return -(-n_bytes // PAGE) * PAGE + PAGE


class ReadFailedError(SlimoeError):
    """The file could not be read while the model was running."""

    exit_code = 3


class FileChangedError(ReadFailedError):
    """The file is not what it was when it was opened: what was read of it does not belong to what would be read."""


class Urgency(IntEnum):
    """The order of reads: those that are waited for, those that surely will be, and those that perhaps will be."""

    DEMANDED = 0
    SURE = 1
    LIKELY = 2


@dataclass(slots=True, eq=False)
class Read:
    """One expert's read under way: `chunks` that no thread has taken yet, and `n_left` that are not yet done."""

    chunks: deque[Chunk]
    n_bytes: int
    n_left: int
    urgency: Urgency
    is_cancelled: bool = False
    error: Exception | None = None
    n_taken: int = field(default=0)

    @property
    def is_done(self) -> bool:
        """Whether no thread will write to its addresses any more."""
        return self.n_left == 0

    @property
    def fraction_left(self) -> float:
        """The part of its bytes that no thread has begun to read, 0 to 1."""
        return 1 - self.n_taken / self.n_bytes

    @property
    def is_complete(self) -> bool:
        """Whether all of its bytes were read."""
        return self.n_left == 0 and self.error is None and not self.is_cancelled


@dataclass(frozen=True, slots=True)
class FileStamp:
    """Size and time of the last change of an open file, by which a file that was written to is noticed."""

    n_bytes: int
    modified_ns: int

    @classmethod
    def of(cls, file: int) -> "FileStamp":
        """The stamp that an open file has now; `file` is its descriptor."""
        status = os.fstat(file)
        return cls(status.st_size, status.st_mtime_ns)


def changed_file(path: Path) -> FileChangedError:
    """The error for a file that is not what it was when it was opened."""
    return FileChangedError(f"{path}: the file was changed while it was open. Start again with the new file.")


def unreadable_file(path: Path, error: OSError) -> ReadFailedError:
    """The error for a read that the system refused."""
    return ReadFailedError(f"{path}: reading failed ({error.strerror}). Check the disk, then start again.")


class DiskReader:
    """Threads that read spans of a GGUF file to addresses in memory.

    Reads are cut into chunks of at most `chunk_bytes`: a demanded read waits for at most one chunk per thread that
    began before it. `n_read` counts bytes read, `n_wasted` those of reads that were cancelled, even if they were
    complete by then, `busy_seconds` the time with reads under way.
    """

    def __init__(
        self, gguf: GGUFFile, n_threads: int = 2, direct: bool = True, chunk_bytes: int = _CHUNK_BYTES
    ) -> None:
        assert chunk_bytes % PAGE == 0
        self._paths, self._chunk_bytes = gguf.paths, chunk_bytes
        with contextlib.ExitStack() as opened:
            self._files: list[int] = []
            for path in gguf.paths:
                self._files.append(_open(path, direct))
                opened.callback(os.close, self._files[-1])
            self._stamps = [FileStamp.of(file) for file in self._files]
            require_threads(n_threads)
            self._opened = opened.pop_all()
        self._queues: tuple[deque[Read], ...] = tuple(deque() for _ in Urgency)
        lock = threading.Lock()
        self._has_work, self._is_over = threading.Condition(lock), threading.Condition(lock)
        """Those who read wait for the one, those who want what is read for the other; both share a lock."""
        self._is_closed = False
        self._n_active, self._began = 0, 0.0
        self.n_read = self.n_wasted = 0
        self.busy_seconds = 0.0
        self._threads = [threading.Thread(target=self._work, name=f"disk-{n}", daemon=True) for n in range(n_threads)]
        for thread in self._threads:
            thread.start()

    def check_files(self) -> None:
        """Raises FileChangedError when a file was written to since it was opened; may be called from any thread."""
        for path, file, stamp in zip(self._paths, self._files, self._stamps, strict=True):
            if FileStamp.of(file) != stamp:
                raise changed_file(path)

    # --- for the engine's thread ---------------------------------------------------------------------------

    def submit(self, parts: Sequence[tuple[Span, int]], *, demanded: bool, is_sure: bool = True) -> Read:
        """Begins to read spans, each to a page-aligned address; the data begins at `offset % PAGE` behind it.

        A read that is not `demanded` waits for all that are; one that `is_sure` to be demanded goes before the others.
        """
        urgency = Urgency.DEMANDED if demanded else Urgency.SURE if is_sure else Urgency.LIKELY
        chunks: deque[Chunk] = deque()
        for span, address in parts:  # widened to whole pages
            begin = span.offset // PAGE * PAGE
            end = -(-(span.offset + span.n_bytes) // PAGE) * PAGE
            for offset in range(begin, end, self._chunk_bytes):
                chunks.append((span.shard, offset, address + offset - begin, min(self._chunk_bytes, end - offset)))
        read = Read(chunks, sum(chunk[3] for chunk in chunks), len(chunks), urgency)
        with self._has_work:
            assert not self._is_closed
            self._queues[urgency].append(read)
            self._has_work.notify(len(chunks))
        return read

    def demand(self, read: Read) -> None:
        """Lets a read go before all reads that are not demanded."""
        if read.urgency is Urgency.DEMANDED:
            return
        with self._has_work:
            waiting = self._queues[read.urgency]
            read.urgency = Urgency.DEMANDED
            if read in waiting:
                waiting.remove(read)
                self._queues[Urgency.DEMANDED].append(read)

    def drop(self, read: Read) -> None:
        """Drops what is not yet under way, without waiting for what is: the memory stays taken until `cancel`."""
        with self._is_over:
            self._drop(read)

    def cancel(self, read: Read) -> None:
        """Drops what is not yet under way and returns when nothing writes to the addresses any more."""
        with self._is_over:
            self._drop(read)
            self._is_over.wait_for(lambda: read.is_done)
            self.n_wasted += read.n_taken

    def wait(self, read: Read) -> None:
        """Returns when the read is complete; raises ReadFailedError when it failed or the reader was closed."""
        if not read.is_done:
            self.demand(read)
            with self._is_over:
                self._is_over.wait_for(lambda: read.is_done)
        if read.error is not None:
            raise read.error

    @property
    def is_idle(self) -> bool:
        """Whether no demanded read waits to be taken."""
        return not self._queues[Urgency.DEMANDED]

    @property
    def n_waiting(self) -> int:
        """Reads of which a part is still to be begun."""
        return sum(map(len, self._queues))

    def _drop(self, read: Read) -> None:
        read.is_cancelled = True
        if read in self._queues[read.urgency]:
            self._queues[read.urgency].remove(read)
        read.n_left -= len(read.chunks)
        read.chunks.clear()

    # --- the threads ---------------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._has_work:
                self._has_work.wait_for(lambda: self._is_closed or any(self._queues))
                if self._is_closed:
                    return
                queue = next(queue for queue in self._queues if queue)
                read = queue[0]
                chunk = read.chunks.popleft()
                if not read.chunks:
                    queue.popleft()
                read.n_taken += chunk[3]
                if not self._n_active:
                    self._began = time.perf_counter()
                self._n_active += 1
            error = self._try_to_read(*chunk)
            with self._is_over:
                self._n_active -= 1
                if not self._n_active:
                    self.busy_seconds += time.perf_counter() - self._began
                if error is None:
                    self.n_read += chunk[3]
                else:
                    read.error = error
                    self._drop(read)
                read.n_left -= 1
                if read.is_done:
                    self._is_over.notify_all()

    def _try_to_read(self, shard: int, offset: int, address: int, n_bytes: int) -> Exception | None:
        """Reads a chunk; `n_bytes` may reach past the end of the file by less than a page."""
        try:
            n_wanted = min(n_bytes, self._stamps[shard].n_bytes - offset)
            n_done = self._read(shard, offset, address, n_bytes, n_wanted)
            # Asked afterwards, this covers all that was written before the bytes were read, and while they were.
            is_same = n_done >= n_wanted and FileStamp.of(self._files[shard]) == self._stamps[shard]
        except OSError as error:
            return unreadable_file(self._paths[shard], error)
        except Exception as error:  # whoever waits for the read would wait for ever
            return error
        return None if is_same else changed_file(self._paths[shard])

    def _read(self, shard: int, offset: int, address: int, n_bytes: int, n_wanted: int) -> int:
        """Reads until `n_wanted` bytes are there or the file ends; returns how many there are."""
        file = self._files[shard]
        target = memoryview((ctypes.c_uint8 * n_bytes).from_address(address)).cast("B")
        n_done, is_buffered = 0, False
        while n_done < n_wanted:
            try:
                n_read = os.preadv(file, [target[n_done:]], offset + n_done)
            except OSError as error:
                if error.errno != errno.EINVAL or is_buffered:
                    raise
                # The file system opens a file for direct reads, but takes none of this alignment.
                flags = fcntl.fcntl(file, fcntl.F_GETFL) & ~getattr(os, "O_DIRECT", 0)
                fcntl.fcntl(file, fcntl.F_SETFL, flags)
                is_buffered = True
                continue
            if not n_read:
                break
            n_done += n_read
        return n_done

    def close(self) -> None:
        """Ends the threads and closes the files; chunks that are under way are finished, whole reads are not."""
        with self._has_work:
            self._is_closed = True
            for read in [read for queue in self._queues for read in queue]:
                read.error = ReadFailedError("The model was closed while it was being read.")
                self._drop(read)
            self._has_work.notify_all()
            self._is_over.notify_all()
        for thread in self._threads:
            thread.join()
        self._opened.close()


def _open(path: Path, direct: bool) -> int:
    """The file, opened for direct reads if they are wanted and the system and the file system have them."""
    flag = getattr(os, "O_DIRECT", None)
    if direct and flag is not None:
        with contextlib.suppress(OSError):
            return os.open(path, os.O_RDONLY | flag)
    try:
        return os.open(path, os.O_RDONLY)
    except OSError as error:
        raise ModelFileError(path, f"the file cannot be opened ({error.strerror}).") from None
