"""Progress on standard error: bars where that is a terminal."""

from collections.abc import Callable, Iterator
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


def duration(seconds: float) -> str:
    """As people say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@contextmanager
def status(what: str) -> Iterator[None]:
    """Says what is being done, where nothing tells how much of it there is."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(what):
        yield


@contextmanager
def byte_bar(n_bytes: int) -> Iterator[Callable[[int, int], None]]:
    """A bar with bytes, speed and time left; called with bytes done and all."""
    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=n_bytes)
        yield lambda done, _total: progress.update(task, completed=done)


@contextmanager
def step_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A bar with time left; called with what is done now, the steps of it that are done, and all of them.

    Where that is no terminal, a line says what is done.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _plain_steps()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda what, done, total: progress.update(task, description=what, completed=done, total=total)


def _plain_steps() -> Callable[[str, int, int], None]:
    """Says each kind of step once; what follows a colon changes with every step."""
    said = set()

    def say(what: str, _done: int, _total: int) -> None:
        kind = what.partition(":")[0]
        if kind not in said:
            said.add(kind)
            click.echo(f"{kind} ...", err=True)

    return say
