"""One endpoint: its route, its handler, and the types of what goes in and out, which its description is made of."""

import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
from aiohttp import web

from slimoe.server.api_error import ApiError, ErrorBody, ErrorDocument

JSON = "application/json"
_RAISES = re.compile(r"[;.] raises \w+\.?$", re.IGNORECASE)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """`body` and `answer` are the types of JSON documents, None where there is none or it is no JSON.

    With `streams` the answer may also come in pieces, as `stream_type`. `aliases` are further paths of the same
    endpoint, `error_body` writes its errors, as documents of the type `error`. `statuses` are those of errors besides
    the usual ones, `query` says what the fields of a query mean. The first line of the handler's docstring is its
    summary.
    """

    method: str
    path: str
    handler: Handler
    body: Any = None
    answer: Any = None
    streams: bool = False
    aliases: tuple[str, ...] = ()
    error_body: ErrorBody = ApiError.body
    error: Any = ErrorDocument
    content_type: str = JSON
    stream_type: str = "text/event-stream"
    statuses: tuple[int, ...] = ()
    query: Mapping[str, str] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """What the endpoint does, in one line, without what it raises."""
        return _RAISES.sub(".", (self.handler.__doc__ or "").split("\n")[0])

    def routes(self) -> list[web.RouteDef]:
        """The routes for aiohttp's router."""
        return [web.route(self.method, path, self.handler) for path in (self.path, *self.aliases)]


def json_answer(document: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    """The answer that is `document` as JSON."""
    return web.Response(body=msgspec.json.encode(document), status=status, headers=headers, content_type=JSON)
