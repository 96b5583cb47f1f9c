"""A response that is written piece by piece, as server-sent events or as lines. Apart: it knows nothing of models."""

from collections.abc import Sequence
from dataclasses import dataclass

from aiohttp import web

_HEADERS = {
    "Cache-Control": "no-cache",
    # Keeps a proxy from collecting the pieces.
    "X-Accel-Buffering": "no",
}


@dataclass(frozen=True, slots=True)
class Framing:
    """What stands around each JSON document of a stream, what is written in silence, and what closes a complete one."""

    content_type: str
    before: bytes
    after: bytes
    ping: bytes = b""
    closing: bytes = b""


_EVENTS = "text/event-stream; charset=utf-8"
EVENTS = Framing(_EVENTS, b"data: ", b"\n\n", b": ping\n\n", b"data: [DONE]\n\n")
UNCLOSED_EVENTS = Framing(_EVENTS, b"data: ", b"\n\n", b": ping\n\n")
"""For streams whose last document says that it is the last."""
NAMED_EVENTS = Framing(_EVENTS, b"", b"\n\n", b": ping\n\n")
"""For documents that `named_event` has given a name."""
LINES = Framing("application/x-ndjson", b"", b"\n")


def named_event(name: str, document: bytes) -> bytes:
    """The lines of an event that has a name."""
    return b"event: " + name.encode() + b"\ndata: " + document


class EventStream:
    """Opens with the first thing written, so that an error before it can still have a status of its own."""

    def __init__(self, request: web.Request, framing: Framing = EVENTS) -> None:
        self._request = request
        self._framing = framing
        self._response: web.StreamResponse | None = None

    @property
    def is_open(self) -> bool:
        """Whether headers are out and errors must go in-band."""
        return self._response is not None

    async def send(self, documents: Sequence[bytes]) -> None:
        """Writes JSON documents, one event each, at once; nothing for none."""
        framing = self._framing
        await self._write(b"".join(framing.before + document + framing.after for document in documents))

    async def ping(self) -> None:
        """Keeps the connection from looking dead, where the framing has a way."""
        await self._write(self._framing.ping)

    async def fail(self, documents: Sequence[bytes]) -> web.StreamResponse:
        """Ends the stream with the documents that tell of an error."""
        await self.send(documents)
        return await self._end()

    async def finish(self) -> web.StreamResponse:
        """Ends the stream as a complete one."""
        await self._write(self._framing.closing)
        return await self._end()

    async def _write(self, data: bytes) -> None:
        if not data:
            return
        if self._response is None:
            response = web.StreamResponse(headers={"Content-Type": self._framing.content_type, **_HEADERS})
            await response.prepare(self._request)
            self._response = response
        await self._response.write(data)

    async def _end(self) -> web.StreamResponse:
        assert self._response is not None
        await self._response.write_eof()
        return self._response
