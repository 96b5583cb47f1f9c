"""Reads in the background: their order, their end, and what happens when the file or the disk fails."""

import errno
import fcntl
import mmap
import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import psutil
import pytest

from slimoe.offload.cache.disk_reader import PAGE, DiskReader, Read, ReadFailedError, Urgency, padded
from slimoe.offload.errors import ModelFileError
from slimoe.offload.gguf.header import GGUFFile, read_gguf
from slimoe.offload.model.tensors import Span
from tests.models.tiny_gguf import write_tiny_gguf

PATIENCE = 30.0
"""Seconds after which something that should long have happened never will."""


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("reader") / "m.gguf", None)


@pytest.fixture
def path(stored: Path, tmp_path: Path) -> Path:
    """A file that a test may damage; its length is no multiple of a page."""
    path = tmp_path / "m.gguf"
    shutil.copyfile(stored, path)
    with path.open("ab") as file:
        file.write(bytes(np.random.default_rng(0).integers(0, 256, 1234, np.uint8)))
    return path


@pytest.fixture(autouse=True)
def memory() -> Iterator[None]:
    """Whatever a test did, no read outlives the memory it writes to."""
    yield
    Target.held.clear()


def reader_of(path: Path, n_threads: int = 2, *, direct: bool = True) -> DiskReader:
    """A reader whose chunks are single pages."""
    return DiskReader(read_gguf(path), n_threads, direct, chunk_bytes=PAGE)


class Target:
    """Memory for one span, there until the test is over."""

    held: ClassVar[list["Target"]] = []

    def __init__(self, span: Span) -> None:
        self.span = span
        memory = mmap.mmap(-1, padded(span.n_bytes))
        self.bytes = np.frombuffer(memory, np.uint8)
        self.address = int(self.bytes.ctypes.data)
        self.held.append(self)
        self.fill()

    def fill(self, value: int = 0xAA) -> None:
        self.bytes[:] = value

    @property
    def part(self) -> tuple[Span, int]:
        return self.span, self.address

    @property
    def data(self) -> bytes:
        begin = self.span.offset % PAGE
        return self.bytes[begin : begin + self.span.n_bytes].tobytes()

    def is_untouched(self) -> bool:
        return bool((self.bytes == 0xAA).all())


def pages(first: int, n: int) -> Target:
    """The target of `n` whole pages of the file: as many chunks."""
    return Target(Span(0, first * PAGE, n * PAGE))


def content(path: Path, span: Span) -> bytes:
    return path.read_bytes()[span.offset : span.offset + span.n_bytes]


class Gate:
    """Stands before the disk: notes which page each read begins with and lets as many through as it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._read, self._permits = os.preadv, threading.Semaphore(0)
        self._changed = threading.Condition()
        self.begun: list[int] = []
        monkeypatch.setattr(os, "preadv", self.preadv)

    def preadv(self, file: int, buffers: Sequence[memoryview], offset: int) -> int:
        with self._changed:
            self.begun.append(offset // PAGE)
            self._changed.notify_all()
        assert self._permits.acquire(timeout=PATIENCE)
        return self._read(file, buffers, offset)

    def wait_for(self, n_begun: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.begun) >= n_begun, PATIENCE)

    def open(self, n_reads: int = 10_000) -> None:
        self._permits.release(n_reads)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.open()


def in_background(action: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    return thread


def soon_over(thread: threading.Thread) -> bool:
    thread.join(PATIENCE)
    return not thread.is_alive()


def read_all(reader: DiskReader, *targets: Target) -> None:
    reader.wait(reader.submit([target.part for target in targets], demanded=True))


# --- bytes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direct", [True, False])
def test_any_span_is_read_as_it_is_stored(path: Path, direct: bool) -> None:
    size, draw = path.stat().st_size, random.Random(1)
    spans = [Span(0, 0, 1), Span(0, PAGE - 1, 2), Span(0, size - 1, 1), Span(0, size - 3 * PAGE - 7, 3 * PAGE + 7)]
    spans += [Span(0, 0, size), Span(0, PAGE, PAGE)]
    for _ in range(30):
        begin = draw.randrange(size)
        spans.append(Span(0, begin, draw.randint(1, min(5 * PAGE, size - begin))))
    targets = [Target(span) for span in spans]
    with closing(reader_of(path, direct=direct)) as reader:
        reads = [reader.submit([target.part], demanded=bool(n % 2)) for n, target in enumerate(targets)]
        for read in reads:
            reader.wait(read)
        read_all(reader, *targets[:5])
        assert reader.n_read >= sum(span.n_bytes for span in spans)
        assert reader.n_wasted == 0
        assert reader.busy_seconds > 0
    for target in targets:
        assert target.data == content(path, target.span)


@pytest.mark.parametrize("direct", [True, False])
def test_reads_that_come_in_pieces_are_put_together(path: Path, direct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A direct read cannot go on in the middle of a page; it goes on through the cache."""
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, buffers, at: real(file, [buffers[0][:1000]], at))
    target = Target(Span(0, 5000, 3 * PAGE))
    with closing(reader_of(path, direct=direct)) as reader:
        read_all(reader, target)
    assert target.data == content(path, target.span)


def test_a_file_system_that_takes_no_direct_reads_after_all(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, refused = os.preadv, []

    def preadv(file: int, buffers: Sequence[memoryview], offset: int) -> int:
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(offset)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    target = Target(Span(0, 77, 9 * PAGE))
    with closing(reader_of(path, direct=True)) as reader:
        read_all(reader, target)
        read_all(reader, target)
    assert target.data == content(path, target.span)
    assert len(refused) <= 2, "once per thread at most"


def test_shards_are_files_of_their_own(path: Path, stored: Path) -> None:
    gguf = replace(read_gguf(path), paths=(path, stored))
    targets = [Target(Span(shard, 4321, 6000)) for shard in (0, 1, 0)]
    with closing(DiskReader(gguf, chunk_bytes=PAGE)) as reader:
        read_all(reader, *targets)
    assert [target.data for target in targets] == [content(p, targets[0].span) for p in (path, stored, path)]


# --- order -------------------------------------------------------------------------------------------------


def test_demanded_reads_go_before_likely_ones(path: Path, gate: Gate) -> None:
    with closing(reader_of(path, n_threads=1)) as reader:
        likely = [pages(0, 3), pages(3, 2), pages(5, 2)]
        first, second, third = (reader.submit([target.part], demanded=False) for target in likely)
        gate.wait_for(1)
        demanded = [pages(10, 2), pages(12, 1)]
        fourth, fifth = (reader.submit([target.part], demanded=True) for target in demanded)
        reader.demand(third)
        gate.open()
        for read in (first, second, third, fourth, fifth):
            reader.wait(read)
    assert gate.begun == [0, 10, 11, 12, 5, 6, 1, 2, 3, 4]
    for target in (*likely, *demanded):
        assert target.data == content(path, target.span)


def test_what_is_sure_goes_before_what_is_not(path: Path, gate: Gate) -> None:
    with closing(reader_of(path, n_threads=1)) as reader:
        first = reader.submit([pages(0, 1).part], demanded=True)
        gate.wait_for(1)
        unsure = [reader.submit([pages(n, 1).part], demanded=False, is_sure=False) for n in (10, 11)]
        sure = reader.submit([pages(20, 1).part], demanded=False)
        demanded = reader.submit([pages(30, 1).part], demanded=True)
        reader.demand(unsure[1])
        gate.open()
        for read in (first, demanded, sure, *unsure):
            reader.wait(read)
    assert gate.begun == [0, 30, 11, 20, 10]


def test_a_demanded_read_waits_only_for_the_chunks_under_way(path: Path, gate: Gate) -> None:
    with closing(reader_of(path, n_threads=2)) as reader:
        likely = reader.submit([pages(0, 8).part], demanded=False)
        gate.wait_for(2)
        demanded = reader.submit([pages(10, 2).part], demanded=True)
        gate.open(4)
        reader.wait(demanded)
        assert not likely.is_done
        assert set(gate.begun[2:4]) == {10, 11}
        gate.open()
        reader.wait(likely)


def test_waiting_for_a_likely_read_demands_it(path: Path, gate: Gate) -> None:
    with closing(reader_of(path, n_threads=1)) as reader:
        reader.submit([pages(0, 2).part], demanded=False)
        wanted = reader.submit([pages(4, 2).part], demanded=False)
        gate.wait_for(1)
        waiting = in_background(lambda: reader.wait(wanted))
        while wanted.urgency is not Urgency.DEMANDED:
            waiting.join(0.001)
        gate.open(3)
        assert soon_over(waiting)
        assert gate.begun[:3] == [0, 4, 5]
        gate.open()


# --- cancelling and closing --------------------------------------------------------------------------------


def test_nothing_is_written_once_cancelling_is_over(path: Path, gate: Gate) -> None:
    with closing(reader_of(path, n_threads=2)) as reader:
        target = pages(0, 6)
        read = reader.submit([target.part], demanded=False)
        gate.wait_for(2)

        def cancel() -> None:
            reader.cancel(read)
            target.fill()

        cancelling = in_background(cancel)
        while not read.is_cancelled:
            cancelling.join(0.001)
        assert cancelling.is_alive(), "chunks are under way"
        gate.open()
        assert soon_over(cancelling)
        read_all(reader, pages(20, 4))
        assert sorted(gate.begun) == [0, 1, 20, 21, 22, 23]
        assert target.is_untouched()
        assert reader.n_wasted == 2 * PAGE
        assert read.is_done
        assert not read.is_complete


def test_a_read_that_has_not_begun_is_cancelled_at_once(path: Path, gate: Gate) -> None:
    with closing(reader_of(path, n_threads=1)) as reader:
        first = reader.submit([pages(0, 1).part], demanded=True)
        gate.wait_for(1)
        waiting = [reader.submit([pages(3, 2).part], demanded=demanded) for demanded in (True, False)]
        for read in waiting:
            reader.cancel(read)
            reader.cancel(read)
        gate.open()
        reader.wait(first)
        assert gate.begun == [0]
        assert reader.n_wasted == 0


def test_dropping_waits_for_nothing(path: Path, gate: Gate) -> None:
    with closing(reader_of(path, n_threads=1)) as reader:
        target = pages(0, 6)
        read = reader.submit([target.part], demanded=False)
        gate.wait_for(1)
        reader.drop(read)
        assert not read.is_done, "a chunk is under way"
        cancelling = in_background(lambda: reader.cancel(read))
        gate.open()
        assert soon_over(cancelling)
        assert read.is_done
        assert not read.is_complete
        assert gate.begun == [0]
        assert reader.n_wasted == PAGE


def test_closing_ends_reads_and_whoever_waits_for_them(path: Path, gate: Gate) -> None:
    n_files = psutil.Process().num_fds()
    reader = reader_of(path, n_threads=1)
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("disk-")]
    assert threads
    taken, likely, demanded = (reader.submit([pages(n, 1).part], demanded=n != 1) for n in range(3))
    gate.wait_for(1)
    told: list[Exception] = []

    def wait() -> None:
        try:
            reader.wait(demanded)
        except ReadFailedError as error:
            told.append(error)

    waiting, closed = in_background(wait), in_background(reader.close)
    assert soon_over(waiting)
    assert "was closed" in str(told[0])
    assert closed.is_alive(), "a chunk is under way"
    gate.open()
    assert soon_over(closed)
    assert gate.begun == [0]
    assert taken.is_complete
    for read in (taken, likely, demanded):
        reader.cancel(read)
    with pytest.raises(ReadFailedError):
        reader.wait(likely)
    reader.close()
    assert psutil.Process().num_fds() == n_files
    assert not any(thread.is_alive() for thread in threads)


# --- faults ------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    os.truncate(path, 3 * PAGE)


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"GGUF but not the same")
    os.utime(path, ns=(0, 12345))


def lengthen(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


@pytest.mark.parametrize("damage", [truncate, overwrite, lengthen])
@pytest.mark.parametrize("direct", [True, False])
def test_a_file_that_changes_gives_no_bytes_until_it_is_put_back(
    path: Path, damage: Callable[[Path], None], direct: bool
) -> None:
    before, status = path.read_bytes(), path.stat()
    target = Target(Span(0, 8 * PAGE + 3, 6 * PAGE))
    with closing(reader_of(path, direct=direct)) as reader:
        damage(path)
        for _ in range(2):
            with pytest.raises(ReadFailedError, match=r"m\.gguf: the file was changed while it was open\. Start again"):
                read_all(reader, target)
        path.write_bytes(before)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        read_all(reader, target)
        assert target.data == before[8 * PAGE + 3 : 14 * PAGE + 3]


def test_a_change_while_bytes_are_read_is_noticed(path: Path, gate: Gate) -> None:
    with closing(reader_of(path, n_threads=1)) as reader:
        read = reader.submit([pages(0, 1).part], demanded=True)
        gate.wait_for(1)
        overwrite(path)
        gate.open()
        with pytest.raises(ReadFailedError, match="was changed"):
            reader.wait(read)


def test_a_file_replaced_by_renaming_stays_readable(path: Path, stored: Path) -> None:
    target = Target(Span(0, path.stat().st_size - 2000, 2000))
    expected = content(path, target.span)
    with closing(reader_of(path)) as reader:
        shutil.copyfile(stored, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)
        read_all(reader, target)
    assert target.data == expected


def test_an_error_of_the_disk_ends_its_read_and_no_other(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, tried = os.preadv, []

    def preadv(file: int, buffers: Sequence[memoryview], offset: int) -> int:
        tried.append(offset // PAGE)
        if offset == 4 * PAGE:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    target = pages(10, 4)
    with closing(reader_of(path, n_threads=1)) as reader:
        broken = reader.submit([pages(3, 5).part], demanded=True)
        read_all(reader, target)
        with pytest.raises(ReadFailedError, match=r"m\.gguf: reading failed \(Input/output error\)\. Check the disk"):
            reader.wait(broken)
    assert tried == [3, 4, 10, 11, 12, 13]
    assert target.data == content(path, target.span)


def test_whatever_goes_wrong_nobody_waits_for_ever(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def preadv(*_: object) -> int:
        raise MemoryError("no more")

    with closing(reader_of(path)) as reader:
        with monkeypatch.context() as patched:
            patched.setattr(os, "preadv", preadv)
            with pytest.raises(MemoryError, match="no more"):
                read_all(reader, pages(0, 5))
        read_all(reader, pages(0, 5))


def test_a_file_that_is_not_there_leaves_nothing_open(path: Path) -> None:
    gguf: GGUFFile = replace(read_gguf(path), paths=(path, path.with_name("gone.gguf")))
    n_files, n_threads = psutil.Process().num_fds(), threading.active_count()
    with pytest.raises(ModelFileError, match=r"gone\.gguf: the file cannot be opened \(No such file"):
        DiskReader(gguf)
    assert (psutil.Process().num_fds(), threading.active_count()) == (n_files, n_threads)


# --- at random ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direct", [True, False])
def test_reads_come_and_go_at_random(path: Path, direct: bool) -> None:
    """Each read ends as it was told to, and its memory is its own from then on."""
    whole, draw = path.read_bytes(), random.Random(7)

    def live(reader: DiskReader) -> None:
        under_way: list[tuple[Read, Target]] = []
        over: list[Target] = []
        for _ in range(1500):
            if len(under_way) < 12 and draw.random() < 0.5:
                begin = draw.randrange(len(whole))
                target = Target(Span(0, begin, draw.randint(1, min(9 * PAGE, len(whole) - begin))))
                submitted.append(reader.submit([target.part], demanded=draw.random() < 0.4))
                under_way.append((submitted[-1], target))
            elif under_way:
                read, target = under_way[draw.randrange(len(under_way))]
                choice = draw.random()
                if choice < 0.3:
                    reader.demand(read)
                    continue
                under_way.remove((read, target))
                if choice < 0.6:
                    reader.cancel(read)
                    target.fill()
                    over.append(target)
                else:
                    reader.wait(read)
                    assert target.data == whole[target.span.offset : target.span.offset + target.span.n_bytes]
        for read, _ in under_way:
            reader.cancel(read)
        assert all(target.is_untouched() for target in over)
        done.append(True)

    done: list[bool] = []
    submitted: list[Read] = []
    with closing(reader_of(path, n_threads=3, direct=direct)) as reader:
        assert soon_over(in_background(lambda: live(reader)))
        assert done
        assert all(read.is_done and not read.chunks for read in submitted), "nothing waits, and nothing is under way"
