"""The engine's process behind the server: waiting for it, leaving it, and its sudden end."""

import asyncio
import itertools
import os
import signal
from pathlib import Path
from typing import Any

import aiohttp
import openai
import psutil
import pytest

from slimoe.server.messages import Observe, Observed
from slimoe.server.process.request_handle import EngineFailure
from slimoe.server.process.watchdog import Patience
from tests.models.live_server import LiveOptions, LiveServer, live_server, until
from tests.models.tiny_gguf import write_tiny_gguf

pytestmark = pytest.mark.asyncio(loop_scope="module")
CHAT = "/v1/chat/completions"


def messages(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


async def answer(server: LiveServer, text: str) -> str:
    async with server.client() as client:
        answer = await client.chat.completions.create(model="", messages=messages(text))
    return answer.choices[0].message.content or ""


@pytest.mark.parametrize("text", ["forever", "slowly"], ids=["writing", "reading"])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_frees_the_engine(server: LiveServer, text: str, stream: bool) -> None:
    """The scripted engine goes on until it is cancelled, so the next answer comes only if it was."""
    body = {"messages": messages(text), "stream": stream}
    async with aiohttp.ClientSession() as session:
        request = asyncio.create_task(session.post(server.url + CHAT, json=body))
        await until(lambda: server.n_underway == 1)
        if stream:
            response = await request
            await response.content.readline()
            response.close()
        else:
            request.cancel()
    await until(lambda: server.supervisor.n_busy == 0)
    assert await answer(server, "next") == " [INST] next [/INST]"
    assert server.supervisor.n_restarts == 0


async def test_a_waiting_client_that_leaves_is_never_served(server: LiveServer) -> None:
    async with server.client() as client:
        first = asyncio.create_task(client.chat.completions.create(model="", messages=messages("slowly")))
        await until(lambda: server.n_underway == 1)
        second = asyncio.create_task(client.chat.completions.create(model="", messages=messages("forever")))
        await until(lambda: server.supervisor.n_busy == 2)
        second.cancel()
        await until(lambda: server.supervisor.n_busy == 1)
        first.cancel()
        await until(lambda: server.supervisor.n_busy == 0)
    assert await answer(server, "next") == " [INST] next [/INST]"


async def test_requests_are_answered_in_turn(server: LiveServer) -> None:
    texts = [f"{n}" for n in range(8)]
    assert await asyncio.gather(*(answer(server, text) for text in texts)) == [f" [INST] {t} [/INST]" for t in texts]
    assert server.supervisor.n_busy == server.supervisor.n_admitted == 0


async def test_a_bug_is_one_requests_problem(server: LiveServer) -> None:
    with pytest.raises(openai.InternalServerError) as failure:
        await answer(server, "bug")
    assert (failure.value.status_code, failure.value.code) == (500, "internal")
    assert await answer(server, "next") == " [INST] next [/INST]"
    assert server.supervisor.n_restarts == 0


async def test_the_queue_has_an_end(model: Path) -> None:
    async with live_server(model, LiveOptions(n_queue=1)) as server, server.client() as client:
        create = client.chat.completions.create
        waiting = [asyncio.create_task(create(model="", messages=messages("slowly"))) for _ in range(2)]
        await until(lambda: server.supervisor.n_busy == 2)
        with pytest.raises(openai.RateLimitError) as refusal:
            await create(model="", messages=messages("x"))
        assert refusal.value.code == "queue_full"
        assert int(refusal.value.response.headers["Retry-After"]) > 0
        for task in waiting:
            task.cancel()
        await until(lambda: server.supervisor.n_admitted == 0)
        assert await answer(server, "next") == " [INST] next [/INST]"


async def test_a_new_engine_hears_what_the_front_holds_by_then(model: Path) -> None:
    """Or else what was enough at the start would not be for a restart: the front grows with requests."""
    held, told = itertools.count(1000), list[str]()
    async with live_server(model, LiveOptions(held_bytes=lambda: next(held))) as server:
        told.append((await server.supervisor.wait_ready()).notes[-1])
        with pytest.raises(openai.InternalServerError):
            await answer(server, "abort")
        await until(lambda: server.supervisor.n_restarts == 1 and server.supervisor.phase == "ready")
        told.append((await server.supervisor.wait_ready()).notes[-1])
    assert told == ["The server holds 1000 B.", "The server holds 1001 B."]


@pytest.mark.parametrize("how", ["abort", "killed"])
async def test_the_engines_end_is_told_and_healed(server: LiveServer, how: str) -> None:
    before, n_restarts = server.supervisor.pid, server.supervisor.n_restarts
    assert before is not None
    text = "abort" if how == "abort" else "slowly"
    failing = asyncio.create_task(answer(server, text))
    await until(lambda: server.n_underway == 1 or failing.done())
    if how == "killed":
        os.kill(before, signal.SIGABRT)
    with pytest.raises(openai.InternalServerError) as failure:
        await failing
    assert (failure.value.status_code, failure.value.code) == (500, "engine_crashed")
    assert "SIGABRT" in failure.value.message
    assert await answer(server, "next") == " [INST] next [/INST]"
    assert server.supervisor.n_restarts == n_restarts + 1
    assert server.supervisor.pid != before
    assert not psutil.pid_exists(before)


async def test_the_engines_end_in_the_middle_of_a_stream(server: LiveServer) -> None:
    async with server.client() as client:
        stream = await client.chat.completions.create(model="", messages=messages("forever"), stream=True)
        first = await anext(aiter(stream))
        assert first.choices[0].delta.role == "assistant"
        # The role is told before the engine begins.
        await until(lambda: server.n_underway == 1)
        assert server.supervisor.pid is not None
        os.kill(server.supervisor.pid, signal.SIGABRT)
        with pytest.raises(openai.APIError, match="SIGABRT") as failure:
            _ = [chunk async for chunk in stream]
        assert failure.value.code == "engine_crashed"
    assert await answer(server, "next") == " [INST] next [/INST]"


async def test_an_engine_that_cannot_come_back(sentencepiece_path: Path, tmp_path: Path) -> None:
    """The server lives on, says so, and is well again when the file is."""
    path = write_tiny_gguf(tmp_path / "tiny.gguf", sentencepiece_path)
    async with live_server(path) as server:
        path.rename(tmp_path / "away.gguf")
        assert server.supervisor.pid is not None
        os.kill(server.supervisor.pid, signal.SIGKILL)
        await until(lambda: server.supervisor.phase == "failed")
        with pytest.raises(openai.InternalServerError, match="there is no such file") as failure:
            await answer(server, "x")
        assert (failure.value.status_code, failure.value.code) == (503, "model_failed")
        assert await health(server) == (500, "error")
        (tmp_path / "away.gguf").rename(path)
        await until(lambda: server.supervisor.phase == "ready")
        assert await answer(server, "next") == " [INST] next [/INST]"


async def health(server: LiveServer) -> tuple[int, str]:
    async with aiohttp.ClientSession() as session, session.get(f"{server.url}/health") as response:
        return response.status, (await response.json())["status"]


async def test_requests_wait_for_the_model(sentencepiece_path: Path, tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "slow.gguf", sentencepiece_path)
    async with live_server(path, LiveOptions(waits=False, ping_seconds=0.01)) as server, server.client() as client:
        await until(lambda: server.supervisor.progress.total_bytes == 7)
        async with aiohttp.ClientSession() as session, session.get(f"{server.url}/v1/health") as response:
            assert response.status == 503
            body = await response.json()
            assert (body["status"], body["done_bytes"], body["total_bytes"]) == ("loading", 3, 7)
        assert [m.id async for m in client.models.list()] == ["tiny"]
        whole = asyncio.create_task(answer(server, "one"))
        body = {"messages": messages("two"), "stream": True}
        async with aiohttp.ClientSession() as session, session.post(server.url + CHAT, json=body) as response:
            assert response.status == 200
            assert await response.content.readline() == b": ping\n"
            (tmp_path / "go").touch()
            rest = (await response.read()).decode()
        assert rest.endswith("data: [DONE]\n\n")
        assert await whole == " [INST] one [/INST]"
        assert await health(server) == (200, "ok")


async def test_no_memory_for_the_model(sentencepiece_path: Path, tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "huge.gguf", sentencepiece_path)
    async with live_server(path, LiveOptions(waits=False)) as server, server.client() as client:
        with pytest.raises(EngineFailure) as failure:
            await server.supervisor.wait_ready()
        assert failure.value.exit_code == 4
        assert await health(server) == (500, "error")
        with pytest.raises(openai.InternalServerError) as refusal:
            await client.chat.completions.create(model="", messages=messages("x"))
        assert (refusal.value.status_code, refusal.value.code) == (503, "insufficient_memory")
        assert isinstance(refusal.value.body, dict)
        assert (refusal.value.body["required_bytes"], refusal.value.body["available_bytes"]) == (9, 5)
        assert refusal.value.response.headers["x-should-retry"] == "false"


async def test_a_model_that_ends_the_process_is_not_tried_again(tmp_path: Path) -> None:
    async with live_server(tmp_path / "broken.gguf", LiveOptions(waits=False)) as server:
        with pytest.raises(EngineFailure, match="SIGABRT") as failure:
            await server.supervisor.wait_ready()
        assert failure.value.exit_code == 1
        assert (server.supervisor.phase, server.supervisor.n_restarts) == ("failed", 0)
        with pytest.raises(openai.InternalServerError) as refusal:
            await answer(server, "x")
        assert refusal.value.code == "engine_crashed"


async def test_the_end_of_the_server_is_told_in_open_streams(model: Path) -> None:
    async with live_server(model) as server, server.client() as client:
        pid = server.supervisor.pid
        assert pid is not None
        stream = await client.chat.completions.create(model="", messages=messages("forever"), stream=True)
        waiting = asyncio.create_task(client.chat.completions.create(model="", messages=messages("x")))
        await until(lambda: server.supervisor.n_busy == 2)
        await server.supervisor.stop()
        with pytest.raises(openai.APIError) as failure:
            _ = [chunk async for chunk in stream]
        assert failure.value.code == "shutting_down"
        with pytest.raises(openai.InternalServerError) as refusal:
            await waiting
        assert refusal.value.status_code == 503
        await until(lambda: not psutil.pid_exists(pid))


BOMB = (
    "{% for m in messages %}{% if m.content == 'bomb' %}{% for a in range(99999) %}{% for b in range(99999) %}"
    "{% endfor %}{% endfor %}{% endif %}[INST] {{ m.content }} [/INST]{% endfor %}"
)


async def test_a_template_that_does_not_end_is_one_requests_problem(sentencepiece_path: Path, tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", sentencepiece_path, BOMB)
    async with live_server(path) as server, server.client() as client:
        bomb = asyncio.create_task(answer(server, "bomb"))
        await until(lambda: server.supervisor.n_busy == 1)
        completion = await client.completions.create(model="", prompt="hello")
        assert completion.choices[0].text == " hello"
        assert await health(server) == (200, "ok")
        assert await answer(server, "next") == " [INST] next [/INST]"
        with pytest.raises(openai.BadRequestError, match="chat template takes more than") as refusal:
            await bomb
        assert refusal.value.param == "messages"
        url = f"{server.url}/apply-template"
        async with aiohttp.ClientSession() as session:
            async with session.post(url, json={"messages": messages("bomb")}) as response:
                assert response.status == 400
                assert "chat template" in (await response.json())["error"]["message"]
            async with session.post(url, json={"messages": messages("x")}) as response:
                assert await response.json() == {"prompt": "[INST] x [/INST]"}
        assert server.supervisor.n_restarts == 0


async def test_a_model_whose_template_cannot_be_used(sentencepiece_path: Path, tmp_path: Path) -> None:
    template = "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}"
    path = write_tiny_gguf(tmp_path / "tiny.gguf", sentencepiece_path, template)
    async with live_server(path) as server, server.client() as client:
        assert server.supervisor.info is not None
        assert "cannot chat, for its chat template cannot be used: it is nested" in server.supervisor.info.notes[-1]
        with pytest.raises(openai.BadRequestError, match="cannot chat"):
            await answer(server, "hello")
        completion = await client.completions.create(model="", prompt="hello")
        assert completion.choices[0].text == " hello"


async def health_reason(server: LiveServer) -> tuple[int, str, str]:
    async with aiohttp.ClientSession() as session, session.get(f"{server.url}/health") as response:
        body = await response.json()
        return response.status, body["status"], body.get("error", {}).get("message", "")


async def test_an_engine_that_was_stopped_is_told_and_replaced(model: Path) -> None:
    async with live_server(model, LiveOptions(patience=Patience(untold=1.5, silent=3.5))) as server:
        pid = server.supervisor.pid
        assert pid is not None
        begun = asyncio.create_task(answer(server, "slowly"))
        await until(lambda: server.n_underway == 1)
        waiting = asyncio.create_task(answer(server, "next"))
        await until(lambda: server.supervisor.n_busy == 2)
        os.kill(pid, signal.SIGSTOP)
        await until(lambda: server.supervisor.trouble is not None)
        status, word, reason = await health_reason(server)
        assert (status, word) == (503, "unavailable")
        assert "has not responded for" in reason
        with pytest.raises(openai.InternalServerError, match="did not respond") as failure:
            await begun
        assert failure.value.code == "engine_stuck"
        assert await waiting == " [INST] next [/INST]"
        assert server.supervisor.n_restarts == 1
        assert await health(server) == (200, "ok")


async def test_an_engine_that_does_not_get_on_is_replaced(model: Path) -> None:
    async with live_server(model, LiveOptions(patience=Patience(stuck=1.5))) as server:
        with pytest.raises(openai.InternalServerError, match="did not get on"):
            await answer(server, "stuck")
        assert await answer(server, "next") == " [INST] next [/INST]"
        assert server.supervisor.n_restarts == 1


async def test_requests_that_had_not_begun_are_sent_again(model: Path) -> None:
    async with live_server(model) as server:
        poison = asyncio.create_task(answer(server, "slowly"))
        await until(lambda: server.n_underway == 1)
        waiting = [asyncio.create_task(answer(server, f"{n}")) for n in range(5)]
        await until(lambda: server.supervisor.n_busy == 6)
        assert server.supervisor.pid is not None
        os.kill(server.supervisor.pid, signal.SIGABRT)
        with pytest.raises(openai.InternalServerError, match="SIGABRT"):
            await poison
        assert await asyncio.gather(*waiting) == [f" [INST] {n} [/INST]" for n in range(5)]
        assert server.supervisor.n_restarts == 1


async def test_the_engine_tells_what_it_does_while_it_does_it(server: LiveServer) -> None:
    """Also in the middle of a step that does not end."""
    async with server.client() as client:
        running = asyncio.create_task(client.chat.completions.create(model="", messages=messages("slowly")))
        await until(lambda: server.n_underway == 1)
        observed = await asyncio.wait_for(server.supervisor.ask(Observe), 5)
        running.cancel()
    assert isinstance(observed, Observed)
    assert observed.snapshot.work.n_running == 1
    assert [layer.tiers for layer in observed.snapshot.experts.layers] == ["h.dx"] * 2
    assert observed.snapshot.memory.places[0].name == "host"
    await until(lambda: server.supervisor.n_busy == 0)
