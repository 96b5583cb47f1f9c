"""From a connection to the application and back: whatever goes wrong on the way is answered in the API's JSON."""

import asyncio
import ipaddress
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from aiohttp import StreamReader, web
from aiohttp.http import RawRequestMessage
from aiohttp.http_exceptions import ContentEncodingError, HttpProcessingError, LineTooLong

from slimoe.server.api_error import (
    INVALID,
    RETRY_SECONDS,
    ApiError,
    ErrorBody,
    ErrorInfo,
    invalid,
    not_found,
    overloaded,
    server_failed,
)

_log = logging.getLogger(__name__)
Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
READ_BYTES = 16 << 10
"""Bytes of a body that lie ready for its reader before the client has to wait."""


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """How many connections there may be, in all and from one address of another machine, and how long one may idle.

    A connection idles while it has sent no whole head of a request since it was opened, or since the last answer; and
    for `unread_seconds` at most while it takes too little of what is written to it.
    """

    n_most: int = 256
    n_most_each: int = 64
    idle_seconds: float = 75.0
    unread_seconds: float = 30.0


USUAL_LIMITS = ConnectionLimits()
ERROR_BODIES = web.AppKey("error_bodies", Mapping[str, ErrorBody])
"""How errors are written, by path; others are written as OpenAI does."""
_OVERLOADED = overloaded().body()
_CROWDED = (
    f"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: {len(_OVERLOADED)}\r\n"
    f"Retry-After: {RETRY_SECONDS}\r\nConnection: close\r\n\r\n"
).encode() + _OVERLOADED
"""What a connection that is one too many is told before it is closed."""


class Connection(web.RequestHandler):
    """aiohttp's connection, without its own error pages; closed at once when there are too many."""

    __slots__ = ("_body", "_limits", "_server", "_unread")

    def __init__(self, server: "ApiServer", limits: ConnectionLimits) -> None:
        # Bodies are inflated where they are counted.
        super().__init__(
            server,
            loop=asyncio.get_running_loop(),
            keepalive_timeout=limits.idle_seconds,
            read_bufsize=READ_BYTES,
            auto_decompress=False,
        )
        self._server, self._limits = server, limits
        self._unread: asyncio.TimerHandle | None = None
        self._body: StreamReader | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio for a connection that was accepted."""
        super().connection_made(transport)
        assert isinstance(transport, asyncio.Transport)
        if not self._server.has_room(transport):
            transport.write(_CROWDED)
            self.force_close()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Called by asyncio."""
        self._forget_unread()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Called by asyncio; a body that goes wrong here fails at once, for aiohttp leaves its reader waiting."""
        super().data_received(data)
        if not self._messages:
            return
        message, body = self._messages[-1]
        if isinstance(message, RawRequestMessage):
            self._body = body
        elif self._body is not None and not self._body.is_eof():
            error = web.RequestPayloadError()
            error.__cause__ = message.exc
            self._body.set_exception(error)

    def pause_writing(self) -> None:
        """Called by asyncio when the client takes too little of what is written to it."""
        super().pause_writing()
        self._unread = self._loop.call_later(self._limits.unread_seconds, self._give_up)

    def resume_writing(self) -> None:
        """Called by asyncio when the client has taken enough."""
        self._forget_unread()
        super().resume_writing()

    def _forget_unread(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _give_up(self) -> None:
        # The handler is cancelled with the connection, which gives the engine's place back.
        if self.transport is not None:
            self.transport.abort()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to what is no HTTP request, or to a failure that nothing else has caught."""
        if request.writer.output_size > 0:
            raise ConnectionError("The answer has begun already.")
        if isinstance(exc, HttpProcessingError):
            response = _from_parser(exc).response()
        else:
            self.log_exception("A connection failed.", exc_info=exc)
            response = server_failed().response()
        response.force_close()
        return response

    def log_exception(self, text: str, *values: object, exc_info: BaseException | None = None) -> None:
        """Logs a bug of ours; that a body cannot be read is the client's affair, and told to it."""
        if not isinstance(exc_info, web.RequestPayloadError):
            _log.error(text, *values, exc_info=exc_info)


class ApiServer(web.Server):
    """Makes a `Connection` for each client and counts them; `made` is the server that aiohttp would use."""

    def __init__(self, made: web.Server, limits: ConnectionLimits, bodies: Mapping[str, ErrorBody]) -> None:
        handler = answering_errors(made.request_handler, bodies)
        super().__init__(handler, request_factory=made.request_factory, handler_cancellation=True)
        self._limits = limits
        self._transports: dict[web.RequestHandler, asyncio.Transport] = {}

    def __call__(self) -> Connection:
        """The protocol of one accepted connection."""
        return Connection(self, self._limits)

    def connection_made(self, handler: web.RequestHandler, transport: asyncio.Transport) -> None:
        """Called by a connection when it is open."""
        super().connection_made(handler, transport)
        self._transports[handler] = transport

    def connection_lost(self, handler: web.RequestHandler, exc: BaseException | None = None) -> None:
        """Called by a connection when it is closed."""
        super().connection_lost(handler, exc)
        self._transports.pop(handler, None)

    def has_room(self, transport: asyncio.Transport) -> bool:
        """Whether this connection, which is counted already, is not one too many."""
        address = _address(transport)
        n_same = sum(_address(other) == address for other in self._transports.values())
        return len(self._transports) <= self._limits.n_most and (
            n_same <= self._limits.n_most_each or address is None or ipaddress.ip_address(address).is_loopback
        )


class ApiRunner(web.AppRunner):
    """aiohttp's runner of an application, on an `ApiServer`; a client that leaves cancels its handler."""

    def __init__(self, app: web.Application, shutdown_timeout: float, limits: ConnectionLimits = USUAL_LIMITS) -> None:
        super().__init__(app, shutdown_timeout=shutdown_timeout)
        self._limits = limits

    async def _make_server(self) -> web.Server:
        return ApiServer(await super()._make_server(), self._limits, self.app.get(ERROR_BODIES, {}))


def _address(transport: asyncio.Transport) -> str | None:
    """The other side's address without its zone; None where there is none."""
    peer = transport.get_extra_info("peername")
    return str(peer[0]).partition("%")[0] if isinstance(peer, tuple) else None


def answering_errors(handler: Handler, bodies: Mapping[str, ErrorBody]) -> Handler:
    """`handler`, with every error answered by JSON that clients parse; a bug of ours leaves a traceback in the log.

    `bodies` write it, by path.
    """

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        try:
            return await handler(request)
        except ApiError as error:
            failure = error
        except web.HTTPException as error:
            failure = _from_http(request, error)
        except web.RequestPayloadError as error:
            cause = error.__cause__
            failure = _from_parser(cause if isinstance(cause, HttpProcessingError) else None)
        except ConnectionError:
            raise
        except Exception:
            _log.exception("%s %s failed.", request.method, request.path)
            failure = server_failed()
        return failure.response(bodies.get(request.path))

    return handle


def _from_http(request: web.BaseRequest, error: web.HTTPException) -> ApiError:
    if isinstance(error, web.HTTPNotFound):
        return not_found(f"There is no {request.path}. See GET /v1/models and POST /v1/chat/completions.")
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        info = ErrorInfo(f"{request.path} takes {allowed}, not {request.method}.", "not_found_error")
        return ApiError(405, info, headers={"Allow": allowed})
    return ApiError(error.status, ErrorInfo(f"{error.reason}.", INVALID))


def _from_parser(error: HttpProcessingError | None) -> ApiError:
    """What to tell of what is no HTTP; the parser's own words may quote it, at length and over several lines."""
    if isinstance(error, ContentEncodingError):
        return invalid("The body is not what its Content-Encoding says. Send it as it is, or as gzip or deflate.")
    if isinstance(error, LineTooLong):
        return invalid("A line of the request's head is too long.")
    if error is None:
        return invalid("The body breaks off or is no HTTP.")
    return invalid(f"This is no HTTP request: {error.message.partition(chr(10))[0].rstrip(' :.')}.")
