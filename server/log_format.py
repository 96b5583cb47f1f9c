"""What the server writes to its log on standard error: one line for each event, whatever clients have sent."""

import logging
import traceback

from slimoe.offload.printable import printable


class LogFormatter(logging.Formatter):
    """A record's line, and below it a traceback whose lines are indented: none can pass for a record of its own."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as text."""
        error = record.exc_info[1] if record.exc_info else None
        return log_text(record.getMessage(), error)


def log_text(message: str, error: BaseException | None = None) -> str:
    """The lines that tell of an event, and where `error` came from."""
    lines = [] if error is None else "".join(traceback.format_exception(error)).rstrip("\n").split("\n")
    return "\n".join([f"slimoe: {printable(message)}", *(f"  {printable(line)}" for line in lines)])


def log_to_stderr() -> None:
    """Sends what libraries and this program log, warnings and worse, to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
