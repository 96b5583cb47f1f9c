"""What a person types into the chat: messages of one or more lines, with a history that outlives the program."""

import contextlib
import os
import sys
from pathlib import Path

import click
import msgspec
from platformdirs import user_state_dir

PROMPT, MORE = "> ", ". "
BLOCK, CONTINUED = '"""', "\\"
_MOST_KEPT, _LONGEST_KEPT = 1000, 1 << 16


def history_path() -> Path:
    """Where the history lies; it is read and written by its owner only."""
    return Path(user_state_dir("slimoe", appauthor=False)) / "chat_history.jsonl"


class TypedLines:
    """Messages from standard input; at a terminal with line editing, and with a history in the file `history`.

    A backslash ends a line that goes on with the next, and three quotes begin and end a message of several lines.
    """

    def __init__(self, history: Path | None, hint: str) -> None:
        """`hint` is told when Ctrl-C throws a message away. Without `history` nothing is remembered."""
        self._is_typed, self._is_shown = sys.stdin.isatty(), sys.stdout.isatty()
        self._hint = hint
        self._history = history if self._is_typed else None
        self._readline = None
        if not self._is_typed:
            return
        with contextlib.suppress(ImportError):
            import readline

            # A paste arrives as one message, whatever lines it has.
            readline.parse_and_bind("set enable-bracketed-paste on")
            readline.set_auto_history(False)
            self._readline = readline
        for text in self._known():
            if self._readline is not None:
                self._readline.add_history(text)

    def read(self) -> str | None:
        """The next message, None at the end of input."""
        while True:
            try:
                text = self._message()
            except KeyboardInterrupt:
                click.echo(f"\n{self._hint}", err=True)
                continue
            except EOFError:
                return None
            if text.strip():
                self._remember(text)
            return text

    def _message(self) -> str:
        line = self._line(PROMPT)
        if line.lstrip().startswith(BLOCK):
            lines = [line.lstrip().removeprefix(BLOCK)]
            while not lines[-1].rstrip().endswith(BLOCK):
                lines.append(self._line(MORE))
            lines[-1] = lines[-1].rstrip().removesuffix(BLOCK)
            return "\n".join(lines).strip("\n")
        lines = [line]
        while lines[-1].endswith(CONTINUED):
            lines[-1] = lines[-1].removesuffix(CONTINUED)
            lines.append(self._line(MORE))
        return "\n".join(lines)

    def _line(self, prompt: str) -> str:
        if self._is_typed and not self._is_shown:
            click.echo(prompt, nl=False, err=True)
        return input(prompt if self._is_typed and self._is_shown else "")

    def _known(self) -> list[str]:
        """The messages in the file, of which only the last ones are kept there."""
        if self._history is None:
            return []
        try:
            lines = self._history.read_bytes().splitlines()
        except OSError:
            return []
        found = []
        for line in lines[-_MOST_KEPT:]:
            with contextlib.suppress(msgspec.DecodeError):
                found.append(msgspec.json.decode(line, type=str))
        if len(lines) > 2 * _MOST_KEPT:
            with contextlib.suppress(OSError):
                self._history.unlink()
            for text in found:
                self._keep(text)
        return found

    def _remember(self, text: str) -> None:
        if self._readline is not None:
            self._readline.add_history(text)
        self._keep(text)

    def _keep(self, text: str) -> None:
        """Adds a message to the file; a file that cannot be written costs its history and nothing else."""
        if self._history is None or len(text) > _LONGEST_KEPT:
            return
        with contextlib.suppress(OSError):
            self._history.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
            descriptor = os.open(self._history, flags, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                os.fchmod(descriptor, 0o600)
                file.write(msgspec.json.encode(text) + b"\n")
