"""What the server writes to its log on standard error: one line for each event, whatever clients have sent."""

import contextlib
import json
import logging
import queue
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from slimoe.offload.printable import printable

MOST_WAITING = 1000
"""Lines that may wait for whoever reads the log; further ones are left out, for nobody may hold up the server."""
FLUSH_SECONDS = 0.5


class Journal:
    """Standard error as text for a person or, if `is_json`, as one JSON object a line for a program."""

    def __init__(self) -> None:
        self.is_json = False
        self._waiting: queue.Queue[str] = queue.Queue(MOST_WAITING)
        self._writer: threading.Thread | None = None

    def tell(
        self,
        message: str,
        level: str = "info",
        *,
        error: BaseException | None = None,
        shown: str | None = None,
        fields: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes one event: as text `shown`, or what `log_text` makes of it; as JSON with further `fields`.

        As text it may be an empty line, which sets paragraphs apart.
        """
        if self.is_json:
            line = self._object(message, level, error, fields)
        else:
            line = log_text(message, error) if shown is None else shown
        print(line, file=sys.stderr, flush=True)

    def tell_later(self, message: str, level: str, shown: str, fields: Mapping[str, Any] | None = None) -> None:
        """Writes one event without waiting for whoever reads the log."""
        if self._writer is None:
            self._writer = threading.Thread(target=self._write, name="log", daemon=True)
            self._writer.start()
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait(self._object(message, level, None, fields) if self.is_json else shown)

    def flush(self) -> None:
        """Waits for a moment until what waits is written."""
        end = time.monotonic() + FLUSH_SECONDS
        while self._waiting.unfinished_tasks and time.monotonic() < end:
            time.sleep(0.005)

    def _write(self) -> None:
        while True:
            line = self._waiting.get()
            with contextlib.suppress(OSError, ValueError):
                print(line, file=sys.stderr, flush=True)
            self._waiting.task_done()

    def _object(self, message: str, level: str, error: BaseException | None, fields: Mapping[str, Any] | None) -> str:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        trace = {} if error is None else {"traceback": "".join(traceback.format_exception(error))}
        text = json.dumps({"time": now, "level": level, "message": message, **(fields or {}), **trace})
        # The only character beyond the printed ones of ASCII that JSON leaves as it is.
        return text.replace("\x7f", "\\u007f")


JOURNAL = Journal()
"""This process's log."""


class JournalHandler(logging.Handler):
    """Hands records of the logging library to the journal."""

    def emit(self, record: logging.LogRecord) -> None:
        """Called by the library for each record."""
        error = record.exc_info[1] if record.exc_info else None
        JOURNAL.tell(record.getMessage(), record.levelname.lower(), error=error)


def log_text(message: str, error: BaseException | None = None) -> str:
    """The line that tells of an event, and below it where `error` came from, indented: no line can pass for another."""
    lines = [] if error is None else "".join(traceback.format_exception(error)).rstrip("\n").split("\n")
    return "\n".join([f"slimoe: {printable(message)}", *(f"  {printable(line)}" for line in lines)])


def log_to_stderr(*, is_json: bool = False) -> None:
    """Sends what libraries and this program log, warnings and worse, to standard error."""
    JOURNAL.is_json = is_json
    logging.basicConfig(level=logging.WARNING, handlers=[JournalHandler()])
