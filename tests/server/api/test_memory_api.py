"""`/v1/memory`: what it tells, other limits while answers go on, and what is refused."""

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from slimoe.server.http.access import AccessRules
from slimoe.server.options.engine_options import DEMO
from tests.models.live_server import LiveOptions, LiveServer, live_server, serving, until

pytestmark = pytest.mark.asyncio(loop_scope="module")
MEMORY = "/v1/memory"


async def ask(server: LiveServer, body: Any = None, **options: Any) -> tuple[int, Any]:
    async with aiohttp.ClientSession() as session:
        asked = session.get(server.url + MEMORY) if body is None else session.post(server.url + MEMORY, json=body)
        async with asked as response:
            return response.status, await response.json()


async def test_limits_and_what_is_held(server: LiveServer) -> None:
    status, told = await ask(server)
    assert status == 200
    assert (told["model"], told["ram"], told["vram"]) == ("tiny", "auto", [])
    assert told["experts"] == [{"layer": layer, "device": 1, "host": 1, "disk": 1} for layer in range(2)]
    assert told["places"][0]["by_use"]["kv"] == 10
    assert (told["resident"], told["peak"], told["hit_share"]) == (100, 200, 0.75)
    assert "change" not in told


async def test_other_limits_hold_and_stay_after_a_crash(model: Path) -> None:
    async with live_server(model) as server:
        status, told = await ask(server, {"ram": "8GiB"})
        assert (status, told["ram"]) == (200, "8GiB")
        assert told["change"] == {"seconds": 0.25, "loaded_bytes": 100, "is_kept": False}
        assert (await ask(server, {"ram": 5 << 20}))[1]["ram"] == str(5 << 20)
        assert server.supervisor.pid is not None
        os.kill(server.supervisor.pid, signal.SIGKILL)
        await until(lambda: server.supervisor.n_restarts == 1)
        await server.supervisor.wait_ready()
        assert (await ask(server))[1]["ram"] == str(5 << 20)


async def test_an_answer_in_progress_goes_on(server: LiveServer) -> None:
    async with server.client() as client:
        stream = await client.chat.completions.create(
            model="", messages=[{"role": "user", "content": "forever"}], stream=True
        )
        texts = [await anext(stream) for _ in range(5)]
        status, _ = await ask(server, {"ram": "50%"})
        texts += [await anext(stream) for _ in range(50)]
        await stream.close()
    assert status == 200
    assert len(texts) == 55
    await until(lambda: server.supervisor.n_busy == 0)


async def test_two_at_once_are_carried_out_in_turn(server: LiveServer) -> None:
    """Both are told what held after theirs."""
    first, second = await asyncio.gather(ask(server, {"ram": "slow"}), ask(server, {"ram": "same"}))
    assert [first[0], second[0]] == [200, 200]
    assert [first[1]["ram"], second[1]["ram"]] == ["slow", "same"]
    assert second[1]["change"]["is_kept"]
    assert (await ask(server))[1]["ram"] == "same"


async def test_a_client_that_leaves_has_changed_them_all_the_same(model: Path) -> None:
    async with live_server(model) as server:
        asked = asyncio.create_task(ask(server, {"ram": "slow"}))
        await until(lambda: server.supervisor.n_busy == 1)
        asked.cancel()
        await until(lambda: server.supervisor.n_busy == 0)
        # The next in turn finds it done.
        assert (await ask(server, {"vram": "1GiB"}))[1]["ram"] == "slow"
        assert server.supervisor.pid is not None
        os.kill(server.supervisor.pid, signal.SIGKILL)
        await until(lambda: server.supervisor.n_restarts == 1)
        await server.supervisor.wait_ready()
        assert (await ask(server))[1]["ram"] == "slow"


async def test_limits_that_models_share_stay(model: Path) -> None:
    async with live_server(model, others={"other": model}) as server:
        status, told = await ask(server, {"ram": "2GiB"})
        assert (status, told["error"]["code"]) == (400, "unsupported_value")
        assert (await ask(server))[1]["ram"] == "auto"


async def test_asking_does_not_wake_an_engine_that_is_unloaded(model: Path) -> None:
    async with live_server(model) as server:
        await ask(server, {"ram": "2GiB"})
        await server.supervisor.sleep()
        status, told = await ask(server)
        assert (status, told["ram"], told["is_loaded"], told["places"]) == (200, "2GiB", False, [])
        assert server.supervisor.phase == "asleep"
        status, told = await ask(server, {"vram": "1GiB"})
        assert (status, told["ram"], told["is_loaded"]) == (200, "2GiB", True)


async def test_too_little_is_refused_with_the_least_that_would_do(server: LiveServer) -> None:
    before = await ask(server)
    status, told = await ask(server, {"ram": "1MiB"})
    error = told["error"]
    assert (status, error["code"], error["required_bytes"], error["available_bytes"]) == (
        503,
        "insufficient_memory",
        9,
        5,
    )
    assert "Raise --ram to 9MiB" in error["message"]
    assert await ask(server) == before


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "ram"),
        ({"ram": None}, "ram"),
        ({"ram": "much"}, "ram"),
        ({"ram": ""}, "ram"),
        ({"ram": -1}, "ram"),
        ({"ram": 1.5}, "ram"),
        ({"ram": True}, "ram"),
        ({"ram": "9" * 41}, "ram"),
        ({"vram": []}, "vram"),
        ({"vram": ["1GiB", None]}, "vram[1]"),
        ({"vram": [True]}, "vram[0]"),
        ({"vram": [-1]}, "vram[0]"),
        ({"vram": ["1GiB"] * 65}, "vram"),
        ({"ram": "1GiB", "cache": 3}, None),
        ([], None),
        ("8GiB", None),
    ],
)
async def test_what_makes_no_sense_is_refused(server: LiveServer, body: Any, param: str | None) -> None:
    before = await ask(server)
    status, told = await ask(server, body)
    assert (status, told["error"]["param"]) == (400, param), told
    assert await ask(server) == before


@pytest.mark.parametrize("ram", ["lost", "abort"])
async def test_an_engine_that_ends_over_it_is_started_again_with_the_old_limits(model: Path, ram: str) -> None:
    """And is not asked again, which would end the next one too."""
    async with live_server(model) as server:
        await ask(server, {"ram": "2GiB"})
        status, told = await ask(server, {"ram": ram})
        assert (status, told["error"]["code"]) == (500, "engine_crashed")
        await server.supervisor.wait_ready()
        assert (await ask(server))[1]["ram"] == "2GiB"
        assert server.supervisor.n_restarts == 1


async def test_a_key_is_asked_for_here_too(model: Path) -> None:
    async with live_server(model, LiveOptions(rules=AccessRules(key="secret"))) as server:
        assert (await ask(server))[0] == 401
        assert (await ask(server, {"ram": "1GiB"}))[0] == 401


async def test_a_page_of_another_origin_is_refused(server: LiveServer) -> None:
    data = json.dumps({"ram": "1GiB"})
    async with (
        aiohttp.ClientSession(headers={"Origin": "https://evil.example"}) as session,
        session.post(server.url + MEMORY, data=data) as response,
    ):
        assert response.status == 403
    assert (await ask(server))[1]["ram"] != "1GiB"


async def test_the_demo_is_served_in_more_and_in_less(tmp_path: Path) -> None:
    """A real engine, in the middle of a greedy answer, whose text is that of a server that nobody re-budgets."""
    body = {"prompt": "The river", "max_tokens": 60, "temperature": 0, "ignore_eos": True}
    with serving(DEMO, "--ram", "400MiB", "--ctx", "512") as (_, url):
        async with aiohttp.ClientSession() as session:
            async with session.post(f"{url}/v1/completions", json=body) as response:
                expected = (await response.json())["choices"][0]["text"]
            async with session.post(url + MEMORY, json={"ram": "1MiB"}) as response:
                refused = await response.json()
            least = refused["error"]["required_bytes"]
            text, sizes = "", [least, least + (4 << 20), "400MiB"]
            async with session.post(f"{url}/v1/completions", json={**body, "stream": True}) as response:
                async for line in response.content:
                    if line.startswith(b"data: {"):
                        text += json.loads(line[6:])["choices"][0]["text"]
                        if sizes:
                            size = sizes.pop(0)
                            async with session.post(url + MEMORY, json={"ram": size}) as changed:
                                assert changed.status == 200, await changed.text()
                                told = await changed.json()
                                assert told["ram"] == str(size)
                                assert told["places"][0]["budget"] <= 400 << 20
    assert text == expected
