"""Text from outside on its way to a terminal or a log: nothing in it may end a line or steer the terminal."""

import sys
import unicodedata
from contextlib import suppress

_UNPRINTED = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
"""Unicode's categories of control, format, surrogate, private and unassigned characters, and of line separators."""


def printable(text: str) -> str:
    """`text` on one line, with everything that is not printed written as an escape, such as `\\n` or `\\x1b`."""
    return "".join(map(_escaped, text))


def say(line: str) -> None:
    """Writes a line for a person to standard error, if there is somewhere to write to."""
    with suppress(OSError, ValueError):
        print(printable(line), file=sys.stderr, flush=True)


def _escaped(character: str) -> str:
    is_safe = unicodedata.category(character) not in _UNPRINTED
    return character if is_safe else character.encode("unicode_escape").decode("ascii")
