"""Events for whoever listens to `/v1/events`: a bounded number of listeners, each a bounded number of events behind."""

import asyncio
import contextlib
from collections.abc import Iterator

import msgspec

from slimoe.server.api_error import ApiError, ErrorInfo
from slimoe.server.http.event_stream import named_event

MOST_LISTENERS = 16
MOST_BEHIND = 256
"""Events that may wait for a listener; one that is further behind is dropped."""


class Listener:
    """Who listens; takes the events that came since it last asked."""

    def __init__(self) -> None:
        self.is_over = False
        self._waiting: list[bytes] = []
        self._arrived = asyncio.Event()

    def push(self, event: bytes) -> None:
        """Adds an event; ends the listener when too many wait for it."""
        if len(self._waiting) >= MOST_BEHIND:
            self._waiting.clear()
            self.end()
        elif not self.is_over:
            self._waiting.append(event)
            self._arrived.set()

    def end(self) -> None:
        """Lets the listener know that nothing more comes."""
        self.is_over = True
        self._arrived.set()

    async def next(self, patience: float) -> list[bytes]:
        """Waits for events and returns all that came, none after `patience` seconds or at the end."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await self._arrived.wait()
        events, self._waiting = self._waiting, []
        if not self.is_over:
            self._arrived.clear()
        return events


class Feed:
    """Hands events out to all listeners; who comes later is first told the latest of each kind that lasts."""

    def __init__(self) -> None:
        self._listeners: set[Listener] = set()
        self._lasting: dict[tuple[str, str], bytes] = {}

    @property
    def is_heard(self) -> bool:
        """Whether anybody listens."""
        return bool(self._listeners)

    def tell(self, kind: str, data: msgspec.Struct) -> None:
        """Tells of something that happens now."""
        if self._listeners:
            self._hand_out(_named(kind, data))

    def keep(self, kind: str, name: str, data: msgspec.Struct) -> None:
        """Tells how something stands, if that has changed; `name` says of what."""
        event = _named(kind, data)
        if self._lasting.get((kind, name)) != event:
            self._lasting[kind, name] = event
            self._hand_out(event)

    @contextlib.contextmanager
    def listen(self) -> Iterator[Listener]:
        """A new listener, until the end of the context; raises ApiError when there are too many."""
        if len(self._listeners) >= MOST_LISTENERS:
            message = f"{MOST_LISTENERS} clients listen to events already. Close one of them, or try again in a moment."
            info = ErrorInfo(message, "rate_limit_error", None, "too_many_listeners")
            raise ApiError(429, info, headers={"Retry-After": "2"})
        listener = Listener()
        for event in self._lasting.values():
            listener.push(event)
        self._listeners.add(listener)
        try:
            yield listener
        finally:
            self._listeners.discard(listener)

    def end(self) -> None:
        """Ends all listeners."""
        for listener in self._listeners:
            listener.end()

    def _hand_out(self, event: bytes) -> None:
        for listener in self._listeners:
            listener.push(event)


def _named(kind: str, data: msgspec.Struct) -> bytes:
    return named_event(kind, msgspec.json.encode(data))
