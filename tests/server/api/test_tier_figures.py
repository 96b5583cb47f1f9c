"""What an answer tells of the tiers: counted by the engine, by `slimoe run`, in responses and for Prometheus."""

import asyncio
import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from slimoe.offload.engine import Engine
from slimoe.offload.text.generation import Finished, GenerationRequest, TierUse
from slimoe.server.api.metrics import TierCollector
from slimoe.server.api.wire import tiers_info
from slimoe.server.cli import run
from slimoe.server.commands import run as run_command
from tests.models.configs import engine_config
from tests.models.live_server import LiveServer, live_server, until
from tests.models.scripted_engine import EXCHANGE
from tests.models.tier_models import plain_model, uneven_model
from tests.models.tiered import tiered_engine
from tests.models.tiny_gguf import TinyShape, write_tiny_gguf

SHAPE = TinyShape(n_layer=4)
SELECTED_BY_A_STEP = 4 * 3
COUNTERS = ("hits", "pending", "misses")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, sentencepiece_path: Path) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("figures") / "tiny.gguf", sentencepiece_path, shape=SHAPE)


@pytest.fixture
def engine(model: Path) -> Iterator[Engine]:
    engine = tiered_engine(engine_config(model, n_ctx=64, n_batch=16, n_parallel=2, n_threads=1), 0.3)
    yield engine
    engine.close()


def finished(engine: Engine, token: int, n_tokens: int) -> Finished:
    request = GenerationRequest((token,), max_tokens=n_tokens, ignore_eos=True)
    *_, end = engine.generate(request)
    assert isinstance(end, Finished)
    return end


# --- counting ----------------------------------------------------------------------------------------------


def test_each_answer_counts_its_own(engine: Engine) -> None:
    before = engine.counters()
    ends = [finished(engine, 5, 4), finished(engine, 9, 6)]
    for end, n_steps in zip(ends, (4, 6), strict=True):
        counts = end.tiers.counts
        assert sum(counts[name] for name in COUNTERS) == n_steps * SELECTED_BY_A_STEP
        assert end.tiers.hit_share == counts["hits"] / (n_steps * SELECTED_BY_A_STEP)
        assert counts["misses"] > 0
        assert not end.tiers.is_shared
    for name, value in engine.counters().items():
        assert before.get(name, 0) + sum(end.tiers.counts[name] for end in ends) == pytest.approx(value)


def test_company_is_told(engine: Engine) -> None:
    """Two at once share the counts; whoever comes after them does not."""
    for token in (5, 9):
        engine.submit(GenerationRequest((token,), max_tokens=4, ignore_eos=True))
    ends = [outcome.event for _ in range(8) for outcome in engine.step() if isinstance(outcome.event, Finished)]
    assert [end.tiers.is_shared for end in ends] == [True, True]
    engine.submit(GenerationRequest((6,), max_tokens=2, ignore_eos=True))
    ends = [outcome.event for _ in range(4) for outcome in engine.step() if isinstance(outcome.event, Finished)]
    assert [end.tiers.is_shared for end in ends] == [False]


def test_a_resident_model_has_nothing_to_tell(model: Path) -> None:
    engine = Engine.open(engine_config(model, n_ctx=64, n_threads=1))
    assert finished(engine, 5, 3).tiers == TierUse()
    engine.close()
    assert TierUse().hit_share is None


@pytest.mark.parametrize(
    ("counts", "share"),
    [
        ({"hits": 6, "pending": 3, "misses": 1}, 0.6),
        ({"device_hits": 5}, 1.0),
        ({"device_hits": 2, "hits": 1, "misses": 1}, 0.75),
        ({"bytes_read": 7}, None),
    ],
)
def test_the_share_of_selected_experts_in_memory(counts: dict[str, float], share: float | None) -> None:
    assert TierUse(counts).hit_share == share


# --- telling -----------------------------------------------------------------------------------------------


def test_seconds_and_divergences_are_not_rounded() -> None:
    told = tiers_info(TierUse({"hits": 3.0, "wait_seconds": 0.25, "expected_kl": 0.004}))
    assert (told["hits"], told["wait_seconds"], told["expected_kl"]) == (3, 0.25, 0.004)


def test_run_tells_of_the_tiers(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--prompt-ids", "5", "-n", "4", "--ignore-eos", "--json"]
    run_command.carry_out(run_command.command.make_context("run", flags).params, lambda config: engine)
    tiers = json.loads(capsys.readouterr().out)["tiers"]
    assert sum(tiers[name] for name in COUNTERS) == 4 * SELECTED_BY_A_STEP
    assert 0 <= tiers["hit_share"] < 1
    assert tiers["is_shared"] is False


def test_what_is_all_in_memory_has_no_tiers_to_tell_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever its format: the native one is computed in parts as well, but nothing is ever missing."""
    for path in (plain_model(tmp_path), uneven_model(tmp_path)):
        words = ["run", str(path), "--device", "none", "--prompt-ids", "5", "-n", "4", "--ignore-eos", "--json"]
        assert run(words) == 0
        assert "tiers" not in json.loads(capsys.readouterr().out)


def test_a_person_sees_how_many_experts_were_there(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--prompt-ids", "5", "-n", "4", "--ignore-eos"]
    run_command.carry_out(run_command.command.make_context("run", flags).params, lambda config: engine)
    assert re.search(r"wrote 4 at .*/s, \d+ % of experts were in memory\]", capsys.readouterr().err)


@pytest.fixture
def body() -> dict[str, object]:
    return {"messages": [{"role": "user", "content": "hello"}]}


async def test_answers_tell_of_the_tiers(model: Path, body: dict[str, object]) -> None:
    expected: dict[str, object] = {
        "hits": 3.0,
        "misses": 1.0,
        "bytes_read": 100.0,
        "hit_share": 0.75,
        "is_shared": False,
    }
    expected["exchange"] = [msgspec.to_builtins(EXCHANGE)]
    async with live_server(model) as server, aiohttp.ClientSession(server.url) as session:
        async with session.post("/v1/chat/completions", json=body) as response:
            assert (await response.json())["tiers"] == expected
        async with session.post("/v1/completions", json={"prompt": "x", "stream": True}) as response:
            events = [line.removeprefix("data: ") for line in (await response.text()).split("\n\n")]
        chunks = [json.loads(event) for event in events if event.startswith("{")]
        assert chunks[-1]["tiers"] == expected
        assert all("tiers" not in chunk for chunk in chunks[:-1])
        assert await scraped(server) == {("events", "hits"): 6.0, ("events", "misses"): 2.0, ("bytes", "read"): 200.0}


async def scraped(server: LiveServer) -> dict[tuple[str, str], float]:
    async with aiohttp.ClientSession(server.url) as session, session.get("/metrics") as response:
        text = await response.text()
    families = [one for one in text_string_to_metric_families(text) if one.name.startswith("slimoe_tier_")]
    assert {family.type for family in families} <= {"counter"}
    return {
        (family.name.removeprefix("slimoe_tier_"), sample.labels["what"]): sample.value
        for family in families
        for sample in family.samples
    }


async def test_a_resident_engine_exports_no_tiers(model: Path) -> None:
    assert list(TierCollector(dict).collect()) == []


def test_counters_are_sorted_by_their_unit() -> None:
    totals = {"stall_seconds": 0.5, "n_prefetched": 3.0, "bytes_uploaded": 9.0, "low_selected": 2.0}
    samples = [sample for family in TierCollector(lambda: totals).collect() for sample in family.samples]
    assert {(sample.name, sample.labels["what"]): sample.value for sample in samples} == {
        ("slimoe_tier_seconds_total", "stall"): 0.5,
        ("slimoe_tier_events_total", "prefetched"): 3.0,
        ("slimoe_tier_bytes_total", "uploaded"): 9.0,
        ("slimoe_tier_events_total", "low_selected"): 2.0,
    }


async def test_notes_are_told_once(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also when the engine starts again and says the same."""
    async with live_server(model) as server:
        pid = server.supervisor.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await until(lambda: server.supervisor.n_restarts == 1)
        await asyncio.wait_for(server.supervisor.wait_ready(), 30)
    assert capsys.readouterr().err.count("It is scripted.") == 1
