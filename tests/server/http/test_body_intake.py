"""Bodies on their way in: bounded one by one and all together, inflated piece by piece, waited for with an end."""

import asyncio
import gzip
import json
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from slimoe.server.api_error import ApiError
from slimoe.server.http.body_intake import BodyIntake
from slimoe.server.http.connection import USUAL_LIMITS, ApiRunner, ConnectionLimits
from tests.models.live_server import DEADLINE, until

MOST, MOST_OF_ONE = 100_000, 60_000


class Echo:
    """A server whose handler reads the body through an intake, waits until it may go on, and tells the body's size."""

    def __init__(self, intake: BodyIntake) -> None:
        self.intake, self.port = intake, 0
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def handle(self, request: web.Request) -> web.Response:
        data = await self.intake.read(request)
        await self.may_answer.wait()
        return web.Response(text=str(len(data)))

    async def post(self, data: bytes, encoding: str = "identity") -> tuple[int, str]:
        headers = {"Content-Encoding": encoding}
        async with (
            aiohttp.ClientSession(auto_decompress=False) as session,
            session.post(f"http://127.0.0.1:{self.port}/", data=data, headers=headers) as response,
        ):
            return response.status, await response.text()


@asynccontextmanager
async def echo(intake: BodyIntake, limits: ConnectionLimits = USUAL_LIMITS) -> AsyncIterator[Echo]:
    server, app = Echo(intake), web.Application()
    app.router.add_post("/", server.handle)
    runner = ApiRunner(app, 1.0, limits)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    server.port = runner.addresses[0][1]
    try:
        yield server
    finally:
        await runner.cleanup()


async def half_a_body(port: int, n_announced: int, n_sent: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % n_announced + b"x" * n_sent)
    await writer.drain()
    return reader, writer


async def status_of(reader: asyncio.StreamReader) -> int:
    return int((await asyncio.wait_for(reader.readline(), DEADLINE)).split()[1])


async def test_a_body_is_bounded() -> None:
    async with echo(BodyIntake(MOST, MOST_OF_ONE)) as server:
        assert await server.post(b"x" * MOST_OF_ONE) == (200, str(MOST_OF_ONE))
        assert (await server.post(b"x" * (MOST_OF_ONE + 1)))[0] == 413
        reader, writer = await half_a_body(server.port, MOST_OF_ONE + 1, 0)
        with closing(writer):
            assert await status_of(reader) == 413
        await until(lambda: server.intake.n_bytes == 0)


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress])
async def test_a_packed_body_counts_unpacked(pack: object) -> None:
    assert callable(pack)
    encoding = "gzip" if pack is gzip.compress else "deflate"
    async with echo(BodyIntake(MOST, MOST_OF_ONE)) as server:
        assert await server.post(pack(b"x" * MOST_OF_ONE), encoding) == (200, str(MOST_OF_ONE))
        assert (await server.post(pack(b"x" * 50_000_000), encoding))[0] == 413
        whole = pack(bytes(range(256)) * 100)
        for broken in (
            whole[:-1],
            whole[:20],
            b"",
            b"x" * 100,
            whole[:50] + b"x" * 100,
            whole + b"x",
            whole + whole[:-1],
        ):
            assert (await server.post(broken, encoding))[0] == 400
        await until(lambda: server.intake.n_bytes == 0)


async def test_a_packed_body_may_have_several_members() -> None:
    """What begins in the middle of a packet, and what begins with one."""
    members = [gzip.compress(b"x" * n) for n in (30_000, 0, 10_000, 5)]
    async with echo(BodyIntake(MOST, MOST_OF_ONE)) as server:
        assert await server.post(b"".join(members), "gzip") == (200, "40005")
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        with closing(writer):
            n_bytes = sum(map(len, members))
            head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % n_bytes
            writer.write(head + members[0])
            await until(lambda: server.intake.n_bytes == 30_000)
            writer.write(b"".join(members[1:]))
            assert await status_of(reader) == 200


@pytest.mark.parametrize("bad", [b"zz\r\n", b"-1\r\n", b"f" * 20 + b"\r\n", b"3\r\nabcdef\r\n", b"\r\n\r\n"])
async def test_a_body_whose_later_part_is_no_http_is_refused_at_once(bad: bytes) -> None:
    """And nothing more is read from that connection."""
    async with echo(BodyIntake(MOST, MOST_OF_ONE)) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        with closing(writer):
            writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
            await until(lambda: server.intake.n_bytes == 5)
            writer.write(bad)
            answer = await asyncio.wait_for(reader.read(), DEADLINE)
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        assert json.loads(body)["error"]["type"] == "invalid_request_error"
        await until(lambda: server.intake.n_bytes == 0)


async def test_the_largest_that_is_still_arriving_makes_room() -> None:
    async with echo(BodyIntake(MOST, MOST_OF_ONE)) as server:
        small = await half_a_body(server.port, 40_000, 30_000)
        large = await half_a_body(server.port, 60_000, 50_000)
        await until(lambda: server.intake.n_bytes == 80_000)
        assert await server.post(b"x" * 30_000) == (200, "30000")
        assert await status_of(large[0]) == 503
        small[1].write(b"x" * 10_000)
        assert await status_of(small[0]) == 200
        await until(lambda: server.intake.n_bytes == 0)
        for _, writer in (small, large):
            writer.close()


@pytest.mark.parametrize("rest", [(), (b"x" * 1000,)], ids=["end", "piece"])
async def test_what_is_given_up_is_refused_and_takes_no_room(rest: tuple[bytes, ...]) -> None:
    """Its rest is there already, before its reader hears that it is given up."""
    intake, is_large = BodyIntake(MOST, MOST_OF_ONE), asyncio.Event()
    read = asyncio.create_task(intake.read(request_of(b"x" * 55_000, is_large.wait, *rest)))
    await until(lambda: intake.n_bytes == 55_000)

    async def wake() -> None:
        is_large.set()

    assert await asyncio.create_task(intake.read(request_of(wake, b"x" * 50_000))) == b"x" * 50_000
    with pytest.raises(ApiError) as refusal:
        await read
    assert refusal.value.info.code == "overloaded"
    await until(lambda: intake.n_bytes == 0)


def request_of(*parts: bytes | Callable[[], Awaitable[object]]) -> Any:
    """A request whose body arrives in pieces; what is between them is awaited."""

    async def pieces() -> AsyncIterator[bytes]:
        for part in parts:
            if isinstance(part, bytes):
                yield part
            else:
                await part()

    return SimpleNamespace(content_length=None, headers={}, content=SimpleNamespace(iter_any=pieces))


async def test_a_body_counts_until_its_answer_is_there() -> None:
    async with echo(BodyIntake(MOST, MOST_OF_ONE)) as server:
        server.may_answer.clear()
        first = asyncio.create_task(server.post(b"x" * 60_000))
        await until(lambda: server.intake.n_bytes == 60_000)
        assert (await server.post(b"x" * 50_000))[0] == 503
        second = asyncio.create_task(server.post(b"x" * 40_000))
        await until(lambda: server.intake.n_bytes == 100_000)
        server.may_answer.set()
        assert await first == (200, "60000")
        assert await second == (200, "40000")
        await until(lambda: server.intake.n_bytes == 0)


async def test_half_a_body_is_not_waited_for_without_end() -> None:
    async with echo(BodyIntake(MOST, MOST_OF_ONE, seconds=0.05)) as server:
        reader, writer = await half_a_body(server.port, 100, 99)
        with closing(writer):
            assert await status_of(reader) == 408
        await until(lambda: server.intake.n_bytes == 0)


@pytest.mark.parametrize("sent", [b"", b"POST / HTTP/1.1\r\nHost: x\r\nContent-"])
async def test_half_a_head_is_not_waited_for_without_end(sent: bytes) -> None:
    async with echo(BodyIntake(), ConnectionLimits(idle_seconds=0.05)) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        with closing(writer):
            writer.write(sent)
            assert await asyncio.wait_for(reader.read(), DEADLINE) == b""


async def test_connections_are_counted() -> None:
    async with echo(BodyIntake(), ConnectionLimits(n_most=2, n_most_each=1)) as server:
        open_ones = [await half_a_body(server.port, 10, 0) for _ in range(2)]
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        assert await status_of(reader) == 503
        assert b'"code":"overloaded"' in await reader.read()
        writer.close()
        open_ones[0][1].write(b"x" * 10)
        assert await status_of(open_ones[0][0]) == 200
        open_ones[0][1].close()
        await until_answered(server)
        open_ones[1][1].close()


async def until_answered(server: Echo) -> None:
    """Waits until the server has noticed that a place is free."""
    async with asyncio.timeout(DEADLINE):
        while (await asyncio.wait_for(server.post(b"x"), DEADLINE))[0] != 200:
            await asyncio.sleep(0.005)
