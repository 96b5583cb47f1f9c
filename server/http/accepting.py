"""Accepting connections: how many this process has descriptors for, and what is said when it has none left."""

import asyncio
import errno
import sys
import time
from collections.abc import Callable
from typing import Any

from slimoe.server.http.connection import USUAL_LIMITS, ConnectionLimits
from slimoe.server.log_format import JOURNAL

_OWN_DESCRIPTORS = 40
"""What the process needs besides connections: pipes, the log, files that are open for a moment, and to spare."""
_LEAST, _SILENCE = 4, 60.0
_OUT_OF_ROOM = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_NOTE = "New connections have to wait: the system gives no more of them (%s). Lower --max-connections."


def connection_limits(n_most: int | None, n_descriptors: int) -> ConnectionLimits:
    """The limits for `n_most` connections, or for None, as many as usual or as there are descriptors for."""
    if n_most is None:
        left = sys.maxsize if n_descriptors < 0 else n_descriptors - _OWN_DESCRIPTORS
        n_most = max(_LEAST, min(USUAL_LIMITS.n_most, left))
    return ConnectionLimits(n_most, min(USUAL_LIMITS.n_most_each, n_most))


def open_file_limit() -> int:
    """How many files and connections the system lets this process have open at once; below 0 for any number."""
    if sys.platform == "win32":
        return sys.maxsize
    import resource

    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


class AcceptFailures:
    """An event loop's handler of exceptions, which says once in a while that accepting has failed."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._told_at: float | None = None

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Called by the loop for what nobody else has caught."""
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in _OUT_OF_ROOM or "accept" not in context["message"]:
            loop.default_exception_handler(context)
            return
        now = self._clock()
        if self._told_at is None or now - self._told_at >= _SILENCE:
            self._told_at = now
            JOURNAL.tell(_NOTE % error.strerror, "warning")
