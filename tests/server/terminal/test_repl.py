"""The chat in the terminal: commands, messages of several lines, and a history that outlives the program."""

import json
import os
import pty
import select
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.models.live_server import DEADLINE, slimoe

CHAT = ("run", "-n", "3", "--temp", "0", "--threads", "1", "--ctx", "128")


def chatted(model: Path, *lines: str) -> tuple[str, str]:
    """What goes to both outputs when a program types the lines."""
    process = slimoe(*CHAT, model, stdin=subprocess.PIPE)
    out, err = process.communicate("\n".join((*lines, "")), timeout=DEADLINE)
    assert process.returncode == 0, err
    return out, err


def figures(err: str) -> list[str]:
    """A line for each message that reached the model."""
    return [line for line in err.splitlines() if line.startswith("[read")]


def test_what_begins_with_a_slash_is_a_command_or_nothing(tiny_model: Path) -> None:
    out, err = chatted(tiny_model, "/regenrate", "/etc/passwd is a file", "/what now", "/exit", "never read")
    assert (out, figures(err)) == ("", [])
    assert "There is no command /regenrate. Did you mean /regenerate" in err
    assert err.count("There is no command") == 3


def test_two_slashes_send_one(tiny_model: Path, tmp_path: Path) -> None:
    saved = tmp_path / "chat.json"
    _, err = chatted(tiny_model, "//tmp is full", f"/save {saved}")
    assert len(figures(err)) == 1
    assert json.loads(saved.read_text())["messages"][0] == {"role": "user", "content": "/tmp is full"}


def test_lines_that_belong_together_are_one_message(tiny_model: Path, tmp_path: Path) -> None:
    saved = tmp_path / "chat.json"
    _, err = chatted(tiny_model, "the quick\\", "brown fox", '"""tell', "", '  me"""', f"/save {saved}")
    assert len(figures(err)) == 2
    said = [turn["content"] for turn in json.loads(saved.read_text())["messages"] if turn["role"] == "user"]
    assert said == ["the quick\nbrown fox", "tell\n\n  me"]


def test_a_conversation_is_saved_and_gone_on_with(tiny_model: Path, tmp_path: Path) -> None:
    saved = tmp_path / "chat.json"
    first, _ = chatted(tiny_model, "/set system tell me", "hello world", f"/save {saved}", "the fox")
    assert [turn["role"] for turn in json.loads(saved.read_text())["messages"]] == ["system", "user", "assistant"]
    again, err = chatted(tiny_model, f"/save {saved}", f"/load {saved}", "the fox", "/regenerate", f"/save {saved}")
    assert f"{saved} exists" in err
    answer = first.splitlines()[-1]
    assert again.splitlines() == [answer, answer]
    assert len(json.loads(saved.read_text())["messages"]) == 5


@pytest.mark.parametrize(
    ("content", "words"),
    [("[]", "no saved conversation"), ('{"messages": [{"role": "tool", "content": ""}]}', "'tool'"), (None, "No such")],
)
def test_files_that_hold_no_conversation(tiny_model: Path, tmp_path: Path, content: str | None, words: str) -> None:
    path = tmp_path / "odd.json"
    if content is not None:
        path.write_text(content)
    _, err = chatted(tiny_model, f"/load {path}", "/load", "/save", "/regenerate", "hello")
    assert words.lower() in err.lower()
    assert "Say which" in err
    assert "Say where" in err
    assert "Nothing was asked yet." in err
    assert len(figures(err)) == 1


def test_settings_are_checked_and_used(tiny_model: Path) -> None:
    _, err = chatted(
        tiny_model,
        *("/set tepm 1", "/set temp warm", "/set top_p 3", "/set max_tokens 0", "/set seed 1.5"),
        *("/set max_tokens 2", "/set temp 0.5", "/set", "hello", "/info"),
    )
    assert "There is no setting tepm. Did you mean temp" in err
    assert "temp is a number, got warm." in err
    assert "top_p is 3.0, but must be between 0 and 1." in err
    assert "max_tokens is a whole number, got 0." in err
    assert "seed is a whole number, got 1.5." in err
    assert "wrote 2" in err
    listed = [line.split() for line in err.splitlines()]
    assert ["temperature", "0.5"] in listed
    assert ["top_p", "0.95"] in listed
    assert "of 128 tokens of context" in err


# --- at a terminal -----------------------------------------------------------------------------------------


class Terminal:
    """A terminal with a program at its other end."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor, self.text = descriptor, ""

    def type(self, text: str) -> None:
        os.write(self.descriptor, text.encode())

    def wait_for(self, words: str) -> None:
        """Reads until the words come, and forgets what came before their end."""
        end = time.monotonic() + DEADLINE
        while words not in self.text:
            assert time.monotonic() < end, self.text
            if select.select([self.descriptor], [], [], 0.1)[0]:
                self.text += os.read(self.descriptor, 4096).decode("utf-8", "replace")
        self.text = self.text.partition(words)[2]


@contextmanager
def terminal(model: Path, state: Path, *flags: str) -> Iterator[Terminal]:
    """A chat at a terminal; the block must leave it."""
    main_end, other_end = pty.openpty()

    def attach() -> None:
        """So that Ctrl-C is a signal, also where these tests run in the background of a shell."""
        os.login_tty(other_end)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "slimoe.server.cli", *CHAT, *flags, str(model)],
        env={**os.environ, "XDG_STATE_HOME": str(state), "TERM": "xterm", "HOME": str(state)},
        preexec_fn=attach,
    )
    os.close(other_end)
    try:
        shown = Terminal(main_end)
        shown.wait_for("> ")
        yield shown
        assert process.wait(DEADLINE) == 0
    finally:
        process.kill()
        process.wait()
        os.close(main_end)


def test_a_history_outlives_the_program(tiny_model: Path, tmp_path: Path) -> None:
    with terminal(tiny_model, tmp_path) as shown:
        shown.type("hello world\n")
        shown.wait_for("wrote")
        shown.wait_for("> ")
        shown.type("/exit\n")
    kept = tmp_path / "slimoe" / "chat_history.jsonl"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert [json.loads(line) for line in kept.read_text().splitlines()] == ["hello world", "/exit"]
    with terminal(tiny_model, tmp_path) as shown:
        shown.type("\x1b[A\x1b[A\n")  # twice up
        shown.wait_for("hello world")
        shown.wait_for("wrote")
        shown.wait_for("> ")
        shown.type("\x04")


def test_no_history_is_kept_where_none_is_wanted(tiny_model: Path, tmp_path: Path) -> None:
    with terminal(tiny_model, tmp_path, "--no-history") as shown:
        shown.type("/exit\n")
    assert not list(tmp_path.rglob("*.jsonl"))


def test_a_paste_of_several_lines_is_one_message(tiny_model: Path, tmp_path: Path) -> None:
    saved = tmp_path / "chat.json"
    with terminal(tiny_model, tmp_path, "--no-history") as shown:
        shown.type("\x1b[200~the quick\nbrown fox\x1b[201~\n")
        shown.wait_for("wrote")
        shown.wait_for("> ")
        shown.type(f"/save {saved}\n")
        shown.wait_for("2 messages")
        shown.wait_for("> ")
        shown.type("/exit\n")
    assert json.loads(saved.read_text())["messages"][0]["content"] == "the quick\nbrown fox"


def test_ctrl_c_throws_away_what_is_typed_and_keeps_what_was_said(tiny_model: Path, tmp_path: Path) -> None:
    with terminal(tiny_model, tmp_path, "--ignore-eos", "-n", "-1", "--ctx", "4096") as shown:
        shown.type("never sent")
        shown.wait_for("never sent")
        time.sleep(0.3)  # readline waits for a key again, where a signal is not missed
        shown.type("\x03")
        shown.wait_for("Ctrl-C stops")
        shown.wait_for("> ")
        shown.type("hello\n")
        shown.wait_for("hello")
        time.sleep(0.3)
        shown.type("\x03")
        shown.wait_for("[read")
        shown.wait_for("> ")
        shown.type("/info\n")
        shown.wait_for("2 messages")
        shown.wait_for("> ")
        shown.type("/exit\n")
