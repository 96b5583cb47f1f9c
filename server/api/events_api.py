"""`GET /v1/events`: what happens in the server, as a stream of server-sent events."""

from typing import Literal

import msgspec
from aiohttp import web

from slimoe.server.api.backends import Backend, Backends
from slimoe.server.api.endpoint import Endpoint
from slimoe.server.http.event_stream import NAMED_EVENTS, EventStream
from slimoe.server.process.supervisor import Supervisor
from slimoe.server.watch.feed import Feed
from slimoe.server.watch.record import RequestEvent


class StateEvent(msgspec.Struct, frozen=True):
    """`state`: whether a model answers. While it is loading, `done_bytes` of `total_bytes` are there.

    `phase` says what loading is about now: starting the engine's process, or weights. `problem` says why it does not
    answer although it should.
    """

    model: str
    state: Literal["loading", "ready", "asleep", "failed", "restarting", "silent", "stopped"]
    phase: Literal["starting", "weights"] | None = None
    done_bytes: int = 0
    total_bytes: int = 0
    problem: str | None = None


class MemoryEvent(msgspec.Struct, frozen=True):
    """`memory`: the bytes that a model's engine holds, by use."""

    model: str
    bytes: dict[str, int]


class EventsApi:
    """The endpoint's handler, which tells listeners of every change of a model's state and memory."""

    def __init__(self, backends: Backends, feed: Feed, ping_seconds: float) -> None:
        self._feed = feed
        self._ping_seconds = ping_seconds
        for backend in backends.all():
            self._watch(backend)

    def endpoints(self) -> list[Endpoint]:
        """The endpoint."""
        return [
            Endpoint("GET", "/v1/events", self.handle, answer=StateEvent | RequestEvent | MemoryEvent, streams=True)
        ]

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Streams what happens in the server: states, requests, memory; raises ApiError."""
        with self._feed.listen() as listener:
            stream = EventStream(request, NAMED_EVENTS)
            while not listener.is_over:
                events = await listener.next(self._ping_seconds)
                await (stream.send(events) if events else stream.ping())
        return await stream.finish()

    def _watch(self, backend: Backend) -> None:
        supervisor, name = backend.supervisor, backend.model.id

        def tell() -> None:
            self._feed.keep("state", name, state_of(name, supervisor))
            if supervisor.info is not None:
                self._feed.keep("memory", name, MemoryEvent(name, supervisor.info.memory))
            if supervisor.phase == "stopped":
                self._feed.end()

        supervisor.on_change = tell
        tell()


def state_of(name: str, supervisor: Supervisor) -> StateEvent:
    """How the model `name` stands."""
    trouble = supervisor.trouble
    match supervisor.phase:
        case "ready":
            return StateEvent(name, "ready" if trouble is None else "silent", problem=trouble)
        case "failed":
            problem = supervisor.failure
            return StateEvent(name, "failed", problem=None if problem is None else problem.message)
        case "stopped":
            return StateEvent(name, "stopped")
        case "asleep":
            problem = supervisor.failure
            return StateEvent(name, "asleep", problem=None if problem is None else problem.message)
    done, total = supervisor.progress.done_bytes, supervisor.progress.total_bytes
    state: Literal["loading", "restarting"] = "loading" if trouble is None else "restarting"
    return StateEvent(name, state, "weights" if total else "starting", done, total, trouble)
