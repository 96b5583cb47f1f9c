"""Paths that are no files, and files that another run writes: a line that says so, from every command."""

import os
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from slimoe.offload.files.whole_file import Destination
from slimoe.server.cli import run
from slimoe.server.options.engine_options import DEMO

_FORGED = "x\n\x1b[31mforged"
PLACES = {
    "pipe": "is a pipe, not a file",
    "socket": "is a socket, not a file",
    "/dev/zero": "is a device, not a file",
    "circle": "circle|Too many levels",
    "dangling": "there is no such",
    "none/x": "no such|is no directory",
    "file/x": "Not a directory|is no directory",
    "n" * 300: "File name too long",
    "/".join(["n"] * 2500): "File name too long",
    "empty": "too short|neither|no statistics|not a whole|no directory or file",
    "folder": "irectory|is a checkpoint",
    _FORGED: r"x(\\n| )\\x1b\[31mforged",
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("p")
    before = Path.cwd()
    os.chdir(directory)
    os.mkfifo("pipe")
    Path("circle").symlink_to("circle")
    Path("dangling").symlink_to("none")
    Path("file").write_text("no model")
    Path("empty").touch()
    Path("folder").mkdir()
    Path(_FORGED).write_text("no model either")
    try:
        with closing(socket.socket(socket.AF_UNIX)) as bound:
            bound.bind("socket")
            yield directory
    finally:
        os.chdir(before)


def told(capsys: pytest.CaptureFixture[str]) -> str:
    """What was said: in one line, without control characters, and not too long."""
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    line = err.splitlines()[-1]
    assert line.startswith(("slimoe: ", "Error: "))
    assert err == f"{line}\n" or err.startswith("Usage: ")
    assert all(character.isprintable() for character in line)
    assert len(line) < 2000
    return line


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "command",
    [
        "inspect {}",
        "run {} -p x",
        "plan {} --no-measure",
        "convert {} o.gguf",
        "report {} {}",
        "calibrate {} -o o.stats",
    ],
)
def test_a_model_that_is_no_file(places: Path, command: str, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [place if word == "{}" else word for word in command.split()]
    assert run(arguments) in (2, 3)
    line = told(capsys)
    assert any(words in line for words in PLACES[place].split("|")) or place in ("empty", _FORGED)
    assert "forged" not in line or r"\x1b[31mforged" in line
    assert not Path("o.gguf").exists()
    assert not Path("o.stats").exists()


@pytest.mark.parametrize("place", [place for place in PLACES if place not in ("dangling", "empty", _FORGED)])
@pytest.mark.parametrize("command", ["convert {} {} --force", "calibrate {} -o {} --force"])
def test_a_result_that_can_be_no_file(
    places: Path, command: str, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first, source, *rest = command.split()
    assert run([first, str(DEMO), *(place if word == "{}" else word for word in rest)]) == 2
    assert source == "{}"
    assert told(capsys)


@pytest.mark.parametrize("flag", ["--imatrix", "--recipe", "--stats"])
@pytest.mark.parametrize("place", ["pipe", "/dev/zero", "socket", "folder", "circle", "n" * 300])
def test_further_inputs_that_are_no_files(
    places: Path, flag: str, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["convert", str(DEMO), "o.gguf", flag, place, *(["-t", "Q4_K"] if flag == "--imatrix" else [])]) in (
        2,
        3,
    )
    assert told(capsys)
    assert run(["calibrate", str(DEMO), "-o", "o.stats", "--text", place]) == 3
    assert told(capsys)
    assert run(["serve", str(DEMO), "--port", "0", "--api-key-file", place]) == 2
    assert told(capsys)


@pytest.mark.parametrize("name", ["m-00001-of-00002.gguf"])
def test_one_file_is_not_named_as_one_of_several(places: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["convert", str(DEMO), name, "--type", "Q8_0"]) == 2
    assert "one file of several" in told(capsys)


@pytest.mark.parametrize(
    "command",
    [
        "convert SRC DST --type Q8_0",
        "convert SRC DST --type Q8_0 --force",
        "convert SRC DST --target-size 1GB --stats x",
        "calibrate SRC -o DST",
        "calibrate SRC -o other --imatrix DST",
    ],
)
def test_what_another_run_writes_is_refused_before_any_work(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "o"
    words = {"SRC": str(DEMO), "DST": str(target), "other": str(tmp_path / "p"), "x": str(tmp_path / "x")}
    with Destination(target):
        assert run([words.get(word, word) for word in command.split()]) == 2
        assert (
            told(capsys)
            == f"slimoe: {target} is being written by another run. Wait for its end, or choose another name."
        )
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_evaluated_is_not_written_meanwhile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "o.gguf"
    target.write_bytes(DEMO.read_bytes())
    with Destination(target):
        assert run(["report", str(DEMO), str(target)]) == 2
    assert "another run" in told(capsys)


def test_what_a_killed_run_left_is_told_and_removed(
    tmp_path: Path, moe_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("o.gguf", "other.gguf"):
        folder = tmp_path / f"{name}.partial"
        folder.mkdir()
        (folder / "lock").touch()
        (folder / "o.gguf.1234.part").write_bytes(bytes(1 << 20))
    assert run(["convert", str(moe_checkpoint), str(tmp_path / "o.gguf"), "--type", "Q8_0"]) == 0
    err = capsys.readouterr().err
    assert f"{tmp_path}/o.gguf.partial: 1.0 MiB of a run that was interrupted were removed." in err
    assert f"{tmp_path}/other.gguf.partial: 1.0 MiB are left of an interrupted run." in err
    assert {path.name for path in tmp_path.iterdir()} == {"o.gguf", "other.gguf.partial"}
