"""What a client is told when its request cannot be carried out: a status and the JSON that OpenAI's clients parse."""

from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from aiohttp import web

from slimoe.offload.printable import printable
from slimoe.server.messages import Failure

INVALID, UNSUPPORTED, SERVER = "invalid_request_error", "not_supported_error", "server_error"
OVERFLOW = "exceed_context_size_error"
"""llama-server's own type, which its clients look at."""
RETRY_SECONDS = 2
MAX_MESSAGE = 1000
"""Characters; a message may quote what a client sent."""


class ErrorInfo(msgspec.Struct, frozen=True):
    """The `error` object; `code` is a string that programs compare, `param` the field at fault."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorDocument(msgspec.Struct, frozen=True):
    """What a client is told of an error."""

    error: ErrorInfo


class ApiError(Exception):
    """Ends a request with `status` and `info`; `extra` are further fields of the `error` object."""

    def __init__(
        self,
        status: int,
        info: ErrorInfo,
        *,
        extra: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.status = status
        self.info = info
        self.extra = dict(extra or {})
        self.headers = dict(headers or {})
        super().__init__(info.message)

    def body(self) -> bytes:
        """The JSON document."""
        error = {**msgspec.structs.asdict(self.info), "message": self.message, **self.extra}
        return msgspec.json.encode({"error": error})

    @property
    def message(self) -> str:
        """The message as one line of bounded length."""
        message = self.info.message
        return printable(message if len(message) <= MAX_MESSAGE else f"{message[:MAX_MESSAGE]}...")

    def response(self, write: "ErrorBody | None" = None) -> web.Response:
        """The whole answer, with the document that `write` makes of it."""
        body = self.body() if write is None else write(self)
        return web.Response(status=self.status, body=body, content_type="application/json", headers=self.headers)


ErrorBody = Callable[[ApiError], bytes]
"""Writes an error as a dialect has it."""


def invalid(message: str, param: str | None = None) -> ApiError:
    """400: a field is wrong."""
    return ApiError(400, ErrorInfo(message, INVALID, param))


def unsupported(message: str, param: str | None = None) -> ApiError:
    """400: a field asks for something this server does not do."""
    return ApiError(400, ErrorInfo(message, UNSUPPORTED, param, "unsupported_value"))


def server_failed() -> ApiError:
    """500: a bug of ours, which the log tells of."""
    return ApiError(500, ErrorInfo("The server failed. Its log says more.", SERVER, None, "internal"))


def not_found(message: str, code: str | None = None) -> ApiError:
    """404: no such route or model."""
    kind = INVALID if code else "not_found_error"
    return ApiError(404, ErrorInfo(message, kind, None if code is None else "model", code))


def too_large(most: int) -> ApiError:
    """413: the body has more bytes than `most`."""
    return ApiError(413, ErrorInfo(f"The body is larger than {most / 2**20:g} MiB.", "request_too_large"))


def too_slow(seconds: float) -> ApiError:
    """408: the body has not arrived in time."""
    return ApiError(408, ErrorInfo(f"The body did not arrive within {seconds:g} seconds.", INVALID, None, "timeout"))


def overloaded() -> ApiError:
    """503: there is no room for the request beside those in progress."""
    message = "The requests in progress leave no room for this one. Try again in a moment."
    return ApiError(503, ErrorInfo(message, "unavailable_error", None, "overloaded"), headers=_retry())


def queue_full(n_waiting: int) -> ApiError:
    """429: too many requests wait already."""
    message = f"{n_waiting} requests are waiting already. Try again in a moment."
    return ApiError(429, ErrorInfo(message, "rate_limit_error", None, "queue_full"), headers=_retry())


def from_failure(failure: Failure, prompt_param: str = "messages") -> ApiError:
    """The answer to a client whose request the engine's process could not carry out."""
    message, kind = failure.message, failure.kind
    if kind == "context_overflow":
        return _overflow(failure, prompt_param)
    if kind in ("invalid_request", "template"):
        return invalid(message, prompt_param if failure.param == "prompt" else failure.param)
    if kind == "does_not_fit":
        sizes = {"required_bytes": failure.required_bytes, "available_bytes": failure.available_bytes}
        info = ErrorInfo(message, SERVER, None, "insufficient_memory")
        # The same request would end the same way, and each try loads gigabytes.
        return ApiError(503, info, extra=sizes, headers={"X-Should-Retry": "false"})
    if kind == "model":
        return ApiError(
            503, ErrorInfo(message, "unavailable_error", None, "model_failed"), headers={"X-Should-Retry": "false"}
        )
    if kind == "device":
        return ApiError(503, ErrorInfo(message, "unavailable_error", None, "device_failed"), headers=_retry())
    if kind == "busy":
        return ApiError(503, ErrorInfo(message, "unavailable_error", None, "overloaded"), headers=_retry())
    if kind == "shutting_down":
        return ApiError(503, ErrorInfo(message, "unavailable_error", None, "shutting_down"), headers=_retry())
    return ApiError(500, ErrorInfo(message, SERVER, None, kind))


def _overflow(failure: Failure, param: str) -> ApiError:
    """Clients recognise an overflow by its code or by phrases in its message, so it carries all of them."""
    asked = failure.n_prompt + failure.n_completion
    least = "at least " if failure.is_at_least else ""
    message = (
        f"This model's maximum context length is {failure.n_ctx} tokens. However, you requested {least}{asked} tokens "
        f"({least}{failure.n_prompt} in the {param}, {failure.n_completion} in the completion), which exceeds the "
        "available context size (context_length_exceeded). Shorten the prompt, or start the server with a larger "
        "--ctx, as far as the model goes."
    )
    counts = {"n_prompt_tokens": failure.n_prompt, "n_ctx": failure.n_ctx}
    return ApiError(400, ErrorInfo(message, OVERFLOW, param, "context_length_exceeded"), extra=counts)


def _retry() -> dict[str, str]:
    return {"Retry-After": str(RETRY_SECONDS)}
