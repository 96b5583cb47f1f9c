"""A response of server-sent events, written piece by piece. Apart: it knows HTTP and nothing of models."""

from collections.abc import Sequence

from aiohttp import web

from slimoe.server.api_error import ApiError

_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    # Keeps a proxy from collecting the pieces.
    "X-Accel-Buffering": "no",
}
_PING = b": ping\n\n"
_DONE = b"data: [DONE]\n\n"


class EventStream:
    """Opens with the first thing written, so that an error before it can still have a status of its own."""

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self._response: web.StreamResponse | None = None

    @property
    def is_open(self) -> bool:
        """Whether headers are out and errors must go in-band."""
        return self._response is not None

    async def send(self, documents: Sequence[bytes]) -> None:
        """Writes JSON documents, one event each, at once; nothing for none."""
        if documents:
            await self._write(b"".join(b"data: " + document + b"\n\n" for document in documents))

    async def ping(self) -> None:
        """Writes a comment, which keeps the connection from looking dead."""
        await self._write(_PING)

    async def fail(self, error: ApiError) -> web.StreamResponse:
        """Ends the stream with an error event."""
        await self.send([error.body()])
        return await self._end()

    async def finish(self) -> web.StreamResponse:
        """Ends the stream as a complete one."""
        await self._write(_DONE)
        return await self._end()

    async def _write(self, data: bytes) -> None:
        if self._response is None:
            response = web.StreamResponse(headers=_HEADERS)
            await response.prepare(self._request)
            self._response = response
        await self._response.write(data)

    async def _end(self) -> web.StreamResponse:
        assert self._response is not None
        await self._response.write_eof()
        return self._response
