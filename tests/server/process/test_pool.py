"""Models that are loaded when they are asked for, and put asleep when nobody uses them."""

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from slimoe.server.process.supervisor import Supervisor
from tests.models.live_server import LiveOptions, LiveServer, live_server, until
from tests.models.tiny_gguf import write_tiny_gguf

SOON = 0.05
BODY = {"messages": [{"role": "user", "content": "hello"}]}
CHAT = "/v1/chat/completions"


@asynccontextmanager
async def idling(
    path: Path, seconds: float | None = SOON
) -> AsyncIterator[tuple[LiveServer, aiohttp.ClientSession, Supervisor]]:
    options = LiveOptions(idle_seconds=seconds, ping_seconds=0.01)
    async with live_server(path, options) as server, aiohttp.ClientSession(server.url) as session:
        yield server, session, server.supervisor


async def told(session: aiohttp.ClientSession, path: str) -> tuple[int, dict[str, Any]]:
    async with session.get(path) as response:
        return response.status, await response.json()


async def asked(session: aiohttp.ClientSession, **fields: Any) -> tuple[int, dict[str, Any]]:
    async with session.post(CHAT, json={**BODY, **fields}) as response:
        return response.status, await response.json()


async def totals(session: aiohttp.ClientSession) -> dict[str, float]:
    async with session.get("/metrics") as response:
        families = text_string_to_metric_families(await response.text())
    return {
        sample.name: sample.value for family in families for sample in family.samples if "created" not in sample.name
    }


# --- one model -----------------------------------------------------------------------------------------------


async def test_an_idle_model_goes_and_comes_back(model: Path) -> None:
    async with idling(model) as (_, session, supervisor):
        pid = supervisor.pid
        assert pid is not None
        await until(lambda: supervisor.phase == "asleep" and supervisor.pid is None)
        assert not psutil.pid_exists(pid)
        assert await told(session, "/health") == (200, {"status": "ok", "is_sleeping": True})
        assert (await told(session, "/props"))[1]["is_sleeping"] is True
        assert (await told(session, "/props"))[1]["n_ctx"] > 0
        (card,) = (await told(session, "/v1/models"))[1]["data"]
        assert card["status"] == {"value": "unloaded"}
        assert supervisor.phase == "asleep", "none of these wakes it"
        status, body = await asked(session)
        assert (status, body["choices"][0]["finish_reason"]) == (200, "stop")
        assert supervisor.pid not in (None, pid)
        assert supervisor.n_restarts == 0
        await until(lambda: supervisor.phase == "asleep")


async def test_metrics_stand_still_meanwhile(model: Path) -> None:
    async with idling(model) as (server, session, supervisor):
        await asked(session)
        await until(lambda: not server.backends.pool.loaded)
        await totals(session)  # throughput is that since the last look
        before = await totals(session)
        assert before["slimoe_generation_tokens_total"] > 0
        assert before["slimoe_models_loaded"] == 0
        assert "slimoe_memory_used_bytes" not in before
        assert await totals(session) == before
        assert supervisor.phase == "asleep"


async def test_a_stream_waits_with_pings(tmp_path: Path, sentencepiece_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "slow.gguf", sentencepiece_path)
    (tmp_path / "go").touch()
    async with idling(path) as (_, session, supervisor):
        await until(lambda: supervisor.phase == "asleep")
        (tmp_path / "go").unlink()
        async with session.post(CHAT, json={**BODY, "stream": True}) as response:
            assert await response.content.readline() == b": ping\n"
            await until(lambda: supervisor.phase == "loading")
            (tmp_path / "go").touch()
            assert (await response.read()).endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("path", ["/tokenize", "/apply-template"])
async def test_questions_wake_it(model: Path, path: str) -> None:
    async with idling(model) as (_, session, supervisor):
        await until(lambda: supervisor.phase == "asleep")
        async with session.post(path, json={"content": "hello", **BODY}) as response:
            assert response.status == 200
        await until(lambda: supervisor.phase == "asleep")


async def test_a_busy_model_stays(model: Path) -> None:
    async with idling(model) as (_, session, supervisor):
        async with session.post("/v1/completions", json={"prompt": "slowly", "stream": True}) as response:
            await response.content.readline()
            pid = supervisor.pid
            await asyncio.sleep(4 * SOON)
            assert (supervisor.phase, supervisor.pid) == ("ready", pid)
        await until(lambda: supervisor.phase == "asleep")


@pytest.mark.parametrize("fields", [{"keep_alive": 0}, {"ttl": 0}, {"keep_alive": "0s", "ttl": 60}])
async def test_a_request_can_let_it_go_at_once(model: Path, fields: dict[str, Any]) -> None:
    async with idling(model, None) as (_, session, supervisor):
        assert (await asked(session, **fields))[0] == 200
        await until(lambda: supervisor.phase == "asleep")
        assert (await asked(session))[0] == 200


@pytest.mark.parametrize("fields", [{"keep_alive": -1}, {"keep_alive": "-1"}, {"keep_alive": "1h"}, {"ttl": 60}])
async def test_a_request_can_keep_it(model: Path, fields: dict[str, Any]) -> None:
    async with idling(model) as (_, session, supervisor):
        await asked(session, **fields)
        await asyncio.sleep(4 * SOON)
        assert supervisor.phase == "ready"
        await asked(session)
        await until(lambda: supervisor.phase == "asleep")


@pytest.mark.parametrize("fields", [{"keep_alive": "soon"}, {"keep_alive": "5 m"}, {"keep_alive": []}, {"ttl": "x"}])
async def test_what_is_no_time_is_refused(model: Path, fields: dict[str, Any]) -> None:
    async with idling(model, None) as (_, session, supervisor):
        status, body = await asked(session, **fields)
        assert (status, body["error"]["param"]) == (400, next(iter(fields)))
        assert supervisor.phase == "ready"


async def test_one_that_cannot_be_opened_any_more_is_tried_by_each_request(
    tmp_path: Path, sentencepiece_path: Path
) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", sentencepiece_path)
    async with idling(path) as (_, session, supervisor):
        await until(lambda: supervisor.phase == "asleep")
        path.rename(tmp_path / "away.gguf")
        for _ in range(2):
            status, body = await asked(session)
            assert (status, body["error"]["code"]) == (503, "model_failed")
            assert "no such file" in body["error"]["message"]
            assert supervisor.phase == "asleep"
        (tmp_path / "away.gguf").rename(path)
        assert (await asked(session))[0] == 200


async def test_an_engine_that_dies_while_it_wakes_is_started_again(tmp_path: Path, sentencepiece_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "slow.gguf", sentencepiece_path)
    (tmp_path / "go").touch()
    async with idling(path) as (_, session, supervisor):
        await until(lambda: supervisor.phase == "asleep")
        (tmp_path / "go").unlink()
        answer = asyncio.create_task(asked(session))
        await until(lambda: supervisor.progress.total_bytes == 7)
        assert supervisor.pid is not None
        os.kill(supervisor.pid, signal.SIGKILL)
        (tmp_path / "go").touch()
        assert (await answer)[0] == 200
        assert supervisor.n_restarts == 1


@pytest.mark.parametrize("is_waking", [False, True])
async def test_the_server_ends_while_it_sleeps_or_wakes(
    tmp_path: Path, sentencepiece_path: Path, is_waking: bool
) -> None:
    path = write_tiny_gguf(tmp_path / "slow.gguf", sentencepiece_path)
    (tmp_path / "go").touch()
    async with idling(path) as (server, session, supervisor):
        await until(lambda: supervisor.phase == "asleep")
        (tmp_path / "go").unlink()
        answer = asyncio.create_task(asked(session)) if is_waking else None
        if is_waking:
            await until(lambda: supervisor.pid is not None)
        pid = supervisor.pid
        async with asyncio.timeout(5):
            await server.backends.pool.stop()
        if answer is not None:
            assert pid is not None
            assert ((await answer)[1]["error"]["code"], psutil.pid_exists(pid)) == ("shutting_down", False)


# --- several -------------------------------------------------------------------------------------------------


@pytest.fixture
def others(model: Path, tmp_path: Path) -> dict[str, Path]:
    return {name: Path(shutil.copy(model, tmp_path / f"{name}.gguf")) for name in ("second", "third")}


@asynccontextmanager
async def several(
    model: Path, others: dict[str, Path], n_most: int = 1
) -> AsyncIterator[tuple[dict[str, Supervisor], aiohttp.ClientSession]]:
    options = LiveOptions(n_most=n_most, ping_seconds=0.01)
    async with live_server(model, options, others) as server, aiohttp.ClientSession(server.url) as session:
        yield {backend.model.id: backend.supervisor for backend in server.backends.all()}, session


def awake(supervisors: dict[str, Supervisor]) -> list[str]:
    return [name for name, supervisor in supervisors.items() if supervisor.phase == "ready"]


async def test_the_field_model_switches(model: Path, others: dict[str, Path]) -> None:
    async with several(model, others) as (supervisors, session):
        assert awake(supervisors) == ["tiny"]
        for name in ("second", "second", "tiny", "third"):
            status, body = await asked(session, model=name)
            assert (status, body["model"]) == (200, name)
            assert awake(supervisors) == [name]
        assert (await asked(session, model=""))[1]["model"] == "third", "the one that is loaded"
        assert (await asked(session))[1]["model"] == "third"
        cards = (await told(session, "/v1/models"))[1]["data"]
        assert {card["id"]: card["status"]["value"] for card in cards} == {
            "tiny": "unloaded",
            "second": "unloaded",
            "third": "loaded",
        }


async def test_unknown_models_are_named(model: Path, others: dict[str, Path]) -> None:
    async with several(model, others) as (_, session):
        status, body = await asked(session, model="fourth")
        assert (status, body["error"]["code"], body["error"]["param"]) == (404, "model_not_found", "model")
        assert "'tiny', 'second', 'third'" in body["error"]["message"]
        assert (await told(session, "/v1/models/fourth"))[0] == 404
        assert (await told(session, "/v1/models/second"))[1]["id"] == "second"


async def test_several_stay_and_the_one_used_longest_ago_goes(model: Path, others: dict[str, Path]) -> None:
    async with several(model, others, n_most=2) as (supervisors, session):
        await asked(session, model="second")
        await asked(session, model="tiny")
        assert awake(supervisors) == ["tiny", "second"]
        await asked(session, model="third")
        assert awake(supervisors) == ["tiny", "third"]


async def test_a_busy_model_is_waited_for_and_others_wait_behind(model: Path, others: dict[str, Path]) -> None:
    """Those who come later for the busy model come after the one that waits for its place: nobody waits for ever."""
    async with several(model, others) as (supervisors, session):
        order: list[str] = []

        async def ask(name: str) -> None:
            assert (await asked(session, model=name))[1]["model"] == name
            order.append(name)

        body = {"prompt": "slowly", "stream": True, "model": "tiny"}
        async with session.post("/v1/completions", json=body) as response:
            await response.content.readline()
            waiting = []
            for name in ("second", "tiny", "second"):
                waiting.append(asyncio.create_task(ask(name)))
                await until(lambda: sum(one.n_admitted for one in supervisors.values()) == len(waiting) + 1)
            await asyncio.sleep(4 * SOON)
            assert (order, awake(supervisors)) == ([], ["tiny"])
        await asyncio.gather(*waiting)
        assert order == ["second", "tiny", "second"]


async def test_who_leaves_the_line_costs_nothing(model: Path, others: dict[str, Path]) -> None:
    async with several(model, others) as (supervisors, session):
        pid = supervisors["tiny"].pid
        async with session.post("/v1/completions", json={"prompt": "slowly", "stream": True}) as response:
            await response.content.readline()
            leaving = asyncio.create_task(asked(session, model="second"))
            await until(lambda: supervisors["second"].n_admitted == 1)
            leaving.cancel()
            await until(lambda: supervisors["second"].n_admitted == 0)
        assert (await asked(session, model="tiny"))[0] == 200
        assert supervisors["tiny"].pid == pid
        assert supervisors["second"].phase == "asleep"


async def test_one_that_is_broken_is_only_its_own_problem(model: Path, tmp_path: Path, others: dict[str, Path]) -> None:
    huge = Path(shutil.copy(model, tmp_path / "huge.gguf"))
    broken = Path(shutil.copy(model, tmp_path / "broken.gguf"))
    async with several(model, {**others, "huge": huge, "broken": broken}) as (supervisors, session):
        for name, code in (
            ("huge", "insufficient_memory"),
            ("broken", "engine_crashed"),
            ("huge", "insufficient_memory"),
        ):
            assert (await asked(session, model=name))[1]["error"]["code"] == code
            assert supervisors[name].phase == "asleep"
            assert (await told(session, "/health"))[0] == 200
        assert (await asked(session, model="second"))[0] == 200


async def test_many_at_once_for_many_models(model: Path, others: dict[str, Path]) -> None:
    async with several(model, others) as (supervisors, session):
        names = ["tiny", "second", "third"] * 4
        answers = await asyncio.gather(*(asked(session, model=name) for name in names))
        assert [body["model"] for _, body in answers] == names
        assert len(awake(supervisors)) == 1
        assert all(one.n_busy == one.n_admitted == 0 for one in supervisors.values())


async def test_as_many_are_loaded_as_the_budget_holds(model: Path, others: dict[str, Path]) -> None:
    options = LiveOptions(n_most=3, needs={"tiny": 40, "second": 50, "third": 60}, total_bytes=100)
    async with live_server(model, options, others) as server, aiohttp.ClientSession(server.url) as session:
        supervisors = {backend.model.id: backend.supervisor for backend in server.backends.all()}
        await asked(session, model="second")
        assert awake(supervisors) == ["tiny", "second"]
        await asked(session, model="third")
        assert awake(supervisors) == ["third"]
        await asked(session, model="second")
        assert awake(supervisors) == ["second"]
        await asked(session, model="tiny")
        assert awake(supervisors) == ["tiny", "second"]


async def test_loading_and_unloading_by_hand(model: Path, others: dict[str, Path]) -> None:
    async with several(model, others) as (supervisors, session):
        async with session.post("/models/load", json={"model": "second"}) as response:
            assert (response.status, await response.json()) == (200, {"success": True})
        await until(lambda: awake(supervisors) == ["second"])
        async with session.post("/v1/completions", json={"prompt": "slowly", "stream": True}) as stream:
            await stream.content.readline()
            async with session.post("/models/unload", json={"model": "second"}) as response:
                assert (response.status, (await response.json())["error"]["code"]) == (409, "model_busy")
        await until(lambda: supervisors["second"].n_admitted == 0)
        async with session.post("/models/unload", json={"model": "second"}) as response:
            assert (response.status, supervisors["second"].phase) == (200, "asleep")
        async with session.post("/models/load", json={"model": "nothing"}) as response:
            assert response.status == 404
