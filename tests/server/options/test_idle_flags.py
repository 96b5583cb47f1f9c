"""Flags that would do nothing beside the others are refused: one line, and status 2."""

import pytest

from slimoe.server.cli import run
from slimoe.server.options.engine_options import DEMO

MODEL = str(DEMO)


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["run", "-p", "x", "--prompt-cache-size", "1GiB"], "--prompt-cache-size"),
        (["run", "-p", "x", "--system", "y"], "--system"),
        (["run", "-p", "x", "--chat-template", "plain"], "--chat-template"),
        (["run", "-p", "x", "--history"], "--history"),
        (["plan", "--trace", "t"], "--trace"),
        (["plan", MODEL, "-t", "Q4_K"], "--type"),
        (["plan", "--prompt-cache-size", "1GiB"], "--prompt-cache-size"),
        (["plan", MODEL, "--keep-experts", "2", "--serve"], "--serve"),
        (["plan", MODEL, "--keep-experts", "2", "--measure"], "--measure"),
        (["convert", MODEL, "to.gguf", "--eval-text", "t"], "--eval-text"),
        (["convert", MODEL, "to.gguf", "--eval-tokens", "64"], "--eval-tokens"),
        (["convert", MODEL, "to.gguf", "--report"], "--report"),
        (["convert", MODEL, "to.gguf", "--keep-experts", "2", "--no-report", "--eval-tokens", "64"], "--eval-tokens"),
        (["convert", "checkpoint", "to", "--hf", "--keep-experts", "2", "--report"], "--report"),
        (["serve", "--port", "0", "--models-max", "1"], "--models-max"),
        (["serve", "--port", "0", "--prompt-cache-size", "1GiB"], "--prompt-cache-size"),
        (["serve", "--port", "0", "--api-key-env", "A", "--api-key-file", "b"], "--api-key-file"),
        (["launch", "--run"], "--run"),
        (["launch", "--key-env", "A"], "--key-env"),
        (["launch", "aider", "--run", "--json"], "--json"),
    ],
    ids=lambda words: words if isinstance(words, str) else " ".join(words).replace(MODEL, "demo"),
)
def test_a_flag_that_does_nothing_is_refused(words: list[str], flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    last = err.splitlines()[-1]
    assert last.startswith(f"slimoe: {flag} ")
    assert "Traceback" not in err


@pytest.mark.parametrize("words", [["run", "-p", "x", "-n", "1", "--no-history"], ["plan", "--no-measure"]])
def test_what_a_flag_switches_off_is_off(words: list[str]) -> None:
    assert run([*words, "--ctx", "64", "--threads", "1"]) == 0
