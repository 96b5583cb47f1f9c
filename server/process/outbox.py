"""The requests of one engine: those that wait to be sent, those that were, and who is worked on."""

import itertools
from collections.abc import Callable, Iterable

from slimoe.server import messages
from slimoe.server.process.request_handle import RequestHandle, Slots

MAX_TRIES = 3
"""How often a request is sent to an engine that ends before it has begun it."""


class Outbox:
    """Requests by their id; `slots` are those that are worked on."""

    def __init__(self, n_slots: int) -> None:
        self.slots = Slots(n_slots)
        self.handles: dict[int, RequestHandle] = {}
        self.ids = itertools.count(1)
        self._unsent: dict[int, messages.Message] = {}
        self._sent: dict[int, messages.Message] = {}

    @property
    def unsent(self) -> list[int]:
        """Ids of the requests that wait to be sent."""
        return list(self._unsent)

    def add(self, handle: RequestHandle, message: messages.Message) -> None:
        """Keeps a message until it is sent."""
        self.handles[handle.id] = handle
        self._unsent[handle.id] = message

    def send_all(self, send: Callable[[messages.Message], None]) -> None:
        """Sends what waits."""
        for message in self._unsent.values():
            send(message)
        self._sent |= self._unsent
        self._unsent.clear()

    def note(self, handle: RequestHandle, answer: messages.Answer) -> None:
        """Hands an answer of the engine on, which may have begun with the request."""
        self.slots.note(handle, answer)
        handle.push(answer)
        if handle.is_underway:
            self._sent.pop(handle.id, None)

    def drop(self, id: int) -> tuple[RequestHandle | None, bool]:
        """Forgets a request; returns it, and whether it was sent."""
        handle = self.handles.pop(id, None)
        if handle is not None:
            self.slots.leave(handle)
        was_sent = self._unsent.pop(id, None) is None
        self._sent.pop(id, None)
        return handle, was_sent

    def fail(self, ids: Iterable[int], failure: Callable[[int], messages.Failure]) -> None:
        """Ends requests with a failure."""
        for id in list(ids):
            handle, _ = self.drop(id)
            if handle is not None:
                handle.push(failure(id))

    def lost(self) -> list[int]:
        """Requests that ended with the engine; those that it had not begun are sent again, a few times at most."""
        again = {}
        for id, message in self._sent.items():
            handle = self.handles.get(id)
            # What changes the engine may be what ended it.
            is_harmless = not isinstance(message, messages.Rebudget | messages.ChangeSlot)
            if handle is not None and is_harmless and not handle.is_underway and handle.n_tries < MAX_TRIES:
                handle.n_tries += 1
                again[id] = message
        self._sent.clear()
        self._unsent = {**again, **self._unsent}
        return [id for id in self.handles if id not in self._unsent]
