"""Events for whoever listens to `/v1/events`: a bounded number of listeners, each a bounded number of events behind."""

import asyncio
import contextlib
import itertools
from collections.abc import Hashable, Iterator
from typing import Any

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
        self._waiting: dict[Hashable, bytes] = {}
        self._arrived = asyncio.Event()

    def push(self, key: Hashable, event: bytes) -> None:
        """Adds an event in place of one of the same `key`; ends the listener when too many wait for it."""
        self._waiting.pop(key, None)
        if len(self._waiting) >= MOST_BEHIND:
            self._waiting.clear()
            self.end()
        elif not self.is_over:
            self._waiting[key] = event
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
        events, self._waiting = list(self._waiting.values()), {}
        if not self.is_over:
            self._arrived.clear()
        return events


class Feed:
    """Hands events out to all listeners; who comes later is first told the latest of each kind that lasts."""

    def __init__(self) -> None:
        self._listeners: set[Listener] = set()
        self._lasting: dict[tuple[str, str], bytes] = {}
        self._numbers = itertools.count()

    @property
    def is_heard(self) -> bool:
        """Whether anybody listens."""
        return bool(self._listeners)

    def tell(self, kind: str, data: Any) -> None:
        """Tells of something that happens now."""
        if self._listeners:
            self._hand_out(next(self._numbers), _named(kind, data))

    def keep(self, kind: str, name: str, data: Any) -> None:
        """Tells how something stands, if that has changed; `name` says of what. Nobody is told what is outdated."""
        event = _named(kind, data)
        if self._lasting.get((kind, name)) != event:
            self._lasting[kind, name] = event
            self._hand_out((kind, name), event)

    def forget(self, kind: str, name: str) -> None:
        """Lets nobody who comes later know how it stood."""
        self._lasting.pop((kind, name), None)

    @contextlib.contextmanager
    def listen(self) -> Iterator[Listener]:
        """A new listener, until the end of the context; raises ApiError when there are too many."""
        if len(self._listeners) >= MOST_LISTENERS:
            message = f"{MOST_LISTENERS} clients listen to events already. Close one of them, or try again in a moment."
            info = ErrorInfo(message, "rate_limit_error", None, "too_many_listeners")
            raise ApiError(429, info, headers={"Retry-After": "2"})
        listener = Listener()
        for key, event in self._lasting.items():
            listener.push(key, event)
        self._listeners.add(listener)
        try:
            yield listener
        finally:
            self._listeners.discard(listener)

    def end(self) -> None:
        """Ends all listeners."""
        for listener in self._listeners:
            listener.end()

    def _hand_out(self, key: Hashable, event: bytes) -> None:
        for listener in self._listeners:
            listener.push(key, event)


def _named(kind: str, data: Any) -> bytes:
    return named_event(kind, msgspec.json.encode(data))
