"""Ctrl-C while C calls back into Python."""

import ctypes
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slimoe.offload.ggml import llama
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.text.interrupts import interrupts_held
from slimoe.offload.text.tokenizer import Tokenizer
from slimoe.server.cli import run
from tests.models.tiny_gguf import write_vocabulary

_CALLBACK = ctypes.CFUNCTYPE(None)


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """A shell lets what it starts in the background ignore interrupts; Python then does as well."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def _interrupt_from_c() -> None:
    _CALLBACK(lambda: signal.raise_signal(signal.SIGINT))()


def _held(done: list[str]) -> None:
    with interrupts_held():
        _interrupt_from_c()
        done.append("went on")


def test_an_interrupt_waits_for_the_end() -> None:
    done: list[str] = []
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        _held(done)
    assert done == ["went on"]
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_while_a_vocabulary_is_made_is_not_lost(
    tmp_path: Path, sentencepiece_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = llama.llama_model_init_from_user

    def interrupted(*arguments: Any) -> Any:
        _interrupt_from_c()
        return make(*arguments)

    gguf = read_gguf(write_vocabulary(tmp_path / "v.gguf", sentencepiece_path))
    monkeypatch.setattr(llama, "llama_model_init_from_user", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Tokenizer.open(gguf)


def test_an_interrupt_ends_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(_model: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("slimoe.server.commands.inspect.take_inventory", interrupted)
    assert run(["inspect", "model"]) == 130
    assert capsys.readouterr().err == "\n"
