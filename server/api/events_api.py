"""`GET /v1/events`: what happens in the server, as a stream of server-sent events."""

import asyncio
from functools import partial
from typing import Any, Literal

import msgspec
from aiohttp import web

from slimoe.offload.requests.snapshot import Snapshot
from slimoe.server.api.backends import Backend, Backends
from slimoe.server.api.endpoint import Endpoint
from slimoe.server.http.event_stream import NAMED_EVENTS, EventStream
from slimoe.server.process.supervisor import Supervisor
from slimoe.server.watch.feed import Feed
from slimoe.server.watch.record import RequestEvent

OBSERVE_SECONDS = 0.25


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
    """The endpoint's handler, which tells listeners of every change of a model's state, memory and experts."""

    def __init__(self, backends: Backends, feed: Feed, ping_seconds: float) -> None:
        self._backends = backends.all()
        self._feed = feed
        self._ping_seconds = ping_seconds
        self._has_changed = {backend.model.id: True for backend in self._backends}
        self._observing: asyncio.Task[None] | None = None
        for backend in self._backends:
            backend.supervisor.on_change = partial(self._tell, backend)
            self._tell(backend)

    def endpoints(self) -> list[Endpoint]:
        """The endpoint."""
        kinds = StateEvent | RequestEvent | MemoryEvent
        return [Endpoint("GET", "/v1/events", self.handle, answer=kinds, streams=True)]

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Streams what happens in the server: states, requests, memory, experts; raises ApiError."""
        with self._feed.listen() as listener:
            if self._observing is None or self._observing.done():
                self._observing = asyncio.create_task(self._observe())
            stream = EventStream(request, NAMED_EVENTS)
            while not listener.is_over:
                events = await listener.next(self._ping_seconds)
                await (stream.send(events) if events else stream.ping())
        return await stream.finish()

    def _tell(self, backend: Backend) -> None:
        supervisor, name = backend.supervisor, backend.model.id
        self._has_changed[name] = True
        self._feed.keep("state", name, state_of(name, supervisor))
        if supervisor.info is not None:
            self._feed.keep("memory", name, MemoryEvent(name, supervisor.info.memory))
        if supervisor.phase != "ready":
            for kind in ("experts", "places", "work"):
                self._feed.forget(kind, name)
        if supervisor.phase == "stopped":
            self._feed.end()

    async def _observe(self) -> None:
        """Asks engines for what they hold and do while somebody listens, and while that may be something else."""
        self._has_changed = dict.fromkeys(self._has_changed, True)
        while self._feed.is_heard:
            for backend in self._backends:
                name, supervisor = backend.model.id, backend.supervisor
                if self._has_changed[name] or supervisor.n_busy:
                    self._has_changed[name] = False
                    snapshot = await supervisor.observe()
                    for kind, value in ({} if snapshot is None else observed(name, snapshot)).items():
                        self._feed.keep(kind, name, value)
            await asyncio.sleep(OBSERVE_SECONDS)


def observed(name: str, snapshot: Snapshot) -> dict[str, dict[str, Any]]:
    """The events about the engine of model `name`, by kind; docs/events.md explains their fields."""
    experts, memory, work = snapshot.experts, snapshot.memory, snapshot.work
    model = {"model": name}
    return {
        "experts": {**model, "formats": experts.formats, "layers": experts.layers},
        "places": {**model, "resident": memory.resident, "peak": memory.peak, "places": memory.places},
        "work": {
            **model,
            "n_running": work.n_running,
            "answer": work.answer,
            "total": work.total,
            "speed": work.speed,
        },
    }


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
