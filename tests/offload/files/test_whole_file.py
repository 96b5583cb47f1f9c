"""Files are written whole or not at all, by one run at a time, and what killed runs leave is found."""

import fcntl
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from slimoe.offload.errors import DoesNotFitError, SlimoeError, UsageError
from slimoe.offload.files.regular_file import open_regular, read_regular
from slimoe.offload.files.whole_file import (
    BusyError,
    Destination,
    Leftover,
    abandoned,
    reserved,
    whole_file,
    write_whole,
)
from slimoe.offload.machine.measurement_cache import MeasurementCache

_HOLDER = """
import sys, time
from pathlib import Path
from slimoe.offload.files.whole_file import Destination
destination = Destination(Path(sys.argv[1]))
(destination.folder / "data").write_bytes(bytes(100_000))
print("taken", flush=True)
time.sleep(600)
"""


@contextmanager
def holder(target: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has a destination, until it is killed."""
    command = [sys.executable, "-c", _HOLDER, str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "taken\n"
            yield process
        finally:
            process.kill()


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_one_process_at_a_time_and_none_after_a_kill(tmp_path: Path) -> None:
    target = tmp_path / "o.gguf"
    with holder(target) as process:
        with pytest.raises(BusyError, match=r"o\.gguf is being written by another run\. Wait"):
            Destination(target)
        (tmp_path / "link").symlink_to("o.gguf")
        with pytest.raises(BusyError):
            Destination(tmp_path / "link")
        assert abandoned(tmp_path) == ()
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert names(tmp_path) == ["link", "o.gguf.partial"]
    (left,) = abandoned(tmp_path)
    assert (left.folder, left.n_bytes >= 100_000) == (tmp_path / "o.gguf.partial", True)
    with Destination(target, resumes=True) as destination:
        assert destination.left_bytes >= 100_000
        assert names(destination.folder) == ["data", "lock"]
    assert names(tmp_path) == ["link", "o.gguf.partial"], "what is resumed is kept"
    with Destination(target) as destination:
        assert destination.left_bytes >= 100_000
        assert destination.is_empty
    assert names(tmp_path) == ["link"]
    assert abandoned(tmp_path / "none") == ()


def test_what_is_resumed_goes_when_it_is_done(tmp_path: Path) -> None:
    with Destination(tmp_path / "a.stats", resumes=True) as destination:
        (destination.folder / "layer").write_bytes(b"1")
    assert names(tmp_path) == ["a.stats.partial"]
    with Destination(tmp_path / "a.stats", resumes=True) as destination:
        destination.forget()
    assert names(tmp_path) == []
    with Destination(tmp_path / "a.stats", resumes=True):
        pass
    assert names(tmp_path) == [], "nothing is nothing to resume"


def test_a_folder_of_someone_else_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "o.gguf.partial"
    folder.mkdir()
    (folder / "thesis").write_text("years of work")
    with pytest.raises(UsageError, match="in the way"):
        Destination(tmp_path / "o.gguf")
    assert (folder / "thesis").read_text() == "years of work"
    (tmp_path / "p.gguf.partial").write_text("a download")
    with pytest.raises(UsageError, match="in the way"):
        Destination(tmp_path / "p.gguf")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "q.gguf.partial").symlink_to("elsewhere")
    with pytest.raises(UsageError, match="in the way"):
        Destination(tmp_path / "q.gguf")
    assert abandoned(tmp_path) == ()


def test_a_destination_is_taken_once_in_a_process_and_can_be_handed_on(tmp_path: Path) -> None:
    with Destination(tmp_path / "o") as destination:
        with pytest.raises(BusyError):
            Destination(tmp_path / "o")
        with reserved(destination) as same:
            assert same is destination
        assert (tmp_path / "o.partial").is_dir()
    destination.close()
    with reserved(tmp_path / "o"):
        assert names(tmp_path) == ["o.partial"]
    assert names(tmp_path) == []


def test_a_lock_that_someone_only_looks_at_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock is free at the second look, in a folder that is new by then."""
    with Destination(tmp_path / "o") as first:
        looks = []

        def pause(_seconds: float) -> None:
            looks.append(1)
            first.close()

        monkeypatch.setattr(time, "sleep", pause)
        with Destination(tmp_path / "o") as second:
            assert looks == [1]
            assert names(second.folder) == ["lock"]


def test_without_locks_what_is_there_is_anothers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_file: int, _what: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with Destination(tmp_path / "o") as destination:
        (destination.folder / "data").write_bytes(b"1")
        with pytest.raises(UsageError, match="another run, or left"):
            Destination(tmp_path / "o")
    assert names(tmp_path) == []


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "report"
    write_whole(path, b"one")
    with pytest.raises(ZeroDivisionError), whole_file(path) as part:
        part.write_bytes(bytes(1 // 0))
    assert (names(tmp_path), path.read_bytes()) == (["report"], b"one")
    write_whole(path, b"three")
    assert path.read_bytes() == b"three"
    with Destination(path) as destination, whole_file(path, destination.folder) as part:
        assert part.parent == destination.folder
        part.write_bytes(b"four")
    assert (names(tmp_path), path.read_bytes()) == (["report"], b"four")


def test_two_writers_at_once_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "report"
    with whole_file(path) as one, whole_file(path) as other:
        one.write_bytes(b"1" * 1000)
        other.write_bytes(b"2")
    assert path.read_bytes() == b"1" * 1000
    assert names(tmp_path) == ["report"]


def test_permissions_are_the_umasks(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "a", b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk/model")
    for data in (b"one", b"two"):
        write_whole(tmp_path / "link", data)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "disk" / "model").read_bytes() == data
    assert names(tmp_path / "disk") == ["model"]


def test_what_cannot_be_written_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "file").write_bytes(b"")
    places = {
        tmp_path: "is a directory",
        tmp_path / "pipe": "is a pipe",
        tmp_path / "circle": "circle",
        tmp_path / "file" / "x": "is no directory",
        tmp_path / "none" / "x": "is no directory",
        tmp_path / ("x" * 5000): "File name too long",
        tmp_path / ("x" * 300): "File name too long",
        tmp_path / "/".join(["x"] * 2500): "File name too long",
        Path("/dev/null"): "is a device",
        Path("/proc/model"): "cannot be written",
    }
    with closing(socket.socket(socket.AF_UNIX)) as bound:
        monkeypatch.chdir(tmp_path)  # a socket's path is short
        bound.bind("socket")
        for place, words in places.items() | {(tmp_path / "socket", "is a socket")}:
            with pytest.raises(UsageError, match=words):
                write_whole(place, b"data")
            with pytest.raises(UsageError, match=words):
                Destination(place)
    assert names(tmp_path) == ["circle", "file", "pipe", "socket"]


def test_long_names_have_room_for_what_is_not_whole(tmp_path: Path) -> None:
    for name in ("x" * 255, "é" * 127):
        with Destination(tmp_path / name) as one, Destination(tmp_path / name[:-1]) as other:
            assert one.folder != other.folder
            with whole_file(tmp_path / name) as part:
                part.write_bytes(b"1")
        assert (tmp_path / name).read_bytes() == b"1"
    assert len(names(tmp_path)) == 2


def test_a_full_disk_is_no_place(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"old")
    with pytest.raises(DoesNotFitError, match=r"old cannot be written: the disk is full"), whole_file(tmp_path / "old"):
        raise OSError(28, "No space left on device")
    assert (tmp_path / "old").read_bytes() == b"old"
    assert names(tmp_path) == ["old"]


def test_a_disk_that_does_not_confirm_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", sync)
    with pytest.raises(SlimoeError, match=r"a is whole, but .* \(Input/output error\)"):
        write_whole(tmp_path / "a", b"1")
    assert (tmp_path / "a").read_bytes() == b"1"


def test_only_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    with closing(socket.socket(socket.AF_UNIX)) as bound:
        monkeypatch.chdir(tmp_path)
        bound.bind("socket")
        for place, words in (("pipe", "a pipe"), ("/dev/zero", "a device"), ("socket", "a socket"), (".", "directory")):
            with pytest.raises(OSError, match=words):
                open_regular(tmp_path / place)
    (tmp_path / "file").write_bytes(b"1")
    assert read_regular(tmp_path / "file") == b"1"


_MEASURES = """
import sys
from pathlib import Path
from slimoe.offload.machine.measurement_cache import MeasurementCache
cache = MeasurementCache(Path(sys.argv[1]), "this")
for n in range(20):
    cache.put({f"{sys.argv[2]}{n}": n})
"""


def test_two_processes_remember_all_that_both_measure(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "m.json"
    path.parent.mkdir()
    path.write_bytes(b'{"format": 2, "machines": {"this": 5}')
    commands = [[sys.executable, "-c", _MEASURES, str(path), name] for name in "ab"]
    running = [subprocess.Popen(command) for command in commands]
    assert [process.wait(60) for process in running] == [0, 0]
    cache = MeasurementCache(path, "this")
    assert [cache.get(f"{name}{n}", int) for name in "ab" for n in range(20)] == 2 * list(range(20))
    assert names(path.parent) == ["m.json"]


def test_leftovers_are_counted(tmp_path: Path) -> None:
    folder = tmp_path / "x.partial"
    folder.mkdir()
    (folder / "lock").touch()
    assert abandoned(tmp_path) == (Leftover(folder, 0),)
