"""Clients that do not read, and texts that cannot fit: each is told so, and others are served."""

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from slimoe.server.http.connection import ConnectionLimits
from tests.models.live_server import LiveOptions, live_server, until

pytestmark = pytest.mark.asyncio(loop_scope="module")
CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"


async def test_an_answer_that_nobody_reads_is_given_up(model: Path) -> None:
    """The scripted engine writes until it is cancelled."""
    async with live_server(model, LiveOptions(limits=ConnectionLimits(unread_seconds=0.2))) as server:
        host, port = server.url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port), limit=1 << 12)
        body = json.dumps({"messages": [{"role": "user", "content": "forever"}], "stream": True}).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        writer.write(head + body)
        await until(lambda: server.supervisor.n_busy == 1)
        await until(lambda: server.supervisor.n_busy == 0)
        assert server.supervisor.n_restarts == 0
        writer.close()


@pytest.mark.parametrize("path", [CHAT, COMPLETE])
async def test_what_cannot_fit_is_refused_before_it_is_read(model: Path, path: str) -> None:
    text = "the quick brown fox " * 100_000
    prompt: dict[str, Any] = {"messages": [{"role": "user", "content": text}]} if path == CHAT else {"prompt": text}
    async with live_server(model) as server, aiohttp.ClientSession() as session:
        async with session.post(server.url + path, json=prompt) as response:
            error = (await response.json())["error"]
        assert (response.status, error["code"]) == (400, "context_length_exceeded")
        assert "you requested at least " in error["message"]
        assert error["n_prompt_tokens"] > error["n_ctx"]


async def test_tokens_are_told_so_many_at_a_time(model: Path) -> None:
    async with live_server(model) as server, aiohttp.ClientSession() as session:
        for path, body in (("/tokenize", {"content": "fox " * 90_000}), ("/detokenize", {"tokens": [5] * 70_000})):
            async with session.post(server.url + path, json=body) as response:
                assert response.status == 400
                assert "65,536" in (await response.json())["error"]["message"]
        async with session.post(f"{server.url}/tokenize", json={"content": "fox " * 10_000}) as response:
            assert (await response.json())["count"] > 10_000
