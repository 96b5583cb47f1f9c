"""What the pages for people name is there: files, headings, commands, flags, benches; and the README stays short."""

import ast
import builtins
import importlib
import re
from pathlib import Path

import click
import pytest

from slimoe.server.cli import COMMANDS, cli
from tests.test_house import FLOORS, floor

ROOT = Path(__file__).parents[1]
NAMES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
MAX_README_LINES = 250
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.fixture(params=sorted(NAMES))
def page(request: pytest.FixtureRequest) -> Path:
    path = ROOT / str(request.param)
    assert path.is_file()
    return path


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def code(path: Path) -> list[str]:
    """Every line that is typed, without its comment, and every piece of code within prose as one line."""
    whole = text(path)
    blocks: list[str] = []
    for block in FENCE.findall(whole):
        lines = block.replace("\\\n", " ").splitlines()
        blocks += [line for line in lines if line.startswith("$ ")] if lines[0] == "```console" else lines
    spans = (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCE.sub("", whole)))
    return [line.partition(" #")[0] for line in (*blocks, *spans)]


def flags(command: str) -> set[str]:
    """All that a command knows, -h of all of them among these."""
    found = cli.get_command(click.Context(cli), command)
    assert found is not None, command
    return {flag for one in found.params for flag in (*one.opts, *one.secondary_opts)} | {"--help", "-h"}


def anchors(path: Path) -> set[str]:
    """What GitHub calls a page's headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text(path)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    readme = ROOT / "README.md"
    assert len(text(readme).splitlines()) <= MAX_README_LINES
    assert set(NAMES) - {"README.md"} <= set(LINK.findall(text(readme)))


def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(FENCE.sub("", text(page))):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_commands_have_the_flags_that_they_are_given(page: Path) -> None:
    for line in code(page):
        for command, rest in re.findall(r"(?:^|[ /])slimoe ([a-z]+)(.*)", line):
            assert command in COMMANDS, line
            # What follows a pipe is another command's.
            named = re.findall(r"(?<=\s)(--[a-z][a-z-]*|-[a-z])(?=[\s=,]|$)", re.split(r" \| |;", rest)[0])
            assert set(named) <= flags(command), line


def test_flags_alone_are_a_commands(page: Path) -> None:
    known = set.union(*map(flags, COMMANDS))
    for line in code(page):
        if re.match(r"--[a-z]", line):
            assert set(re.findall(r"(?:^|\s)(--[a-z][a-z-]*)", line)) <= known, line


@pytest.mark.parametrize("name", [*NAMES, "bench/RESULTS.md", "CHANGELOG.md"])
def test_benches_that_are_named_exist_and_have_the_flags(name: str) -> None:
    for line in code(ROOT / name):
        for module, rest in re.findall(r"python -m (bench(?:\.\w+)+)(.*)", line):
            path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
            assert path.is_file(), line
            # Flags that benches share stand in modules of their own.
            source = text(path) + text(ROOT / "bench/limits/flags.py")
            source += text(ROOT / "bench/quality/lab_flags.py") if "@lab_flags(" in source else ""
            for flag in re.findall(r"(?<=\s)--[a-z][a-z-]*", rest):
                assert flag == "--help" or f'"{flag}"' in source, line


def test_files_that_are_named_exist(page: Path) -> None:
    for line in code(page):
        for name in re.findall(
            r"(?:^|\s)((?:server|offload|converter|bench|tests|docs|scripts)/[\w./]*)(?=\s|$)", line
        ):
            assert "NAME" in name or (ROOT / name).exists(), line


@pytest.mark.parametrize("room", ["server", "converter", "offload"])
def test_the_floors_that_are_told_are_those_that_are_held(room: str) -> None:
    told = re.search(rf"^{room} +(.+ > .+)$", text(ROOT / "CONTRIBUTING.md"), re.MULTILINE)
    assert told is not None
    floors = [{floor(room, name) for name in names.split(", ")} for names in told[1].split(" > ")]
    numbers = [number for found in floors for number in found]
    assert numbers == sorted(set(numbers), reverse=True)
    assert max(numbers) <= len(FLOORS[room])


def test_examples_use_what_their_modules_have() -> None:
    """Each example belongs to the first module that the paragraph before it names."""
    parts = re.split(r"^```python\n(.*?)^```$", text(ROOT / "CONTRIBUTING.md"), flags=re.MULTILINE | re.DOTALL)
    assert len(parts) > 1
    for prose, example in zip(parts[:-1:2], parts[1::2], strict=True):
        assert len(example.splitlines()) < 10, example
        module = re.findall(r"`([\w/]+)\.py`", prose.rstrip().rpartition("\n\n")[2])[0]
        known = vars(importlib.import_module(f"slimoe.{module.replace('/', '.')}")) | vars(builtins)
        nodes = list(ast.walk(ast.parse(example)))
        own = {node.arg for node in nodes if isinstance(node, ast.arg)}
        own |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        used = {node.id for node in nodes if isinstance(node, ast.Name)} - own
        assert used <= known.keys(), (module, used - known.keys())
