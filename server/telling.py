"""What commands tell a person while they work, on standard error."""

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
