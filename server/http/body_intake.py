"""The bodies of requests on their way in: how long one may take, and how many bytes of all of them there may be.

Whatever clients send, this process holds a bounded amount: a body counts from its first byte to the end of its
answer. When there is no room, the largest of those that are still arriving is given up, so that small ones get in.
"""

import asyncio
import zlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from aiohttp import hdrs, web

from slimoe.server.api_error import invalid, overloaded, too_large, too_slow
from slimoe.server.options.serving_memory import IN_FLIGHT_BYTES

MAX_BODY = 8 << 20
BODY_SECONDS = 60.0
_SLICE = 256 << 10
_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS


@dataclass(eq=False, slots=True)
class _Arriving:
    """One body; `deadline` ends the wait for the rest of it."""

    deadline: asyncio.Timeout
    data: bytearray = field(default_factory=bytearray)
    n_bytes: int = 0
    is_given_up: bool = False


class BodyIntake:
    """Reads bodies and keeps count of them; one for a server."""

    def __init__(self, most: int = IN_FLIGHT_BYTES, most_of_one: int = MAX_BODY, seconds: float = BODY_SECONDS) -> None:
        self.n_bytes = 0
        self._most, self._most_of_one, self._seconds = most, most_of_one, seconds
        self._arriving: set[_Arriving] = set()

    async def read(self, request: web.Request) -> bytearray:
        """The body, inflated if it is compressed; its bytes count until this task ends. Raises ApiError."""
        if (request.content_length or 0) > self._most_of_one:
            raise too_large(self._most_of_one)
        body = _Arriving(asyncio.timeout(self._seconds))
        task = asyncio.current_task()
        assert task is not None
        task.add_done_callback(lambda task: self._release(body))
        self._arriving.add(body)
        try:
            async with body.deadline:
                async for piece in _pieces(request):
                    self._take(body, piece)
            if body.is_given_up:
                # The rest of it was there before the deadline was noticed.
                raise overloaded()
        except TimeoutError:
            raise (overloaded() if body.is_given_up else too_slow(self._seconds)) from None
        finally:
            self._arriving.discard(body)
        data, body.data = body.data, bytearray()
        return data

    def _take(self, body: _Arriving, piece: bytes) -> None:
        if body.is_given_up:
            raise overloaded()
        body.n_bytes += len(piece)
        self.n_bytes += len(piece)
        if body.n_bytes > self._most_of_one:
            raise too_large(self._most_of_one)
        while self.n_bytes > self._most:
            largest = max(self._arriving, key=lambda other: other.n_bytes)
            largest.is_given_up, largest.data = True, bytearray()
            self._arriving.discard(largest)
            self._release(largest)
            largest.deadline.reschedule(asyncio.get_running_loop().time())
            if largest is body:
                raise overloaded()
        body.data += piece

    def _release(self, body: _Arriving) -> None:
        self.n_bytes -= body.n_bytes
        body.n_bytes = 0


INTAKE = web.AppKey("intake", BodyIntake)


async def _pieces(request: web.Request) -> AsyncIterator[bytes]:
    """The body piece by piece; what was compressed is inflated in pieces of bounded size, others' turns in between."""
    encoding = request.headers.get(hdrs.CONTENT_ENCODING, "identity").lower()
    if encoding == "identity":
        async for chunk in request.content.iter_any():
            yield chunk
        return
    if encoding not in ("gzip", "deflate"):
        raise invalid(f"The body's Content-Encoding is {encoding!r}. Send it as it is, or as gzip or deflate.")
    inflater = zlib.decompressobj(_GZIP_OR_ZLIB)
    try:
        async for chunk in request.content.iter_any():
            while chunk:
                if inflater.eof:
                    # A gzip stream may have several members, one after the other.
                    inflater = zlib.decompressobj(_GZIP_OR_ZLIB)
                yield inflater.decompress(chunk, _SLICE)
                chunk = inflater.unused_data or inflater.unconsumed_tail
                await asyncio.sleep(0)
        while rest := inflater.decompress(b"", _SLICE):
            yield rest
        is_whole = inflater.eof
    except zlib.error:
        is_whole = False
    if not is_whole:
        raise invalid(f"The body is not what its Content-Encoding {encoding!r} says.")
