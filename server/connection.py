"""From a connection to the application and back: whatever goes wrong on the way is answered in the API's JSON."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from aiohttp import web
from aiohttp.http_exceptions import ContentEncodingError, HttpProcessingError, LineTooLong

from server.api_error import INVALID, ApiError, ErrorInfo, invalid, not_found, server_failed

_log = logging.getLogger(__name__)
Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


class Connection(web.RequestHandler):
    """aiohttp's connection, without its own error pages."""

    __slots__ = ()

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
    """Makes such connections."""

    def __call__(self) -> Connection:
        """The protocol of one accepted connection."""
        return Connection(self, loop=asyncio.get_running_loop())


class ApiRunner(web.AppRunner):
    """aiohttp's runner of an application, with such connections; a client that leaves cancels its handler."""

    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        handler = answering_errors(made.request_handler)
        return ApiServer(handler, request_factory=made.request_factory, handler_cancellation=True)


def answering_errors(handler: Handler) -> Handler:
    """`handler`, with every error answered by JSON that clients parse; a bug of ours leaves a traceback in the log."""

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        try:
            return await handler(request)
        except ApiError as error:
            return error.response()
        except web.HTTPException as error:
            return _from_http(request, error).response()
        except web.RequestPayloadError as error:
            cause = error.__cause__
            return _from_parser(cause if isinstance(cause, HttpProcessingError) else None).response()
        except ConnectionError:
            raise
        except Exception:
            _log.exception("%s %s failed.", request.method, request.path)
            return server_failed().response()

    return handle


def _from_http(request: web.BaseRequest, error: web.HTTPException) -> ApiError:
    if isinstance(error, web.HTTPNotFound):
        return not_found(f"There is no {request.path}. See GET /v1/models and POST /v1/chat/completions.")
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        info = ErrorInfo(f"{request.path} takes {allowed}, not {request.method}.", "not_found_error")
        return ApiError(405, info, headers={"Allow": allowed})
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        assert isinstance(request, web.Request)
        message = f"The body is larger than {request.client_max_size // 2**20} MiB."
        return ApiError(413, ErrorInfo(message, "request_too_large"))
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
