"""What commands tell a person while they work, on standard error."""

import difflib
from collections.abc import Iterable

from slimoe.offload.printable import printable
from slimoe.server.log_format import JOURNAL

_LONGEST = 1800
"""Characters of a line; a path alone may have thousands."""


def tell(line: str) -> None:
    """Writes one line; what names and values in it hold cannot end it or steer the terminal."""
    is_error = line.startswith("slimoe: ")
    JOURNAL.tell(line.removeprefix("slimoe: "), "error" if is_error else "info", shown=one_line(line))


def one_line(text: str) -> str:
    """A text as one line of bearable length."""
    line = printable(text)
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown `word`: those of the `known` words that look like it, or nothing."""
    names = list(known)
    near = difflib.get_close_matches(word, names) or [name for name in names if len(word) > 1 and name.startswith(word)]
    return f" Did you mean {' or '.join(near)}?" if near else ""
