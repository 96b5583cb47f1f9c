"""Progress on standard error: bars where that is a terminal."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from slimoe.server.terminal.work_clock import WorkClock

_SOON_SECONDS, _OFTEN_SECONDS = 3.0, 60.0
"""Where there is no bar, the time left is said after the first so many seconds, and then each time after the second."""


def duration(seconds: float) -> str:
    """A number of seconds as people say it, such as `12 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@contextmanager
def status(what: str) -> Iterator[None]:
    """Shows on a terminal what is being done while the block runs, where its length is unknown."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(what):
        yield


@contextmanager
def byte_bar(n_bytes: int) -> Iterator[Callable[[int, int], None]]:
    """Shows a bar with bytes, speed and time left; yields the function to call with the bytes done and in all."""
    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=n_bytes)
        yield lambda done, _total: progress.update(task, completed=done)


@contextmanager
def step_bar(expected: Mapping[str, float] | None = None) -> Iterator[Callable[[str, int, int], None]]:
    """Shows a bar with the time left; yields the function to call with a kind of work, its steps done, and all of them.

    With the `expected` seconds of each kind of work, the time left is that of all kinds. Where standard error is no
    terminal, a line says what is being done, and now and then how long it will still take.
    """
    console = Console(stderr=True)
    clock = None if expected is None else WorkClock(expected)
    if not console.is_terminal:
        yield _plain_steps(clock)
        return
    time_left = TimeRemainingColumn() if clock is None else TextColumn("{task.fields[left]}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), time_left)
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None, left="")

        def show(what: str, done: int, total: int) -> None:
            progress.update(task, description=what, completed=done, total=total, left=_left(clock, what, done, total))

        yield show


def _left(clock: WorkClock | None, what: str, done: int, total: int) -> str:
    if clock is None:
        return ""
    clock.step(what, done, total)
    return f"about {duration(clock.left)} left in all"


def _plain_steps(clock: WorkClock | None) -> Callable[[str, int, int], None]:
    """Says each kind of step once, what follows a colon changes with every step; and the time left, at first soon."""
    said: set[str] = set()
    due = time.monotonic() + _SOON_SECONDS

    def say(what: str, done: int, total: int) -> None:
        nonlocal due
        left, kind, now = _left(clock, what, done, total), what.partition(":")[0], time.monotonic()
        is_due = bool(left) and done > 0 and now > due
        if kind not in said or is_due:
            said.add(kind)
            click.echo(f"{kind} ..." + (f" {left}" if left else ""), err=True)
        due = now + _OFTEN_SECONDS if is_due else due

    return say
