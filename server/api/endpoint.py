"""One endpoint: its route, its handler, and the types of what goes in and out, which its description is made of."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from slimoe.server.api_error import ApiError, ErrorBody

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """`body` and `answer` are the types of JSON documents, None where there is none or it is no JSON.

    With `streams` the answer may also come in pieces. `aliases` are further paths of the same endpoint, `error_body`
    writes its errors. The first line of the handler's docstring is its summary.
    """

    method: str
    path: str
    handler: Handler
    body: Any = None
    answer: Any = None
    streams: bool = False
    aliases: tuple[str, ...] = ()
    error_body: ErrorBody = ApiError.body

    @property
    def summary(self) -> str:
        """What the endpoint does, in one line."""
        return (self.handler.__doc__ or "").split("\n")[0]

    def routes(self) -> list[web.RouteDef]:
        """The routes for aiohttp's router."""
        return [web.route(self.method, path, self.handler) for path in (self.path, *self.aliases)]
