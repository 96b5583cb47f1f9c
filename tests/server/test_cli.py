"""The `slimoe` command: quick to start, one line for a mistake, one JSON object for a program."""

import contextlib
import io
import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from llama_cpp import Llama

from slimoe.server.cli import COMMANDS, cli, run
from slimoe.server.options.engine_options import DEMO
from slimoe.server.options.help_sections import SECTIONS
from tests.models.live_server import DEADLINE, slimoe
from tests.models.tiny_gguf import TinyShape, write_tiny_gguf


@pytest.fixture(scope="module")
def model(sentencepiece_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = TinyShape(n_ctx=100_000)
    return write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf", sentencepiece_path, shape=shape)


def told(*arguments: str | Path, text: str | None = None) -> tuple[int, str, str]:
    """Exit status, output and error output of a command line."""
    process = slimoe(*arguments, stdin=subprocess.PIPE)
    out, err = process.communicate(text, timeout=DEADLINE)
    return process.returncode, out, err


def reported(*arguments: str | Path) -> dict[str, Any]:
    """What `slimoe run --json` prints, in this process."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        status = run(["run", *map(str, arguments), "--threads", "1", "--json"])
    assert status == 0
    assert out.getvalue().count("\n") == 1
    report: dict[str, Any] = json.loads(out.getvalue())
    return report


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], []])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom slimoe.server.cli import run\n"
        f"run({arguments!r})\n"
        "print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"numpy", "aiohttp", "gguf", "msgspec", "jinja2"}.isdisjoint(done.stderr.split())
    assert "slimoe" in done.stdout + done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_there(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([name, "--help"]) == 0
    assert f"Usage: slimoe {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [["fly"], ["run", "--wings"], ["run", "-n", "many"], ["run", "--prompt-ids", "a"]]
)
def test_usage_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert "Error: " in output.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["rnu"], "Did you mean run?"), (["comp"], "Did you mean completion?"), (["run", "--tepm", "1"], "--temp")],
)
def test_a_slip_is_answered_with_what_was_meant(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    assert words in capsys.readouterr().err


def test_help_lists_no_models_that_may_grow_more(capsys: pytest.CaptureFixture[str]) -> None:
    run(["convert", "--help"])
    out = capsys.readouterr().out
    assert "docs/converting.md lists the models" in " ".join(out.split())
    assert not [name for name in ("Mixtral", "OLMoE", "Qwen") if name in out]


def test_help_is_in_sections(capsys: pytest.CaptureFixture[str]) -> None:
    run([])
    assert "\nMake a model:\n  calibrate" in capsys.readouterr().err
    run(["run", "--help"])
    told = capsys.readouterr().out
    begins = [told.index(f"\n{title}:\n") for title in ("Options", "Model", "Memory and devices", "Sampling")]
    assert begins == sorted(begins)
    assert begins[2] < told.index("--ram") < begins[3] < told.index("--temp")


def test_every_flag_of_a_section_is_a_commands() -> None:
    found = (cli.get_command(click.Context(cli), name) for name in COMMANDS)
    known = {param.name for command in found if command for param in command.params}
    assert {name for names in SECTIONS.values() for name in names} <= known


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_get_a_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["completion", shell]) == 0
    assert f"_SLIMOE_COMPLETE={shell}_complete" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "found"),
    [("slimoe be", {"bench"}), ("slimoe run --kv", {"--kv-type"}), ("slimoe launch cl", {"claude-code", "cline"})],
)
def test_words_are_completed(words: str, found: set[str]) -> None:
    asked = {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" ")), "_SLIMOE_COMPLETE": "bash_complete"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in asked.items():
            patch.setenv(name, value)
        process = slimoe()
    out, err = process.communicate(timeout=DEADLINE)
    assert {line.partition(",")[2] for line in out.splitlines()} == found, err


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["missing.gguf", "-p", "x"], 3, "there is no such file"),
        (["MODEL", "-p", "x", "--prompt-ids", "1"], 2, "not both"),
        (["MODEL", "--json"], 2, "needs a prompt"),
        (["MODEL", "--chat"], 2, "needs a --prompt"),
        (["MODEL", "-p", "x", "--system", "y"], 2, "--chat"),
        (["MODEL", "--prompt-ids", "5,99999"], 2, "99999"),
        (["MODEL", "--prompt-ids", ""], 2, "empty"),
        (
            ["MODEL", "-p", "x", "--json-schema", '{"not": {}}'],
            2,
            '--json-schema cannot be followed: Unimplemented keys: ["not"]',
        ),
        (["MODEL", "-p", "x", "--grammar", __file__], 2, "--grammar cannot be followed: "),
        (["MODEL", "--prompt-ids", "5", "--json-schema", "{}", "--grammar", __file__], 2, "not both"),
        (["MODEL", "--ctx", "16", "-p", "the quick brown fox " * 20], 1, "context window holds 16"),
    ],
)
def test_mistakes_are_one_line(
    model: Path, arguments: list[str], status: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["run", *(str(model) if name == "MODEL" else name for name in arguments)]) == status
    output = capsys.readouterr()
    assert output.out == ""
    assert words in output.err
    assert output.err.startswith("slimoe: ")
    assert output.err.count("\n") == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_windows_is_told_where_it_runs(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert run([name, "--help"]) == 1
    assert capsys.readouterr().err == ("Error: This program does not run on Windows itself. Install it inside WSL.\n")


def test_the_command_line_needs_no_module_that_windows_lacks() -> None:
    absent = "import sys\nfor name in ('fcntl', 'resource', 'termios', 'pwd', 'grp'):\n    sys.modules[name] = None\n"
    subprocess.run([sys.executable, "-c", absent + "import slimoe.server.cli"], check=True)


def test_json_for_a_text(model: Path) -> None:
    report = reported(model, "-p", "hello world", "-n", "8", "--temp", "0")
    llama = Llama(str(model), n_ctx=512, verbose=False, n_threads=1)
    prompt = llama.tokenize(b"hello world")
    assert report["timings"]["prompt_n"] == len(prompt)
    assert report["tokens"] == greedy(llama, prompt, 8)
    assert report["text"] == llama.detokenize(report["tokens"], prompt).decode("utf-8", "replace")
    assert report["finish_reason"] == "length"
    assert report["timings"]["predicted_n"] == 8
    assert report["timings"]["predicted_ms"] > 0
    assert sum(report["memory"].values()) > 0


def test_drafted_tokens_are_counted(capfd: pytest.CaptureFixture[str]) -> None:
    words = ("-p", "one two three one two three", "-n", "60", "--temp", "0", "--ignore-eos")
    reports = [reported(DEMO, *words, "--draft", draft) for draft in ("none", "ngram")]
    assert reports[0]["text"] == reports[1]["text"]
    assert reports[0]["timings"]["draft_n"] == 0
    timings = reports[1]["timings"]
    assert 0 < timings["draft_n_accepted"] <= timings["draft_n"]
    assert run(["run", str(DEMO), *words, "--draft", "ngram", "--threads", "1"]) == 0
    counts = f"{timings['draft_n_accepted']} of {timings['draft_n']} drafted tokens accepted"
    assert counts in capfd.readouterr().err


def test_json_for_token_ids(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "ids.gguf", None)
    report = reported(path, "--prompt-ids", "5,6,7", "-n", "6", "--temp", "0", "--ignore-eos")
    assert report["text"] == ""
    assert len(report["tokens"]) == 6
    assert report["timings"]["prompt_n"] == 3
    again = reported(path, "--prompt-ids", "5 6 7", "-n", "6", "--seed", "3", "--top-k", "1")
    all_that_fit = reported(path, "--prompt-ids", "5,6,7", "-n", "-1", "--ctx", "32", "--ignore-eos")
    assert len(all_that_fit["tokens"]) == 32 - 3 + 1
    assert again["tokens"] == report["tokens"]


def greedy(llama: Llama, prompt: list[int], n_tokens: int) -> list[int]:
    tokens: list[int] = []
    for token in llama.generate(prompt, temp=0.0, reset=True):
        tokens.append(token)
        if len(tokens) == n_tokens:
            break
    return tokens


def test_answers_have_the_form_of_a_schema_or_grammar(model: Path, tmp_path: Path) -> None:
    schema = '{"type": "array", "items": {"enum": [1, 2]}, "minItems": 2, "maxItems": 2}'
    report = reported(model, "-p", "hello", "--temp", "2", "--json-schema", schema)
    assert set(json.loads(report["text"])) <= {1, 2}
    assert report["finish_reason"] == "stop"
    grammar = tmp_path / "answer.gbnf"
    grammar.write_text('root ::= "yes" | "no"')
    assert reported(model, "-p", "hello", "--temp", "2", "--grammar", grammar)["text"] in ("yes", "no")


def test_text_goes_out_and_figures_beside_it(model: Path) -> None:
    status, out, err = told("run", model, "-p", "-", "-n", "5", "--temp", "0", "--threads", "1", text="hello world")
    assert status == 0
    assert out == reported(model, "-p", "hello world", "-n", "5", "--temp", "0")["text"] + "\n"
    assert "wrote 5" in err


def test_a_chat_keeps_its_history(model: Path) -> None:
    lines = "hello world\n/help\ntell me\n/reset\nhello world\n/exit\nnever read\n"
    status, out, err = told("run", model, "-n", "4", "--temp", "0", "--threads", "1", text=lines)
    assert status == 0
    figures = [line for line in err.splitlines() if line.startswith("[read")]
    assert len(figures) == 3
    assert "known" in figures[1]
    answers = out.split("\n")
    assert err.count("/reset") == 2
    once = reported(model, "-p", "hello world", "--chat", "-n", "4", "--temp", "0")["text"]
    assert out.startswith(once + "\n")
    assert out.endswith(once + "\n"), answers


def test_a_chat_outlives_what_does_not_fit(model: Path) -> None:
    lines = "the quick brown fox " * 20 + "\nhello\n"
    status, out, err = told("run", model, "--ctx", "24", "-n", "2", "--threads", "1", text=lines)
    assert status == 0
    assert "context window holds 24" in err
    assert "wrote 2" in err
    assert out


def test_ctrl_c_stops_the_answer_and_not_the_program(model: Path) -> None:
    main_end, terminal = pty.openpty()
    process = slimoe("run", model, "--ignore-eos", "--threads", "1", "--temp", "0", stdin=terminal)
    os.close(terminal)
    assert process.stdout is not None
    os.write(main_end, b"hello\n")
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    os.write(main_end, b"/exit\n")
    out, err = process.communicate(timeout=DEADLINE)
    os.close(main_end)
    assert process.returncode == 0, err
    assert out.endswith("\n")
    assert "[read" in err


def test_ctrl_c_ends_a_single_completion(model: Path) -> None:
    process = slimoe("run", model, "-p", "hello", "--ignore-eos", "--threads", "1")
    assert process.stdout is not None
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 130
    assert "Traceback" not in err


def test_a_template_that_cannot_be_used_is_needed_for_chats_only(sentencepiece_path: Path, tmp_path: Path) -> None:
    template = "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}"
    path = write_tiny_gguf(tmp_path / "tiny.gguf", sentencepiece_path, template)
    assert reported(path, "-p", "hello", "-n", "2", "--ignore-eos")["timings"]["predicted_n"] == 2
    for arguments in ([], ["-p", "hello", "--chat"]):
        status, out, err = told("run", path, "-n", "2", *arguments, text="hello\n")
        assert (status, out) == (1, "")
        assert "cannot chat, for its chat template cannot be used: it is nested too deeply." in err
        assert "Traceback" not in err
