"""What an engine recorded, replayed, finds and misses what the engine did."""

from pathlib import Path

import pytest

from bench.baselines.stepping import random_tokens
from bench.traces.cache_replay import CacheReplay, Tally, Tier
from bench.traces.candidate import Online
from bench.traces.demand import demands
from slimoe.offload.cache.policy import POLICIES, PolicyContext, make_policy
from slimoe.offload.cache.router_trace import Trace, read_trace
from slimoe.offload.engine import Engine
from tests.models.configs import engine_config
from tests.models.tiered import tiered_engine
from tests.models.tiny_gguf import TinyShape, write_tiny_gguf

SHAPE = TinyShape(n_layer=5, n_expert=7, n_expert_used=2, n_ff=32)
TOKENS = random_tokens(100, 300)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("replay") / "model.gguf", None, shape=SHAPE)


def record(engine: Engine, trace: Path, n_prompt: int) -> tuple[Trace, dict[str, float]]:
    """The recording of a prompt and an answer, and what the engine counted for the answer; nothing if it holds all."""
    if n_prompt:
        engine.prefill(TOKENS[:n_prompt])
    before = dict(engine.counters())
    for token in TOKENS[n_prompt:]:
        engine.decode(token)
    after = engine.counters()
    assert after.get("ahead") == after.get("pending"), "the name that the version before gave"
    engine.close()
    return read_trace(trace), {name: after[name] - before[name] for name in ("hits", "pending", "misses") if after}


def replayed(trace: Trace, n_slots: int, policy: str) -> Tally:
    header = trace.header
    candidate = Online(make_policy(policy, PolicyContext(header.n_layer, header.n_expert, header.n_expert_used)))
    cache = CacheReplay(header, {header.expert_bytes[0][0]: n_slots}, candidate, Tier(1, 1, 1, computes_misses=False))
    tally = cache.run(demands(trace))["answer"]
    cache.check()
    return tally


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_replay_counts_what_the_engine_counted(model: Path, tmp_path: Path, policy: str, share: float) -> None:
    config = engine_config(model, n_ctx=256, n_threads=1, policy=policy, trace=tmp_path / "trace")
    engine = tiered_engine(config, share, prefetch_depth=0)
    assert engine.plan.tiers is not None
    n_slots = sum(n for _, n in engine.plan.tiers.n_slots)
    trace, counted = record(engine, tmp_path / "trace", n_prompt=0)
    tally = replayed(trace, n_slots, policy)
    assert tally.n_tokens == len(TOKENS)
    assert tally.hits + tally.misses == len(TOKENS) * SHAPE.n_layer * SHAPE.n_expert_used
    assert (tally.misses == 0) is (share == 1)
    assert counted == ({} if share == 1 else {"hits": tally.hits, "pending": 0, "misses": tally.misses})


def test_what_the_engine_predicted_is_in_its_trace(model: Path, tmp_path: Path) -> None:
    """For answers only, the next two layers at most, never more than are used."""
    config = engine_config(model, n_ctx=256, n_threads=1, trace=tmp_path / "trace")
    trace, counted = record(tiered_engine(config, 0.5, prefetch_depth=2), tmp_path / "trace", n_prompt=20)
    predicted = 0
    assert [run.n_tokens for run in trace.steps[0].runs] == [20]
    assert all(part.predicted == () for part in trace.steps[0].layers[:-1]), "of a prompt, the last layer has one row"
    for part in (part for step in trace.steps for part in step.layers):
        later = [layer for layer, _ in part.predicted]
        assert all(part.layer < layer <= part.layer + 2 for layer in later)
        assert all(later.count(layer) <= SHAPE.n_expert_used for layer in set(later))
        predicted += len(later)
    assert predicted >= counted["pending"] > 0
