"""Streams on the wire: what stands around their documents, and when they open."""

from collections.abc import Sequence

import aiohttp
import pytest
from aiohttp import web

from slimoe.server.http.event_stream import EVENTS, LINES, NAMED_EVENTS, EventStream, Framing, named_event

DOCUMENTS = [b'{"a":1}', b'{"b":2}']


async def written(framing: Framing, documents: Sequence[bytes], *, fails: bool = False) -> tuple[str, bytes]:
    """The content type and bytes of a stream with a moment of silence before its end."""

    async def handle(request: web.Request) -> web.StreamResponse:
        events = EventStream(request, framing)
        await events.send([])
        assert not events.is_open
        await events.send(documents)
        await events.ping()
        return await (events.fail([b'{"error":"x"}']) if fails else events.finish())

    app = web.Application()
    app.router.add_get("/", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0]
    try:
        async with aiohttp.ClientSession() as session, session.get(f"http://{host}:{port}/") as response:
            return response.headers["Content-Type"], await response.read()
    finally:
        await runner.cleanup()


@pytest.mark.parametrize(
    ("framing", "kind", "text"),
    [
        (EVENTS, "text/event-stream", b'data: {"a":1}\n\ndata: {"b":2}\n\n: ping\n\ndata: [DONE]\n\n'),
        (NAMED_EVENTS, "text/event-stream", b'{"a":1}\n\n{"b":2}\n\n: ping\n\n'),
        (LINES, "application/x-ndjson", b'{"a":1}\n{"b":2}\n'),
    ],
)
async def test_what_stands_around_documents(framing: Framing, kind: str, text: bytes) -> None:
    content_type, data = await written(framing, DOCUMENTS)
    assert (content_type.partition(";")[0], data) == (kind, text)


async def test_an_error_ends_a_stream_without_its_closing() -> None:
    _, data = await written(EVENTS, DOCUMENTS[:1], fails=True)
    assert data == b'data: {"a":1}\n\n: ping\n\ndata: {"error":"x"}\n\n'


def test_an_event_with_a_name() -> None:
    assert named_event("x", b"{}") == b"event: x\ndata: {}"
