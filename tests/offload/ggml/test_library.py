"""Which library is taken: the first whose types, structures and numbers are those that are known, tried once."""

import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest

from slimoe.offload.errors import LibraryError, UsageError
from slimoe.offload.ggml import trial
from slimoe.offload.ggml.library import ENVIRONMENT, wanted
from slimoe.offload.ggml.packages import NAMES, NATIVE, PACKAGES, PREBUILT, Library, Package

ROOT = Path(__file__).parents[3]
OTHER = PACKAGES[2]
INSTALLED = NATIVE.find()


def lay_out(site: Path, package: Package) -> Library:
    """The libraries that the tests compute with, as if another package had installed them."""
    assert INSTALLED is not None
    folder = site / package.module / package.folder
    folder.mkdir(parents=True)
    (site / package.module / "__init__.py").touch()
    for path in INSTALLED.folder.glob(NAMES[sys.platform].format("*")):
        shutil.copy(path, folder)
    return Library(package, folder)


def told(site: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """What a fresh process tells in which the packages of `site` come first."""
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "SLIMOE_CACHE": str(site / "cache"), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def larger_blocks(content: bytes, path: Path) -> bytes:
    """Q4_K in blocks of 160 bytes, as if its structure had another field."""
    n, n_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q4_K]
    row = n.to_bytes(8, "little") + bytes(8)  # blck_size, blck_size_interleave, type_size
    known = row + n_bytes.to_bytes(8, "little")
    assert content.count(known) == 1
    return content.replace(known, row + (160).to_bytes(8, "little"))


def newer(content: bytes, path: Path) -> bytes:
    """A version of years to come."""
    return content.replace(b"\x000.25.3\x00", b"\x000.95.3\x00")


def crashing(content: bytes, path: Path) -> bytes:
    """A function that ends the process."""
    library = ctypes.CDLL(str(path))
    address = ctypes.cast(library.ggml_new_tensor_4d, ctypes.c_void_p).value or 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, offset, *_, name = line.split()
        begin, end = (int(part, 16) for part in span.split("-"))
        if name == str(path) and begin <= address < end:
            at = address - begin + int(offset, 16)
            return content[:at] + bytes(16) + content[at + 16 :]
    raise AssertionError(path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (larger_blocks, "has as type 12 Q4_K of 256 weights in 160 bytes, not Q4_K of 256 in 144"),
        (newer, "has ggml 0.95.3, but 0.25 to 0.27 is needed"),
        (crashing, "ended its test by SIG"),
    ],
)
def test_a_library_of_another_kind_is_refused_and_the_next_one_taken(
    tmp_path: Path, damage: Callable[[bytes, Path], bytes], words: str
) -> None:
    path = lay_out(tmp_path, NATIVE).path("ggml-base")
    changed = damage(path.read_bytes(), path)
    path.unlink()  # this process may have it open
    path.write_bytes(changed)
    (tmp_path / PREBUILT.module).mkdir()
    (tmp_path / PREBUILT.module / "__init__.py").touch()
    lay_out(tmp_path, OTHER)
    done = told(
        tmp_path,
        "from slimoe.offload.ggml.library import candidates, chosen, Refusal\n"
        "print(*(found.why for found in candidates() if isinstance(found, Refusal)), sep='\\n')\n"
        "from slimoe.offload.ggml import ops\nprint(chosen().package.name)\n",
    )
    assert done.returncode == 0, done.stderr
    refused, incomplete, taken = done.stdout.splitlines()
    assert words in refused
    assert incomplete == f"xllamacpp ? lacks {tmp_path}/xllamacpp/xllamacpp.abi3.so"
    assert taken == OTHER.name


def test_none_that_can_be_used(tmp_path: Path) -> None:
    lay_out(tmp_path, NATIVE).path("llama").unlink()
    code = "import sys; from slimoe.server.cli import run; sys.exit(run(['run', '-p', 'a', '-n', '1']))"
    done = told(tmp_path, code, SLIMOE_LIBRARY=NATIVE.name)
    assert done.returncode == LibraryError.exit_code
    last = done.stderr.splitlines()[-1]
    assert last.startswith(
        "slimoe: SLIMOE_LIBRARY asks for llama-cpp-python, which cannot be used. llama-cpp-python ? lacks "
    )
    assert "libllama" in last
    assert last.endswith(
        f"Install it again: pip install {NATIVE.name}=={NATIVE.wanted}; or set SLIMOE_LIBRARY to xllamacpp."
    )


def hide(site: Path, *packages: Package) -> None:
    """Lets a fresh process find none of these packages."""
    modules = {package.module for package in packages}
    (site / "sitecustomize.py").write_text(
        "import importlib.util\n"
        "find = importlib.util.find_spec\n"
        f"importlib.util.find_spec = lambda name, *rest: None if name in {modules} else find(name, *rest)\n"
    )


@pytest.mark.parametrize("command", [["run", "-p", "a", "-n", "1"], ["plan", "--no-measure"], ["serve", "--port", "0"]])
def test_a_package_that_is_named_and_not_installed(tmp_path: Path, command: list[str]) -> None:
    """That another can be installed is of no help: it would not be looked at."""
    hide(tmp_path, OTHER)
    code = f"import sys; from slimoe.server.cli import run; sys.exit(run({command}))"
    done = told(tmp_path, code, SLIMOE_LIBRARY=OTHER.name)
    assert done.returncode == LibraryError.exit_code
    expected = "slimoe: SLIMOE_LIBRARY asks for llama-cpp-py-sync, which is not installed. Install it: pip install "
    expected += "llama-cpp-py-sync; or set SLIMOE_LIBRARY to llama-cpp-python or xllamacpp."
    assert done.stderr.splitlines()[-1] == expected


def test_no_package_at_all(tmp_path: Path) -> None:
    hide(tmp_path, *PACKAGES)
    code = "import sys; from slimoe.server.cli import run; sys.exit(run(['plan', '--no-measure']))"
    done = told(tmp_path, code)
    assert done.stderr.splitlines()[-1].endswith(f"docs/building.md says: pip install xllamacpp=={PREBUILT.wanted}")
    named = told(tmp_path, code, SLIMOE_LIBRARY=PREBUILT.name)
    assert named.stderr.splitlines()[-1].endswith(
        f"pip install {PREBUILT.name}=={PREBUILT.wanted}; or leave SLIMOE_LIBRARY out."
    )
    unknown = told(tmp_path, code, SLIMOE_LIBRARY="ggml")
    assert unknown.stderr.splitlines()[-1].endswith(
        "None is installed; leave SLIMOE_LIBRARY out for the first that works."
    )


@pytest.mark.parametrize("command", [["run", "-p", "a", "-n", "1"], ["doctor"], ["serve", "--port", "0"]])
def test_every_command_tells_of_a_name_that_is_no_package(tmp_path: Path, command: list[str]) -> None:
    code = f"import sys; from slimoe.server.cli import run; sys.exit(run({command}))"
    done = told(tmp_path, code, SLIMOE_LIBRARY="ggml")
    assert done.returncode == UsageError.exit_code
    last = done.stderr.splitlines()[-1]
    assert last.startswith("slimoe: SLIMOE_LIBRARY is 'ggml', which is none of llama-cpp-python, xllamacpp, ")
    assert last.endswith("; leave SLIMOE_LIBRARY out for the first that works.")


def test_a_name_that_is_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, "ggml")
    with pytest.raises(UsageError, match=r"SLIMOE_LIBRARY is 'ggml', which is none of llama-cpp-python, xllamacpp"):
        wanted()


def test_what_has_passed_is_tried_again_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMOE_CACHE", str(tmp_path / "cache"))
    library = lay_out(tmp_path, OTHER)
    assert trial.problem(library) is None

    def fails(*_: object, **__: object) -> "subprocess.CompletedProcess[str]":
        return subprocess.CompletedProcess([], 1, "it differs\n", "")

    monkeypatch.setattr(subprocess, "run", fails)
    assert trial.problem(library) is None
    os.utime(library.path("ggml-cpu"), ns=(0, 0))
    assert trial.problem(library) == "it differs"
    assert trial.problem(library) == "it differs"


def test_a_machine_without_openmp_is_told_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMOE_CACHE", str(tmp_path / "cache"))
    library = lay_out(tmp_path, OTHER)
    path = library.path("ggml-cpu")
    path.write_bytes(path.read_bytes().replace(b"libgomp.so.1", b"libgomp.so.9"))
    expected = "needs libgomp.so.9, which on Debian and Ubuntu comes with: apt install libgomp1"
    assert trial.problem(library) == f"llama-cpp-py-sync ? {expected}"


def test_the_prebuilt_library_writes_the_demos_tokens(tmp_path: Path) -> None:
    """It is of another version, and compiled for another processor."""
    code = (
        "from slimoe.server.cli import main; import sys\n"
        "sys.argv = ['slimoe', 'run', '-p', 'Once upon a time', '-n', '24', '--temp', '0', '--json']\nmain()"
    )
    answers = []
    for package in (NATIVE, PREBUILT):
        done = told(tmp_path, code, SLIMOE_LIBRARY=package.name)
        assert done.returncode == 0, done.stderr
        answers.append(json.loads(done.stdout))
    assert answers[0]["text"] == answers[1]["text"]
