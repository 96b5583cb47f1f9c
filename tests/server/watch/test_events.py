"""What `/v1/events` tells: how a model stands, which requests begin and end, and nothing of what they say."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from slimoe.offload.requests.snapshot import Snapshot
from slimoe.server.api import events_api
from slimoe.server.http.connection import ConnectionLimits
from slimoe.server.watch.feed import MOST_BEHIND, MOST_LISTENERS, Listener
from tests.models.live_server import DEADLINE, LiveOptions, LiveServer, live_server, until
from tests.models.tiny_gguf import write_tiny_gguf

SECRET = "hello world"
BODY = {"messages": [{"role": "user", "content": SECRET}]}


class Heard:
    """The events of one stream, in order."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.text = ""

    async def next(self, kind: str) -> dict[str, Any]:
        """The next event of this kind; others are left out."""
        async with asyncio.timeout(DEADLINE):
            while True:
                line = (await self._response.content.readline()).decode()
                assert line, "the stream has ended"
                self.text += line
                if line == f"event: {kind}\n":
                    data = (await self._response.content.readline()).decode()
                    self.text += data
                    found: dict[str, Any] = json.loads(data.removeprefix("data: "))
                    return found

    async def state(self, name: str) -> dict[str, Any]:
        """The next event that tells of this state."""
        while (event := await self.next("state"))["state"] != name:
            pass
        return event


@asynccontextmanager
async def listening(server: LiveServer) -> AsyncIterator[tuple[aiohttp.ClientSession, Heard]]:
    async with aiohttp.ClientSession(server.url) as session, session.get("/v1/events") as response:
        assert response.status == 200
        assert response.content_type == "text/event-stream"
        yield session, Heard(response)


async def test_who_comes_is_told_how_things_stand(model: Path) -> None:
    async with live_server(model) as server, listening(server) as (_, heard):
        state = {"model": "tiny", "state": "ready", "phase": None, "done_bytes": 0, "total_bytes": 0, "problem": None}
        assert await heard.next("state") == state
        assert (await heard.next("memory"))["bytes"]["weights"] > 0


async def test_loading_is_told_with_its_progress(tmp_path: Path, sentencepiece_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "slow.gguf", sentencepiece_path)
    async with live_server(path, LiveOptions(waits=False)) as server, listening(server) as (_, heard):
        assert (await heard.next("state"))["phase"] == "starting"
        event = await heard.next("state")
        assert (event["state"], event["phase"]) == ("loading", "weights")
        assert (event["done_bytes"], event["total_bytes"]) == (3, 7)
        (tmp_path / "go").touch()
        await heard.state("ready")


async def test_a_model_that_does_not_fit_is_told_with_its_problem(tmp_path: Path, sentencepiece_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "huge.gguf", sentencepiece_path)
    async with live_server(path, LiveOptions(waits=False)) as server, listening(server) as (_, heard):
        assert (await heard.state("failed"))["problem"] == "It needs 9 bytes, but 5 are free."


async def test_a_restart_is_told(model: Path) -> None:
    async with live_server(model) as server, listening(server) as (_, heard):
        await heard.state("ready")
        assert server.supervisor.pid is not None
        os.kill(server.supervisor.pid, signal.SIGKILL)
        assert "SIGKILL" in (await heard.state("restarting"))["problem"]
        await heard.state("ready")


@pytest.mark.parametrize("stream", [False, True])
async def test_requests_are_told_without_what_they_say(model: Path, stream: bool) -> None:
    async with live_server(model) as server, listening(server) as (session, heard):
        headers = {"X-Request-Id": "mine-1"}
        async with session.post("/v1/chat/completions", json={**BODY, "stream": stream}, headers=headers) as response:
            assert "world" in await response.text()
            assert response.headers["X-Request-Id"] == "mine-1"
        begin, end = await heard.next("request"), await heard.next("request")
        assert begin["what"] == "begin"
        assert (end["what"], end["id"], end["model"]) == ("end", "mine-1", "tiny")
        assert (end["path"], end["status"], end["finish_reason"]) == ("/v1/chat/completions", 200, "stop")
        assert (end["prompt_tokens"], end["cached_tokens"]) == (end["completion_tokens"] + 2, 1)
        assert 0 < end["queue_seconds"] <= end["first_token_seconds"] <= end["total_seconds"]
        assert end["tiers"] == {"hits": 3.0, "misses": 1.0, "bytes_read": 100.0}
        assert SECRET not in heard.text


async def test_a_client_that_leaves_is_told_of(model: Path) -> None:
    async with live_server(model) as server, listening(server) as (session, heard):
        body = {"prompt": "forever", "stream": True}
        async with session.post("/v1/completions", json=body) as response:
            await response.content.readline()
        await heard.next("request")
        assert (await heard.next("request"))["status"] == 499


async def test_what_fails_is_told_with_its_code(model: Path) -> None:
    async with live_server(model) as server, listening(server) as (session, heard):
        async with session.post("/v1/completions", json={"prompt": "hello " * 5000}) as response:
            assert response.status == 400
        await heard.next("request")
        end = await heard.next("request")
        assert (end["status"], end["error"]) == (400, "context_length_exceeded")


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "é", '"};drop', ".hidden"])
async def test_an_odd_id_is_replaced(model: Path, given: str) -> None:
    async with (
        live_server(model, LiveOptions(waits=False)) as server,
        aiohttp.ClientSession(server.url, headers={"X-Request-Id": given}) as session,
        session.get("/nowhere") as response,
    ):
        assert response.status == 404
        assert response.headers["X-Request-Id"].startswith("req-")


async def test_there_are_only_so_many_listeners(model: Path) -> None:
    options = LiveOptions(limits=ConnectionLimits(n_most=64))
    async with live_server(model, options) as server, aiohttp.ClientSession(server.url) as session:
        streams = [await session.get("/v1/events") for _ in range(MOST_LISTENERS)]
        async with session.get("/v1/events") as response:
            assert response.status == 429
            assert (await response.json())["error"]["code"] == "too_many_listeners"
            assert int(response.headers["Retry-After"]) > 0
        streams.pop().close()

        async def is_let_in() -> bool:
            async with session.get("/v1/events") as response:
                return response.status == 200

        while not await is_let_in():
            await asyncio.sleep(0.01)
        for stream in streams:
            stream.close()


async def test_one_that_does_not_read_is_dropped() -> None:
    listener = Listener()
    for number in range(MOST_BEHIND):
        listener.push(number, b"x")
    listener.push(0, b"an event that takes the place of another")
    assert not listener.is_over
    listener.push(MOST_BEHIND, b"x")
    assert listener.is_over
    assert await listener.next(DEADLINE) == []


async def test_silence_is_filled_with_pings(model: Path) -> None:
    async with live_server(model, LiveOptions(ping_seconds=0.02)) as server, listening(server) as (_, heard):
        await heard.state("ready")
        with pytest.raises(AssertionError, match="ended"):
            await asyncio.gather(heard.next("never"), ending(server, heard))
        assert ": ping\n" in heard.text


async def ending(server: LiveServer, heard: Heard) -> None:
    await until(lambda: heard.text.count(": ping") > 1)
    await server.supervisor.stop()


async def test_experts_places_and_work_are_told_while_they_change(model: Path) -> None:
    async with live_server(model) as server, listening(server) as (session, heard):
        before = await heard.next("experts")
        assert (before["model"], before["layers"][0]["tiers"], before["layers"][0]["uses"]) == (
            "tiny",
            "h.dx",
            [0, 0, 2, 0],
        )
        assert (await heard.next("places"))["places"][0]["name"] == "host"
        assert (await heard.next("work"))["speed"]["bound"] == "cpu"
        async with session.post("/v1/chat/completions", json=BODY) as response:
            assert response.status == 200
        assert (await heard.next("experts"))["layers"][1]["uses"] == [1, 0, 2, 0]


async def test_the_engine_is_asked_only_while_somebody_listens(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with live_server(model, LiveOptions(ping_seconds=0.1)) as server:
        asked = []
        observe = server.supervisor.observe

        async def counted() -> Snapshot | None:
            asked.append(server.supervisor.n_busy)
            return await observe()

        monkeypatch.setattr(server.supervisor, "observe", counted)
        monkeypatch.setattr(events_api, "OBSERVE_SECONDS", 0.005)
        async with aiohttp.ClientSession(server.url) as session:
            async with session.post("/v1/chat/completions", json=BODY):
                pass
            assert asked == [], "nobody listens"
            async with listening(server) as (_, heard):
                await heard.next("work")
                await asyncio.sleep(0.1)
                assert len(asked) == 1, "nothing changes"
                async with session.post("/v1/completions", json={"prompt": "slowly", "stream": True}):
                    await until(lambda: len(asked) > 3)
            await until(lambda: server.supervisor.n_busy == 0)
            await asyncio.sleep(0.05)
            n_asked = len(asked)
            async with session.post("/v1/chat/completions", json=BODY):
                pass
            assert len(asked) == n_asked
