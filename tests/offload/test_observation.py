"""What an engine tells of itself while it works: the map of experts, memory, and where the time went."""

import threading
from collections import Counter
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from slimoe.offload.cache.router_trace import read_trace
from slimoe.offload.engine import Engine
from slimoe.offload.plan.engine_config import EngineConfig
from slimoe.offload.requests.snapshot import Snapshot
from slimoe.offload.text.generation import GenerationRequest, SamplingParams
from tests.models.configs import engine_config, reconfigured
from tests.models.tier_models import mixed_model, plain_model, uneven_model
from tests.models.tiered import resident_engine, tiered_engine

PROMPT, N_ANSWER = tuple(range(3, 15)), 6


def config(path: Path) -> EngineConfig:
    return engine_config(path, n_ctx=256, n_batch=32, n_threads=1)


def answer(engine: Engine, prompt: tuple[int, ...] = PROMPT) -> None:
    request = GenerationRequest(prompt, N_ANSWER, SamplingParams(temperature=0), ignore_eos=True)
    engine.submit(request)
    while not engine.is_idle:
        engine.step()


def uses(snapshot: Snapshot) -> list[tuple[int, ...] | None]:
    return [layer.uses for layer in snapshot.experts.layers]


@pytest.mark.parametrize("make", [plain_model, mixed_model, uneven_model])
def test_the_map_counts_what_a_trace_records(make: object, tmp_path: Path) -> None:
    assert callable(make)
    traced = reconfigured(config(make(tmp_path)), trace=tmp_path / "trace")
    with closing(tiered_engine(traced, 0.3)) as engine:
        answer(engine)
        snapshot = engine.snapshot()
        layers = engine.plan.layers
    counts: dict[int, Counter[int]] = {}
    for step in read_trace(tmp_path / "trace").steps:
        for part in step.layers:
            chosen = (int(expert) for expert in part.selected.ravel() if expert >= 0)
            counts.setdefault(part.layer, Counter()).update(chosen)
    for shown in snapshot.experts.layers:
        layer = layers[shown.layer]
        assert layer is not None
        assert shown.uses is not None
        by_expert: Counter[int] = Counter()
        for row, expert in enumerate(layer.target):
            by_expert[expert] += shown.uses[row]
        assert {e: n for e, n in by_expert.items() if e >= 0 and n} == dict(counts[shown.layer])
        assert sum(shown.uses) % layer.n_expert_used == 0


def test_a_whole_model_counts_the_same_tokens_of_answers(tmp_path: Path) -> None:
    """Prompts of one token, so that both count the same: a whole model does not count batches, as the first one."""
    path = plain_model(tmp_path)
    told = []
    for engine in (resident_engine(config(path)), tiered_engine(config(path), 0.3)):
        with closing(engine):
            answer(engine)
            before = engine.snapshot()
            answer(engine, (5,))
            answer(engine, (9,))
            told.append(engine.snapshot())
            before_and_after = zip(before.experts.layers, told[-1].experts.layers, strict=True)
            grown = [sum(b.total_uses or ()) - sum(a.total_uses or ()) for a, b in before_and_after]
            assert grown == [2 * 3 * N_ANSWER] * 4
    assert uses(told[0]) == uses(told[1])
    assert all(sum(one.uses or ()) == 3 * N_ANSWER for one in told[0].experts.layers)
    assert {mark for one in told[0].experts.layers for mark in one.tiers} == {"h"}


def test_the_map_says_where_experts_are(tmp_path: Path) -> None:
    with closing(tiered_engine(config(uneven_model(tmp_path)), 0.0)) as engine:
        answer(engine)
        snapshot = engine.snapshot()
        assert engine.tiers is not None
        assert engine.tiers.host_pool is not None
        held = set(engine.tiers.host_pool.keys)
        layers = engine.plan.layers
    assert [one.layer for one in snapshot.experts.layers] == [0, 2, 3]
    for shown in snapshot.experts.layers:
        layer = layers[shown.layer]
        assert layer is not None
        for row, expert in enumerate(layer.target):
            found = (shown.tiers[row], shown.formats[row])
            if expert < 0:
                assert found == ("x", -1)
                continue
            assert (found[0] == "h") == ((shown.layer, expert) in held and row not in shown.reading)
            format = snapshot.experts.formats[found[1]]
            copy = layer.experts[expert][0]
            assert (format.types.split()[0], format.bytes) == (copy.matrices[0].type.name, copy.n_bytes)
    assert {"h", "."} <= {mark for one in snapshot.experts.layers for mark in one.tiers}


def test_time_and_memory_add_up(tmp_path: Path) -> None:
    with closing(tiered_engine(config(plain_model(tmp_path)), 0.3)) as engine:
        answer(engine)
        first = engine.snapshot()
        answer(engine, PROMPT[1:])
        second = engine.snapshot()
        memory = engine.memory()
    for spent in (first.work.answer, first.work.total, second.work.answer, second.work.total):
        parts = spent.compute_seconds, spent.disk_seconds, spent.device_seconds, spent.other_seconds
        assert sum(parts) == pytest.approx(spent.seconds, rel=0.01)
        assert min(spent.compute_seconds, spent.other_seconds) > 0
        assert spent.hit_share is not None
    assert (first.work.answer.n_prompt, first.work.answer.n_predicted) == (len(PROMPT), N_ANSWER - 1)
    assert second.work.answer.n_prompt == len(PROMPT) - 1
    assert second.work.total.n_predicted == 2 * (N_ANSWER - 1)
    assert second.work.total.seconds > second.work.answer.seconds
    assert second.work.speed.measured
    host = second.memory.places[0]
    assert (host.name, host.setting) == ("host", "auto")
    assert host.by_use["experts"] == memory["host_pool"]
    assert host.by_use["kv"] == memory["kv"]
    assert second.memory.peak >= second.memory.resident > 0


def test_snapshots_may_be_taken_while_steps_run(tmp_path: Path) -> None:
    """From another thread, as a server does; every one is whole, and readable on the other side of a pipe."""
    taken: list[bytes] = []
    with closing(tiered_engine(config(plain_model(tmp_path)), 0.0)) as engine:
        is_over = threading.Event()

        def look_on() -> None:
            while not is_over.is_set():
                taken.append(msgspec.json.encode(engine.snapshot()))

        thread = threading.Thread(target=look_on)
        thread.start()
        for first in range(3, 33):
            answer(engine, (first, *PROMPT))
        is_over.set()
        thread.join()
    snapshots = [msgspec.json.decode(one, type=Snapshot) for one in taken]
    assert len(snapshots) > 5
    assert all(len(one.experts.layers) == 4 for one in snapshots)
    totals = [sum(sum(layer.total_uses or ()) for layer in one.experts.layers) for one in snapshots]
    assert totals == sorted(totals)
    assert totals[-1] > totals[0]
