"""The bench of experts on a device: engine and replay agree for every policy, also where experts differ in size."""

import json
from contextlib import closing
from pathlib import Path

import pytest

from bench.baselines.stepping import random_tokens
from bench.models.topics import natural_tokens
from bench.rpc_device import CARD, Job, Run, as_json, check, device_config, main, measure, own_slots, plan_with_room
from bench.traces.cache_replay import CacheReplay
from bench.traces.candidate import Online
from bench.traces.demand import demands
from slimoe.offload.cache.policy import POLICIES, PolicyContext, make_policy
from slimoe.offload.cache.router_trace import read_trace
from slimoe.offload.cache.swap import SwapRule
from slimoe.offload.errors import DoesNotFitError, UsageError
from slimoe.offload.plan.engine_plan import plan_engine
from tests.models.configs import engine_config, reconfigured
from tests.models.conversation import answers
from tests.models.tier_models import mixed_model, plain_model
from tests.models.tiered import device_engine, tiered_plan


def runs_of(model: Path, tokens: list[int], shares: tuple[float, ...]) -> list[Run]:
    config = engine_config(model, n_ctx=256, n_batch=16, n_threads=1)
    with device_config(config, None) as config:
        return measure(Job(config, tuple(tokens), 16, "card"), shares, list(POLICIES))


def test_experts_of_several_sizes_move_as_replayed(tmp_path: Path) -> None:
    """Each type has slots of its own, and changes places only among its like."""
    runs = runs_of(mixed_model(tmp_path), natural_tokens(100, 300), (0.4,))
    assert all(run.engine == run.replay for run in runs)
    assert all(run.is_exact and run.kl == 0 for run in runs)
    swaps = {run.policy: run.swaps for run in runs}
    assert swaps["lru"] > swaps["lfu-decay"] > swaps["static"] == 0


def test_random_tokens_too(tmp_path: Path) -> None:
    document = as_json(runs_of(plain_model(tmp_path), random_tokens(60, 300), (0.5,)))
    assert document["agrees"]
    assert document["is_exact"]
    assert document["largest_bytes_difference"] == document["largest_hit_difference"] == document["largest_kl"] == 0
    assert {run["slots"] for run in document["runs"]} == {12}


@pytest.mark.parametrize("policy", ["lfu-decay", "lru"])
def test_steps_of_several_requests_move_as_replayed(tmp_path: Path, policy: str) -> None:
    """Prompts and answers in one batch: the same experts move, and none that only passed through for a batch."""
    config = engine_config(plain_model(tmp_path), n_ctx=256, n_batch=16, n_threads=1, n_parallel=3, policy=policy)
    config = reconfigured(config, trace=tmp_path / "trace")
    with device_config(config, None) as config, closing(device_engine(config, 0.4)) as engine:
        (device,) = engine.device_experts
        assert device.swaps is not None
        device.times = device.uploads = device.watch = None
        rule = device.swaps.rule = SwapRule(gain_seconds=1.0, cost_seconds=1.0)
        before = device.bytes_uploaded
        answers(engine)
        moved, slots = device.bytes_uploaded - before, own_slots(engine.plan)
    trace = read_trace(tmp_path / "trace")
    candidate = Online(make_policy(policy, PolicyContext(4, 6, 3)))
    cache = CacheReplay(trace.header, slots, candidate, CARD, rule)
    assert sum(tally.moved_bytes for tally in cache.run(demands(trace)).values()) == moved > 0


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    with device_config(engine_config(plain_model(tmp_path), n_ctx=256, n_batch=16, n_threads=1), None) as config:
        half = plan_with_room(config, 0.5)
        check(plan_engine(half))
        with pytest.raises(UsageError, match="do not all fit into host memory"):
            check(tiered_plan(half, 0.5))
        with pytest.raises(DoesNotFitError, match="Raise --vram"):
            check(plan_engine(plan_with_room(config, 0.01)))


def test_a_network_is_timed_beside_its_prediction(capsys: pytest.CaptureFixture[str]) -> None:
    """Each token waits for the link: at least once, and once more for each of two cut layers."""
    main(["--smoke", "--link", "10Gbit,3ms"], standalone_mode=False)
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    alone, *_, half, whole = document["runs"]
    rooms = ["none", "half on disk", "half", "all", "half", "all"]
    assert [run["room"] for run in document["runs"]] == rooms
    assert (alone["link"], half["link"], whole["link"]) == ("", "10Gbit,3ms", "10Gbit,3ms")
    for name in ("decode_ms", "predicted_decode_ms"):
        assert whole[name] > 5.8
        assert half[name] > 3 * 5.8
    assert document["links"]["10Gbit,3ms"]["one_way_ms"] > 2.9
    assert document["largest_error"] >= 0


def test_mistakes_are_answered_in_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["--model", "missing.gguf"], "missing.gguf"),
        (["--smoke", "--device", "GPU9"], "GPU9"),
        (["--smoke", "--device", "GPU9", "--link", "1Gbit,1ms"], "Leave one out."),
        (["--smoke", "--link", "fast"], "Write them as 10Gbit,0.2ms."),
        (["--smoke", "--link", "1Gbit,1ms", "--link", "1Gbit,1ms/1Gbit,2ms"], "Leave the others out."),
    ):
        with pytest.raises(SystemExit) as caught:
            main(arguments, standalone_mode=False)
        assert caught.value.code not in (None, 0, 1)
        said = capsys.readouterr()
        assert words in said.err
        assert said.out == ""


def test_a_network_that_changes_is_played_by_two_engines_in_turn(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--smoke", "--link", "10Gbit,0ms/1Gbit,0ms"], standalone_mode=False)
    runs = json.loads(capsys.readouterr().out.splitlines()[-1])["runs"]
    assert [(run["link"], run["is_soon"], run["n_tokens"]) for run in runs] == [
        ("10Gbit,0ms", True, 64),
        ("10Gbit,0ms", False, 32),
        ("1Gbit,0ms", True, 64),
        ("1Gbit,0ms", False, 32),
    ]
    assert all(run["ms"] > 0 and run["still_ms"] > 0 and run["ratio"] > 0 for run in runs)
