"""What an answer tells besides its text, for clients of llama-server."""

from typing import Any

import aiohttp
import msgspec
import pytest

from tests.models.live_server import LiveServer

MESSAGES = [{"role": "user", "content": "one two three"}]


async def chunks(server: LiveServer, path: str = "/v1/chat/completions", **fields: Any) -> list[dict[str, Any]]:
    """The documents of a streamed answer."""
    body: dict[str, Any] = {"messages": MESSAGES, "stream": True, **fields}
    async with aiohttp.ClientSession() as session, session.post(server.url + path, json=body) as response:
        assert response.status == 200, await response.text()
        lines = (await response.text()).split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [msgspec.json.decode(line.removeprefix("data: ")) for line in lines[:-2]]


@pytest.mark.asyncio(loop_scope="module")
async def test_the_first_delta_holds_the_role_alone(server: LiveServer) -> None:
    first, *rest = await chunks(server)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": None}
    assert all("role" not in chunk["choices"][0]["delta"] for chunk in rest)
    assert rest[-1]["choices"][0]["delta"] == {}


@pytest.mark.asyncio(loop_scope="module")
async def test_progress_is_told_when_asked_for(server: LiveServer) -> None:
    """It begins with what was in the KV cache, and ends with the whole prompt."""
    told = [chunk for chunk in await chunks(server, return_progress=True) if "prompt_progress" in chunk]
    assert [chunk["choices"] for chunk in told] == [[], []]
    begin, end = (chunk["prompt_progress"] for chunk in told)
    assert begin["processed"] == begin["cache"] == end["cache"] == 0
    assert begin["time_ms"] == 0
    assert end["processed"] == end["total"] > 0
    assert all("prompt_progress" not in chunk for chunk in await chunks(server))
    timed = await chunks(server, return_progress=True, timings_per_token=True)
    first, last = (chunk["timings"] for chunk in timed if "prompt_progress" in chunk)
    assert (first["prompt_n"], first["prompt_ms"]) == (0, 0)
    assert last["prompt_n"] > 0


@pytest.mark.asyncio(loop_scope="module")
async def test_timings_are_in_every_chunk_when_asked_for(server: LiveServer) -> None:
    first, *rest = await chunks(server, timings_per_token=True, stream_options={"include_usage": True})
    assert "timings" not in first
    counts = [chunk["timings"]["predicted_n"] for chunk in rest]
    assert counts == sorted(counts)
    assert counts[0] >= 1
    assert counts[-1] == rest[-1]["usage"]["completion_tokens"]
    assert all(isinstance(value, int | float) and value >= 0 for chunk in rest for value in chunk["timings"].values())
    last = rest[-1]["timings"]
    assert last["predicted_per_second"] == pytest.approx((last["predicted_n"] - 1) * 1000 / last["predicted_ms"])
    assert last["prompt_per_second"] == pytest.approx(last["prompt_n"] * 1000 / last["prompt_ms"])
    plain = await chunks(server)
    assert ["timings" in chunk for chunk in plain] == [False] * (len(plain) - 1) + [True]


@pytest.mark.asyncio(loop_scope="module")
async def test_the_prompt_is_told_when_asked_for(server: LiveServer) -> None:
    async with aiohttp.ClientSession() as session:
        url, body = f"{server.url}/v1/chat/completions", {"messages": MESSAGES}
        async with session.post(url, json={**body, "verbose": True}) as response:
            assert "one two three" in (await response.json())["__verbose"]["prompt"]
        async with session.post(url, json=body) as response:
            assert "__verbose" not in await response.json()


@pytest.mark.parametrize("name", ["key", "api_key", "api-key", "API_KEY", "access_token"])
@pytest.mark.asyncio(loop_scope="module")
async def test_a_key_in_the_address_is_refused(server: LiveServer, name: str) -> None:
    async with aiohttp.ClientSession() as session:
        for path in ("/v1/models", "/health", "/nothing"):
            async with session.get(f"{server.url}{path}?{name}=s3cret") as response:
                error = (await response.json())["error"]
                assert (response.status, error["param"]) == (400, name)
                assert "Authorization" in error["message"]
                assert "s3cret" not in error["message"]
