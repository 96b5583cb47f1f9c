"""`/props`, `/slots` and the endpoints that are not offered."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from slimoe.offload.plan.engine_config import changed
from slimoe.offload.text.generation import SamplingParams
from slimoe.server.api.request_body import Defaults
from tests.models.live_server import LiveOptions, LiveServer, live_server, until
from tests.server.dialects.conftest import Post

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def get(server: LiveServer, path: str) -> tuple[int, Any]:
    async with aiohttp.ClientSession() as session, session.get(server.url + path) as response:
        return response.status, await response.json()


async def test_properties(server: LiveServer, model: Path) -> None:
    status, props = await get(server, "/props")
    assert status == 200
    assert (props["model_path"], props["model_alias"], props["total_slots"]) == (str(model), "tiny", 1)
    settings = props["default_generation_settings"]
    assert settings["n_ctx"] == props["n_ctx"] == 512
    assert settings["params"]["temperature"] == pytest.approx(0.8)
    assert (settings["params"]["top_k"], settings["params"]["seed"]) == (40, 2**32 - 1)
    assert props["modalities"] == {"vision": False, "audio": False, "video": False}
    assert "[INST]" in props["chat_template"]
    assert (props["bos_token"], props["eos_token"], props["is_sleeping"]) == ("<s>", "</s>", False)


async def test_the_servers_own_defaults(model: Path) -> None:
    """They hold where a request does not say; an explicit field wins."""
    defaults = Defaults(SamplingParams(temperature=0.25, repeat_penalty=1.5, seed=42), 3)
    async with live_server(model, LiveOptions(defaults=defaults)) as server, aiohttp.ClientSession() as session:
        params = (await get(server, "/props"))[1]["default_generation_settings"]["params"]
        assert (params["temperature"], params["seed"], params["n_predict"]) == (0.25, 42, 3)

        async def settings(**fields: Any) -> dict[str, Any]:
            body = {"prompt": "one two three four five", **fields}
            async with session.post(f"{server.url}/completion", json=body) as response:
                found: dict[str, Any] = (await response.json())["generation_settings"]
                return found

        plain, own = await settings(), await settings(temperature=1, max_tokens=7, repetition_penalty=1.1)
        assert (plain["temperature"], plain["repeat_penalty"], plain["n_predict"]) == (0.25, 1.5, 3)
        assert (own["temperature"], own["repeat_penalty"], own["n_predict"], own["seed"]) == (1, 1.1, 7, 42)
        async with session.post(f"{server.url}/v1/completions", json={"prompt": "one two three four five"}) as response:
            assert (await response.json())["usage"]["completion_tokens"] == 3


async def test_slots_tell_what_is_worked_on(model: Path) -> None:
    """Two requests fill two slots, a third waits; what a client gives up is free at once."""
    engine = changed(LiveOptions().engine, {"n_parallel": 2})
    body = {"prompt": "forever and ever", "stream": True}
    async with live_server(model, LiveOptions(engine=engine)) as server, aiohttp.ClientSession() as session:
        idle = {"n_ctx": 512, "speculative": False, "is_processing": False}
        assert await get(server, "/slots") == (200, [{"id": 0, **idle}, {"id": 1, **idle}])
        assert (await get(server, "/slots?fail_on_no_slot=1"))[0] == 200
        async with (
            session.post(f"{server.url}/completion", json=body) as one,
            session.post(f"{server.url}/completion", json=body) as two,
        ):
            first, second = await one.content.readuntil(b"\n\n"), await two.content.readuntil(b"\n\n")
            assert {b'"id_slot":0' in first, b'"id_slot":0' in second} == {True, False}
            _, slots = await get(server, "/slots")
            assert [slot["is_processing"] for slot in slots] == [True, True]
            assert all(slot["next_token"][0]["n_decoded"] > 0 for slot in slots)
            assert all(slot["n_prompt_tokens"] == slot["n_prompt_tokens_processed"] > 0 for slot in slots)
            status, document = await get(server, "/slots?fail_on_no_slot=1")
            assert (status, document["error"]["code"]) == (503, "no_slot")
        await until(lambda: server.supervisor.slots.handles == [None, None])


async def test_slots_can_be_kept_to_oneself(model: Path) -> None:
    async with live_server(model, replace(LiveOptions(), shows_slots=False)) as server:
        status, document = await get(server, "/slots")
        assert (status, document["error"]["type"]) == (501, "not_supported_error")
        assert (await get(server, "/props"))[1]["endpoint_slots"] is False


@pytest.mark.parametrize("path", ["/v1/embeddings", "/embeddings", "/embedding", "/v1/rerank", "/rerank", "/reranking"])
async def test_what_is_not_offered_says_why(post: Post, path: str) -> None:
    status, document = await post(path, {"input": "a"})
    assert (status, document["error"]["code"]) == (501, "not_offered")
    assert "embeddings" in document["error"]["message"] or "rank" in document["error"]["message"]


async def test_paths_without_a_version(server: LiveServer, post: Post) -> None:
    """`/completions` is llama-server's own form there."""
    chat = {"messages": [{"role": "user", "content": "hello"}]}
    assert (await post("/chat/completions", chat))[1]["object"] == "chat.completion"
    assert (await get(server, "/models")) == (await get(server, "/v1/models"))
    status, counted = await post("/chat/completions/input_tokens", chat)
    _, answer = await post("/v1/chat/completions", chat)
    assert (status, counted["input_tokens"]) == (200, answer["usage"]["prompt_tokens"])


async def test_a_crash_frees_the_slots(model: Path) -> None:
    async with live_server(model) as server, aiohttp.ClientSession() as session:
        async with session.post(f"{server.url}/completion", json={"prompt": "abort"}) as response:
            assert response.status == 500
        assert server.supervisor.slots.handles == [None]
        await asyncio.wait_for(server.supervisor.wait_ready(), 30)
