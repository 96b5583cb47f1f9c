"""The record of one request: how it was asked, how long it took and what it used; never what it says."""

import asyncio
import re
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal

import msgspec
from aiohttp import web

from slimoe.server.api_error import ApiError
from slimoe.server.messages import Answer, Done, Progress, Step
from slimoe.server.watch.feed import Feed

CLIENT_LEFT = 499
"""The status that is written down where the client left before it had one, as nginx does."""
REQUEST_ID = "X-Request-Id"
_SANE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class RequestEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """`request`: a generation begins or has ended; times are in seconds since the request came.

    `tiers` are the counters of the answer's experts.
    """

    id: str
    what: Literal["begin", "end"]
    model: str
    path: str
    status: int = 0
    finish_reason: str | None = None
    error: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    queue_seconds: float | None = None
    first_token_seconds: float | None = None
    total_seconds: float = 0.0
    tiers: dict[str, float] = {}


@dataclass(slots=True)
class RequestRecord:
    """What is known of a request; `feed` is told when it generates. Of several choices the figures are summed up."""

    id: str = ""
    method: str = ""
    path: str = ""
    feed: Feed | None = None
    began_at: float = field(default_factory=time.monotonic)
    status: int = 0
    model: str | None = None
    error: str | None = None
    n_prompt: int = 0
    n_cached: int = 0
    n_predicted: int = 0
    queue_seconds: float | None = None
    first_seconds: float | None = None
    total_seconds: float = 0.0
    tiers: Counter[str] = field(default_factory=Counter)
    reasons: list[str] = field(default_factory=list)
    under_way: dict[int, Counter[str]] = field(default_factory=dict)
    """What is known of choices that have not ended: tokens read, cached and predicted by the engine's number."""

    def generate(self, model: str) -> None:
        """Notes that `model` is asked for an answer."""
        self.model = model
        if self.feed is not None:
            self.feed.tell("request", self.event("begin"))

    def note(self, answer: Answer) -> None:
        """Takes the figures of an engine's answer."""
        match answer:
            case Progress(id=id, n_done=n_done, n_cached=n_cached):
                self.queue_seconds = self._elapsed if self.queue_seconds is None else self.queue_seconds
                self.under_way[id] = Counter(n_prompt=n_done, n_cached=n_cached)
            case Step(id=id):
                self.first_seconds = self._elapsed if self.first_seconds is None else self.first_seconds
                self.under_way.setdefault(id, Counter())["n_predicted"] += 1
            case Done(id=id, reason=reason, timings=timings, tiers=tiers):
                self.under_way.pop(id, None)
                self._add(timings.prompt_n + timings.cached_n, timings.cached_n, timings.predicted_n)
                self.tiers.update(tiers.counts)
                self.reasons.append(reason)

    def _add(self, n_prompt: int, n_cached: int, n_predicted: int) -> None:
        self.n_prompt += n_prompt
        self.n_cached += n_cached
        self.n_predicted += n_predicted

    def end(self, status: int) -> None:
        """Notes the end of the request; what failed or was left is counted as far as it came."""
        self.status, self.total_seconds = status, self._elapsed
        for counts in self.under_way.values():
            self._add(counts["n_prompt"], counts["n_cached"], counts["n_predicted"])
        self.under_way.clear()
        if self.feed is not None and self.model is not None:
            self.feed.tell("request", self.event("end"))

    def event(self, what: Literal["begin", "end"]) -> RequestEvent:
        """The event for listeners."""
        return RequestEvent(
            self.id,
            what,
            self.model or "",
            self.path,
            self.status,
            self.finish_reason,
            self.error,
            self.n_prompt,
            self.n_cached,
            self.n_predicted,
            self.queue_seconds,
            self.first_seconds,
            self.total_seconds,
            dict(self.tiers),
        )

    @property
    def finish_reason(self) -> str | None:
        """Why the answer ended; of several choices the reasons that differ."""
        return ",".join(sorted(set(self.reasons))) or None

    @property
    def _elapsed(self) -> float:
        return round(time.monotonic() - self.began_at, 4)


_current: ContextVar[RequestRecord] = ContextVar("record")
FEED = web.AppKey("feed", Feed)
LOG: web.AppKey[Callable[[RequestRecord], None]] = web.AppKey("log")
"""Who is given the record of each request in the end."""


def current_record() -> RequestRecord:
    """The record of the request that this task answers; a new one where there is none."""
    record = _current.get(None)
    return RequestRecord() if record is None else record


@web.middleware
async def record_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Keeps a record of the request from its head to its end."""
    given = request.headers.get(REQUEST_ID, "")
    id = given if _SANE_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
    record = RequestRecord(id, request.method, request.path, request.app[FEED])
    # Not reset at the end: the answer to an error is written after it, and the connection's next request sets its own.
    _current.set(record)
    status = 500
    try:
        response = await handler(request)
        status = response.status
        return response
    except ApiError as error:
        status, record.error = error.status, error.info.code or error.info.type
        raise
    except web.HTTPException as error:
        status = error.status
        raise
    except (asyncio.CancelledError, ConnectionError):
        status = CLIENT_LEFT
        raise
    finally:
        record.end(status)
        request.app[LOG](record)


async def add_request_id(request: web.Request, response: web.StreamResponse) -> None:
    """Sends the request's id along with its answer."""
    response.headers[REQUEST_ID] = current_record().id
