"""The rules of the house: who may import whom, how long things may be, what serving may load."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("server", "offload", "converter", "bench", "tests")
SHARED_LEAVES = {"byte_size", "errors", "file_keys", "gguf_file", "library", "metadata_keys", "model_spec", "rope_spec"}
SHARED_LEAVES |= {
    "foreign_file",
    "model_file",
    "regular_file",
    "whole_file",
    "ggml",
    "ggml_struct",
    "native_format",
    "native_layout",
    "weight_source",
    "processors",
    "control_groups",
}
SHARED_LEAVES |= {"interrupts", "llama", "text_blocks", "tokenizer", "vocabulary"}
MAY_IMPORT = {
    "offload": {"offload"},
    "converter": {"converter", "offload"},
    "server": {"server", "offload", "converter"},
    "bench": {"bench", "server", "offload", "converter"},
}
VAGUE_NAMES = {"utils", "util", "common", "helpers", "helper", "manager", "base", "misc"}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def sources(*rooms: str) -> list[Path]:
    return sorted(path for room in rooms for path in (ROOT / room).rglob("*.py"))


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), named(path))


def imports(path: Path) -> Iterator[tuple[str, ...]]:
    """Dotted names of every import in a file, those inside functions as well, as parts."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = package[: len(package) - node.level + 1] if node.level else ()
            module = (*origin, *(node.module or "").split(".")) if node.module else origin
            yield from ((*module, alias.name) for alias in node.names)


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_rooms_open_only_their_own_doors(room: str) -> None:
    seen = [(named(path), parts) for path in sources(room) for parts in imports(path) if parts[0] in ROOMS]
    assert seen, f"no import found in {room}: does this test still look in the right place?"
    assert [(name, ".".join(parts)) for name, parts in seen if parts[0] not in MAY_IMPORT[room]] == []


def test_converter_takes_only_leaves_from_the_engine() -> None:
    used = [(named(path), parts) for path in sources("converter") for parts in imports(path) if parts[0] == "offload"]
    assert used
    assert [(name, ".".join(parts)) for name, parts in used if parts[1] not in SHARED_LEAVES] == []


def test_shared_leaves_stand_on_leaves_only() -> None:
    for leaf in sorted(SHARED_LEAVES):
        own = {parts[1] for parts in imports(ROOT / "offload" / f"{leaf}.py") if parts[0] == "offload"}
        assert own <= SHARED_LEAVES, f"offload/{leaf}.py imports {own - SHARED_LEAVES}"


def test_python_lives_in_the_rooms_only() -> None:
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
    with_python = {name for name in folders - {"build", "dist"} if next((ROOT / name).rglob("*.py"), None)}
    assert with_python == set(ROOMS)


@pytest.mark.parametrize("path", sources("server", "offload", "converter", "bench"), ids=named)
def test_files_have_one_noun_and_are_short(path: Path) -> None:
    assert path.stem not in VAGUE_NAMES
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES


@pytest.mark.parametrize("path", sources("server", "offload", "converter", "bench"), ids=named)
def test_functions_are_short_and_say_what_they_take(path: Path) -> None:
    for node in ast.walk(tree(path)):
        assert not isinstance(node, ast.Global), f"line {node.lineno}: global"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.args.kwarg is None, f"{node.name} takes **{node.args.kwarg and node.args.kwarg.arg}"
            n_lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert n_lines <= MAX_FUNCTION_LINES, f"{node.name} is {n_lines} lines long"


def test_no_test_is_switched_off() -> None:
    off = ("skip", "skipif", "xfail", "importorskip")
    for path in sources("tests"):
        names = {node.attr for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute)}
        assert not names.intersection(off), f"{named(path)} switches tests off"


def test_serving_does_not_load_the_converters_libraries() -> None:
    code = (
        "import sys, server.app, server.engine_process, offload.engine\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert {"aiohttp", "numpy", "offload"} <= loaded
    assert loaded.isdisjoint({"torch", "transformers", "safetensors", "converter"})
