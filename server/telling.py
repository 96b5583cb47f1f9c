"""What commands tell a person while they work, on standard error."""

import difflib
from collections.abc import Iterable

import click

from slimoe.offload.printable import printable

_LONGEST = 1800
"""Characters of a line; a path alone may have thousands."""


def tell(line: str) -> None:
    """Writes one line; what names and values in it hold cannot end it or steer the terminal."""
    click.echo(one_line(line), err=True)


def one_line(text: str) -> str:
    """A text as one line of bearable length."""
    line = printable(text)
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown `word`: those of the `known` words that look like it, or nothing."""
    names = list(known)
    near = difflib.get_close_matches(word, names) or [name for name in names if len(word) > 1 and name.startswith(word)]
    return f" Did you mean {' or '.join(near)}?" if near else ""
