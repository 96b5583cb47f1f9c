"""A folder of records: bounded, shared, and nobody else's files are touched."""

import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest

from slimoe.offload.errors import UsageError
from slimoe.offload.memory.contents import Bytes
from slimoe.offload.memory.prompt_folder import PromptFolder
from slimoe.offload.memory.prompt_record import RecordForm, RecordName, TextKeys, file_bytes
from slimoe.offload.memory.prompt_writer import HELD_RECORDS, PromptWriter, Record

FORM = RecordForm("model", "None", "F16", 16, ((1, 64),), ())
BLOCK_BYTES = 16 * 64
N_BLOCKS = 40


def keys(seed: int = 0) -> TextKeys:
    return TextKeys(FORM, np.random.default_rng(seed).integers(0, 500, 16 * N_BLOCKS, np.int32))


def content(name: RecordName) -> Bytes:
    return np.random.default_rng(name.n_tokens).integers(0, 256, FORM.n_bytes(name), np.uint8)


def written(folder: PromptFolder, text: TextKeys, n_blocks: int = N_BLOCKS) -> list[RecordName]:
    names = [text.name(16 * (block + 1)) for block in range(n_blocks)]
    for name in names:
        folder.write(name, text.head(name), content(name), text.used_ns(name))
    return names


def read(folder: PromptFolder, text: TextKeys, name: RecordName) -> Bytes | None:
    return folder.read(name, text.head(name), FORM.n_bytes(name))


def size_of(path: Path) -> int:
    return sum(one.stat().st_size for one in path.iterdir())


RECORD = file_bytes(keys().head(keys().name(16)), BLOCK_BYTES)


def test_a_record_is_read_back_also_by_others(tmp_path: Path) -> None:
    told: list[str] = []
    path = tmp_path / "kept"
    names = written(PromptFolder(path, 1 << 20, told.append), keys(), 3)
    other = PromptFolder(path, 1 << 20, told.append)
    for name in names:
        assert other.has(name)
        np.testing.assert_array_equal(read(other, keys(), name), content(name))
    assert set(other.names(keys())) == set(names)
    assert other.names(keys(1)) == []
    assert read(other, keys(), keys().name(5)) is None
    assert not other.has(keys().name(5))
    assert told == []
    assert path.stat().st_mode & 0o777 == 0o700
    assert {one.stat().st_mode & 0o777 for one in path.iterdir()} == {0o600}


def test_a_folder_is_needed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="--prompt-cache"):
        PromptFolder(tmp_path / "file", 1 << 20, print)


@pytest.mark.parametrize("part", ["magic", "root", "name", "tokens", "content", "checksum"])
def test_a_record_that_is_damaged_is_told_once_and_replaced(tmp_path: Path, part: str) -> None:
    told: list[str] = []
    folder = PromptFolder(tmp_path, 1 << 20, told.append)
    (name,) = written(folder, keys(), 1)
    path = tmp_path / str(name)
    whole = path.read_bytes()
    n_head = len(keys().head(name))
    place = {
        "magic": 2,
        "root": 20,
        "name": 50,
        "tokens": n_head - 9,
        "content": n_head + 99,
        "checksum": len(whole) - 1,
    }
    for damaged in (
        whole[: place[part]] + bytes([whole[place[part]] ^ 4]) + whole[place[part] + 1 :],
        whole[: place[part]],
        whole + b"\0",
        b"",
    ):
        path.write_bytes(damaged)
        fresh = PromptFolder(tmp_path, 1 << 20, told.append)
        assert fresh.has(name)
        for _ in range(3):
            assert read(fresh, keys(), name) is None
            assert not fresh.has(name)
        assert len(told) == 1
        assert str(name) in told.pop()
        assert path.read_bytes() == damaged
        written(fresh, keys(), 1)
        np.testing.assert_array_equal(read(fresh, keys(), name), content(name))
    path.unlink()
    os.mkfifo(path)
    fresh = PromptFolder(tmp_path, 1 << 20, told.append)
    assert not fresh.has(name)
    assert read(fresh, keys(), name) is None
    assert len(told) == 1


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    folder = PromptFolder(tmp_path, 30 * RECORD, print)
    first, second = written(folder, keys(), 10), written(folder, keys(1), 10)
    used = keys()
    assert all(folder.has(name, used.used_ns(name)) for name in first)
    third = written(folder, keys(2), 12)
    assert [folder.has(name) for name in first] == [True] * 10
    assert [folder.has(name) for name in third] == [True] * 12
    # Of a text its end goes first.
    n_left = sum(folder.has(name) for name in second)
    assert 0 < n_left < 10
    assert [folder.has(name) for name in second] == [n < n_left for n in range(10)]


def test_the_bound_is_kept_and_other_files_are_untouched(tmp_path: Path) -> None:
    strange = {f"{keys().name(16)}.bak": "a", "slimoe-notes.txt": "b" * 9999, "x.kv": "c", f"{keys().name(16)}x": "d"}
    for name, text in strange.items():
        (tmp_path / name).write_text(text)
    (tmp_path / str(keys(9).name(16))).mkdir()
    (tmp_path / str(keys(9).name(32))).symlink_to("slimoe-notes.txt")
    most = 12 * RECORD + RECORD // 2
    folder, n_strange = PromptFolder(tmp_path, most, print), len(list(tmp_path.iterdir()))
    for seed in range(4):
        for block in range(N_BLOCKS):
            record = keys(seed).name(16 * (block + 1))
            folder.write(record, keys(seed).head(record), content(record), time.time_ns())
            assert folder.has(record)
            ours = [one for one in tmp_path.iterdir() if one.is_file() and RecordName.parse(one.name)]
            assert sum(one.lstat().st_size for one in ours if not one.is_symlink()) <= most
    assert {name: (tmp_path / name).read_text() for name in strange} == strange
    assert len([one for one in tmp_path.iterdir() if one.is_dir() or one.is_symlink()]) == 2
    assert len(list(tmp_path.iterdir())) > n_strange + 5


def test_a_smaller_bound_holds_as_soon_as_the_folder_is_opened(tmp_path: Path) -> None:
    before = written(PromptFolder(tmp_path, 30 * RECORD, print), keys(), 20)
    folder = PromptFolder(tmp_path, 10 * RECORD, print)
    assert 0 < size_of(tmp_path) <= 10 * RECORD
    n_left = sum(folder.has(name) for name in before)
    assert [folder.has(name) for name in before] == [n < n_left for n in range(20)]


def test_a_record_larger_than_the_bound_is_not_written(tmp_path: Path) -> None:
    folder = PromptFolder(tmp_path, RECORD - 1, print)
    written(folder, keys(), 3)
    assert list(tmp_path.iterdir()) == []


def test_what_ended_processes_have_left_goes(tmp_path: Path) -> None:
    part = tmp_path / f"{keys().name(16)}.0123abcd.part"
    young = tmp_path / f"{keys().name(32)}.0123abcd.part"
    other = tmp_path / "something.0123abcd.part"
    for path in (part, young, other):
        path.write_text("x")
    for path in (part, other):
        os.utime(path, (time.time() - 3600,) * 2)
    written(PromptFolder(tmp_path, 1 << 20, print), keys(1), 1)
    assert not part.exists()
    assert young.exists()
    assert other.exists()


WRITES = """
import sys
from pathlib import Path
from slimoe.offload.memory.prompt_folder import PromptFolder
from tests.offload.memory.test_prompt_folder import RECORD, keys, written
folder = PromptFolder(Path(sys.argv[1]), 60 * RECORD, print)
print("ready", flush=True)
sys.stdin.readline()
for seed in (int(sys.argv[2]), 7, int(sys.argv[2]) + 1):
    written(folder, keys(seed))
"""


def test_processes_share_a_folder(tmp_path: Path) -> None:
    """All write at once, the same and others, prune, and what is there is whole."""
    command = [sys.executable, "-c", WRITES, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    children = [subprocess.Popen([*command, str(seed)], **pipes) for seed in (10, 20, 30)]  # type: ignore[call-overload]
    for child in children:
        assert child.stdout.readline() == "ready\n"
    for child in children:
        child.stdin.write("\n")
        child.stdin.flush()
    for child in children:
        assert child.communicate()[0] == ""
        assert child.returncode == 0
    told: list[str] = []
    folder = PromptFolder(tmp_path, 60 * RECORD, told.append)
    texts = [keys(seed) for seed in (10, 11, 20, 21, 30, 31, 7)]
    found = [(text, name) for text in texts for name in folder.names(text)]
    assert len(found) == len(list(tmp_path.iterdir())) > 20
    for text, name in found:
        np.testing.assert_array_equal(read(folder, text, name), content(name))
    assert told == []
    assert size_of(tmp_path) <= 60 * RECORD


# --- the thread that writes ----------------------------------------------------------------------------------


@contextmanager
def files_of_at_most(n_bytes: int) -> Iterator[None]:
    """The system refuses longer files, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def put(writer: PromptWriter, text: TextKeys, n_blocks: int) -> None:
    for block in range(n_blocks):
        assert writer.has_room(30)
        name = text.name(16 * (block + 1))
        writer.put(Record(name, text.head(name), content(name), 0))
    writer.finish(30)


def test_a_writer_writes_all_that_it_takes(tmp_path: Path) -> None:
    with closing(PromptWriter(PromptFolder(tmp_path, 1 << 20, print), print)) as writer:
        put(writer, keys(), 5)
        assert len(list(tmp_path.iterdir())) == 5
        assert writer.n_bytes == 5 * (RECORD - 32)
        assert not writer.is_paused


def test_a_full_disk_is_told_once_and_nothing_half_stays(tmp_path: Path) -> None:
    told: list[str] = []
    with closing(PromptWriter(PromptFolder(tmp_path, 1 << 20, told.append), told.append)) as writer:
        put(writer, keys(), 1)
        with files_of_at_most(RECORD // 2):
            put(writer, keys(1), 3)
        assert writer.is_paused
        (line,) = told
        assert str(tmp_path) in line
        assert "cannot be written" in line
        assert [one.name for one in tmp_path.iterdir()] == [str(keys().name(16))]


def test_a_folder_that_is_gone_is_told_once(tmp_path: Path) -> None:
    told: list[str] = []
    folder = PromptFolder(tmp_path / "kept", 1 << 20, told.append)
    (tmp_path / "kept").rmdir()
    with closing(PromptWriter(folder, told.append)) as writer:
        put(writer, keys(), 4)
        assert writer.is_paused
    assert len(told) == 1
    assert folder.names(keys()) == []


def test_a_writer_that_is_ended_leaves_whole_records_only(tmp_path: Path) -> None:
    class Slow(PromptFolder):
        """Its disk takes a record when it is told to."""

        def write(self, name: RecordName, head: bytes, content: Bytes, used_ns: int) -> None:
            begun.set()
            assert goes_on.wait(30)
            super().write(name, head, content, used_ns)

    begun, goes_on = threading.Event(), threading.Event()
    writer = PromptWriter(Slow(tmp_path, 1 << 20, print), print)
    for block in range(HELD_RECORDS):
        name = keys().name(16 * (block + 1))
        writer.put(Record(name, keys().head(name), content(name), 0))
    assert begun.wait(30)
    assert not writer.has_room(0.01)
    writer.finish(0.01)
    ending = threading.Thread(target=writer.close)
    ending.start()
    goes_on.set()
    ending.join(30)
    assert [one.name for one in tmp_path.iterdir()] == [str(keys().name(16))]
