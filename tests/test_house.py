"""The rules of the house: who may import whom, how long things may be, what serving may load."""

import ast
import functools
import graphlib
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "slimoe"
"""The import path of the folders that are installed: `slimoe.server` is the folder `server`."""
INSTALLED = ("server", "offload", "converter")
ROOMS = (*INSTALLED, "bench", "tests")
MAY_IMPORT = {
    "offload": {"offload"},
    "converter": {"converter", "offload"},
    "server": {"server", "offload", "converter"},
    "bench": {"bench", "server", "offload", "converter"},
}
FLOORS = {
    "offload": (
        {"errors", "printable"},
        {"files", "resources"},
        {"gguf", "ggml"},
        {"model", "text"},
        {"cache", "memory"},
        {"graph", "lossy", "machine"},
        {"experts", "plan", "requests"},
        {"open_tiers"},
        {"loaded_model"},
        {"observation"},
        {"engine"},
    ),
    "converter": (
        {"document", "gguf", "quant"},
        {"source"},
        {"forward"},
        {"neurons"},
        {"stats"},
        {"layout"},
        {"methods"},
        {"recipe", "write"},
        {"budget", "hf"},
        {"report"},
        {"heal"},
    ),
    "server": (
        {"conversation"},
        {"child_python", "log_format"},
        {"messages", "telling"},
        {"api_error", "formats", "options"},
        {"chat", "http", "page"},
        {"watch"},
        {"process", "terminal"},
        {"models"},
        {"api", "jobs"},
        {"description", "dialects"},
        {"app"},
        {"evaluating", "offer", "serving"},
        {"commands"},
    ),
    "bench": (
        {"disk_speed", "baselines"},
        {"limits", "models", "traces"},
        {"attacks", "faults", "quality"},
    ),
}
"""Folders and files of a room from the lowest up: each imports lower ones only. What is not named stands on top."""
SHARED_WITH_CONVERTER = {"errors", "files", "ggml", "gguf", "model", "resources", "text"}
VAGUE_NAMES = {"utils", "util", "common", "helpers", "helper", "manager", "base", "misc"}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_FILES = 17
MIN_LINES_OF_LONELY_FILES = 60
REASON = "Apart: "
"""A shorter file with a single importer says behind this word, in its first line, why it is a file of its own."""
MOST_CALLED_ONCE = 0.12
"""Largest share of private functions that are called once in all functions."""


def sources(*rooms: str) -> list[Path]:
    return sorted(path for room in rooms for path in (ROOT / room).rglob("*.py"))


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), named(path))


@functools.cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(tree(path)))


@functools.cache
def imports(path: Path) -> tuple[tuple[str, ...], ...]:
    """Dotted names of every import in a file, those inside functions as well, as parts without the package."""
    return tuple(_imports(path))


def _imports(path: Path) -> Iterator[tuple[str, ...]]:
    for node in nodes(path):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{named(path)} has a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = tuple(name.split("."))
            yield parts[1:] if parts[0] == PACKAGE else parts


def floor(room: str, story: str) -> int:
    """How many floors lie below a file or folder of a room."""
    return next((number for number, names in enumerate(FLOORS[room]) if story in names), len(FLOORS[room]))


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_rooms_open_only_their_own_doors(room: str) -> None:
    seen = [(named(path), parts) for path in sources(room) for parts in imports(path) if parts[0] in ROOMS]
    assert seen, f"no import found in {room}: does this test still look in the right place?"
    assert [(name, ".".join(parts)) for name, parts in seen if parts[0] not in MAY_IMPORT[room]] == []


def test_installed_folders_are_imported_by_the_package() -> None:
    """Imported as `server.x`, a file would be loaded a second time beside `slimoe.server.x`."""
    wrong = []
    for path in sources(*ROOMS):
        for node in nodes(path):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            wrong += [(named(path), name) for name in names if name.split(".")[0] in INSTALLED]
    assert wrong == []


@pytest.mark.parametrize("room", FLOORS)
def test_no_import_goes_upwards(room: str) -> None:
    named_stories = {name for names in FLOORS[room] for name in names}
    assert named_stories <= {path.stem for path in (ROOT / room).iterdir()}
    wrong, n_seen = [], 0
    for path in sources(room):
        own = path.relative_to(ROOT / room).with_suffix("").parts[0]
        for parts in imports(path):
            if parts[0] != room or len(parts) < 2 or parts[1] == own:
                continue
            n_seen += 1
            if floor(room, parts[1]) >= floor(room, own) and floor(room, own) < len(FLOORS[room]):
                wrong.append((named(path), ".".join(parts)))
    assert n_seen
    assert wrong == []


@functools.cache
def needs() -> dict[tuple[str, ...], set[tuple[str, ...]]]:
    """The files that each file imports, by their parts."""
    paths = sources("server", "offload", "converter", "bench")
    files = {path.relative_to(ROOT).with_suffix("").parts: path for path in paths}
    return {
        name: {origin for parts in imports(path) for origin in (parts, parts[:-1]) if origin in files} - {name}
        for name, path in files.items()
    }


def test_no_import_goes_round() -> None:
    """Between files, wherever they stand."""
    graphlib.TopologicalSorter(needs()).prepare()


def test_a_short_file_for_a_single_other_says_why() -> None:
    importers = Counter(origin for origins in needs().values() for origin in origins)
    lonely = []
    for name in needs():
        path = ROOT.joinpath(*name).with_suffix(".py")
        is_short = len(path.read_text(encoding="utf-8").splitlines()) < MIN_LINES_OF_LONELY_FILES
        if is_short and importers[name] == 1:
            first = (ast.get_docstring(tree(path)) or "").partition("\n")[0]
            lonely += [named(path)] if REASON not in first else []
    assert lonely == []


def test_few_private_functions_are_called_once() -> None:
    """A step cut out of its only caller makes the reader jump, unless its name says more than its lines.

    What is handed over or stands in a table, and so is called by no name, is no such step.
    """
    n_functions, once = 0, []
    for path in sources("server", "offload", "converter", "bench"):
        mentioned = Counter(name for node in nodes(path) if (name := last_name(node)))
        called = {last_name(node.func) for node in nodes(path) if isinstance(node, ast.Call)}
        names = [node.name for node in nodes(path) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        n_functions += len(names)
        once += [name for name in names if re.match("_[^_]", name) and mentioned[name] == 1 and name in called]
    assert len(once) / n_functions < MOST_CALLED_ONCE


def last_name(node: ast.AST) -> str:
    """The name that a mention ends with: `b` of `a.b`; none for other nodes."""
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def test_converter_takes_only_the_lower_floors_of_the_engine() -> None:
    used = [(named(path), parts) for path in sources("converter") for parts in imports(path) if parts[0] == "offload"]
    assert used
    assert [(name, ".".join(parts)) for name, parts in used if parts[1] not in SHARED_WITH_CONVERTER] == []


def test_python_lives_in_the_rooms_only() -> None:
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
    with_python = {name for name in folders - {"build", "dist"} if next((ROOT / name).rglob("*.py"), None)}
    assert with_python == set(ROOMS)


def folders(*rooms: str) -> list[Path]:
    return sorted({path.parent for path in sources(*rooms)})


@pytest.mark.parametrize("folder", folders(*ROOMS), ids=named)
def test_folders_are_small_and_say_what_lives_there(folder: Path) -> None:
    assert len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) <= MAX_FILES
    text = ast.get_docstring(tree(folder / "__init__.py"))
    assert folder.is_relative_to(ROOT / "tests") or text


def test_the_wheel_has_every_folder() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert settings["packages"] == [".".join((PACKAGE, *named(path).split("/"))) for path in folders(*INSTALLED)]
    assert settings["package-dir"] == {f"{PACKAGE}.{room}": room for room in sorted(INSTALLED)}


@pytest.mark.parametrize("path", sources("server", "offload", "converter", "bench"), ids=named)
def test_files_have_one_noun_and_are_short(path: Path) -> None:
    assert path.stem not in VAGUE_NAMES
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES


@pytest.mark.parametrize("path", sources("server", "offload", "converter", "bench"), ids=named)
def test_functions_are_short_and_say_what_they_take(path: Path) -> None:
    for node in nodes(path):
        assert not isinstance(node, ast.Global), f"line {node.lineno}: global"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.args.kwarg is None, f"{node.name} takes **{node.args.kwarg and node.args.kwarg.arg}"
            n_lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert n_lines <= MAX_FUNCTION_LINES, f"{node.name} is {n_lines} lines long"


NEEDS_A_PROGRAM = {"tests/bench/test_client_matrix.py": "node", "tests/server/page/test_browser.py": "Chromium"}
"""Tests that are skipped, and say so, where a program is missing that pip cannot install."""


def test_no_test_is_switched_off() -> None:
    off = ("skip", "skipif", "xfail", "importorskip")
    for path in sources("tests"):
        if named(path) in NEEDS_A_PROGRAM:
            continue
        names = {node.attr for node in nodes(path) if isinstance(node, ast.Attribute)}
        assert not names.intersection(off), f"{named(path)} switches tests off"


def test_serving_does_not_load_the_converters_libraries() -> None:
    code = (
        "import sys, slimoe.server.app, slimoe.server.process.engine_process, slimoe.offload.engine\n"
        "print(*sorted({'.'.join(name.split('.')[: 2 if name.startswith('slimoe') else 1]) for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert {"aiohttp", "numpy", "slimoe.offload"} <= loaded
    assert loaded.isdisjoint({"torch", "transformers", "safetensors", "slimoe.converter"})


WITHOUT_TORCH = """
import sys
for name in ("torch", "transformers", "scipy", "matplotlib"):
    sys.modules[name] = None
from slimoe.server.cli import main
sys.argv = ["slimoe", *sys.argv[1:]]
main()
"""


@pytest.mark.parametrize("command", ["convert", "plan", "calibrate", "report", "inspect", "eval", "doctor", "launch"])
def test_every_command_explains_itself_without_the_converters_libraries(command: str) -> None:
    words = [sys.executable, "-c", WITHOUT_TORCH, command, "--help"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Usage: ")


def test_types_by_name_need_no_torch(tmp_path: Path) -> None:
    target = tmp_path / "small.gguf"
    demo = str(ROOT / "server/demo/demo.gguf")
    words = [sys.executable, "-c", WITHOUT_TORCH, "convert", demo, str(target), "--type", "Q8_0"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert target.read_bytes()[:4] == b"GGUF"


def test_tests_reach_no_private_name() -> None:
    """Neither by import, nor as an attribute of anything but themselves, nor by patching."""
    wrong = []
    for path in sources("tests"):
        for node in nodes(path):
            names = []
            if isinstance(node, ast.ImportFrom):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id == "self"):
                names = [node.attr]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "setattr":
                names = [str(one.value).rpartition(".")[2] for one in node.args if isinstance(one, ast.Constant)]
            wrong += [(named(path), name) for name in names if re.match("_[^_]", name)]
    assert wrong == []
