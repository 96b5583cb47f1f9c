"""Generations in the terminal: text as it comes, figures beside it, and Ctrl-C that ends only the answer."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import click

from slimoe.offload.engine import Engine
from slimoe.offload.text.generation import Finished, GenerationRequest, TokenStep
from slimoe.server.terminal.interrupts import ending_at_interrupt


@dataclass(frozen=True, slots=True)
class Outcome:
    """A finished generation."""

    text: str
    tokens: tuple[int, ...]
    finished: Finished


def generate(engine: Engine, request: GenerationRequest, *, shows_text: bool) -> Outcome:
    """Runs `request`; Ctrl-C ends it early with the reason `cancelled`, and a second one ends the program."""
    texts: list[str] = []
    tokens: list[int] = []
    with ending_at_interrupt(), _interruptible() as interrupted:
        for event in engine.generate(request, interrupted.is_set):
            if isinstance(event, TokenStep):
                tokens.append(event.token)
            if isinstance(event, (TokenStep, Finished)):
                texts.append(event.text)
                if shows_text and event.text:
                    print(event.text, end="", flush=True)
            if isinstance(event, Finished):
                return Outcome("".join(texts), tuple(tokens), event)
    raise AssertionError("the engine ended a generation without saying so")


def show_figures(finished: Finished) -> None:
    """Writes a line to standard error: tokens and speed of both phases, and how many experts were found in memory."""
    timings, hit_share = finished.timings, finished.tiers.hit_share
    known = f" ({timings.cached_n} known)" if timings.cached_n else ""
    read = f"read {timings.prompt_n} tokens{known}{_speed(timings.prompt_n, timings.prompt_ms)}"
    written = f"wrote {timings.predicted_n}{_speed(timings.predicted_n, timings.predicted_ms)}"
    if timings.draft_n:
        written += f", {timings.draft_n_accepted} of {timings.draft_n} drafted tokens accepted"
    found = "" if hit_share is None else f", {100 * hit_share:.0f} % of experts were in memory"
    click.echo(click.style(f"[{read}, {written}{found}]", dim=True), err=True)


@contextmanager
def loading_progress(name: str) -> Iterator["LoadingProgress"]:
    """Shows on a terminal how much of the model is read, and clears the line afterwards."""
    progress = LoadingProgress(name, sys.stderr.isatty())
    try:
        yield progress
    finally:
        progress.clear()


class LoadingProgress:
    """One line on a terminal that is written over with each new percentage."""

    def __init__(self, name: str, is_shown: bool) -> None:
        self._name = name
        self._is_shown = is_shown
        self._percent = -1

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        """Shows the percentage of the model that is read."""
        percent = 100 * done_bytes // max(1, total_bytes)
        if self._is_shown and percent != self._percent:
            self._percent = percent
            print(f"\rLoading {self._name}: {percent} %", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Removes the line again."""
        if self._percent >= 0:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    interrupted = threading.Event()

    def interrupt(number: int, frame: FrameType | None) -> None:
        interrupted.set()

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def _speed(n_tokens: int, milliseconds: float) -> str:
    return f" at {1000 * n_tokens / milliseconds:.1f}/s" if milliseconds > 0 else ""
