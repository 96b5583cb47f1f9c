"""The bench of experts on a device: engine and replay agree for every policy, also where experts differ in size."""

from pathlib import Path

import pytest

from bench.rpc_device import Job, Run, as_json, check, device_config, main, measure, plan_with_room
from bench.stepping import random_tokens
from bench.topics import natural_tokens
from offload.engine_plan import EngineConfig, plan_engine
from offload.errors import DoesNotFitError, UsageError
from offload.policy import POLICIES
from tests.tier_models import mixed_model, plain_model
from tests.tiered import tiered_plan


def runs_of(model: Path, tokens: list[int], shares: tuple[float, ...]) -> list[Run]:
    config = EngineConfig(model, n_ctx=256, n_batch=16, n_threads=1)
    with device_config(config, None) as config:
        return measure(Job(config, tuple(tokens), 16, "card"), shares, list(POLICIES))


def test_experts_of_several_sizes_move_as_replayed(tmp_path: Path) -> None:
    """Each type has slots of its own, and changes places only among its like."""
    runs = runs_of(mixed_model(tmp_path), natural_tokens(140, 300), (0.4, 0.7))
    assert all(run.engine == run.replay for run in runs)
    assert all(run.is_exact and run.kl == 0 for run in runs)
    by_policy = {name: [run.swaps for run in runs if run.policy == name] for name in POLICIES}
    assert min(by_policy["lru"]) > min(by_policy["heat"])
    assert max(by_policy["heat"]) > 0
    assert by_policy["static"] == [0, 0]


def test_random_tokens_too(tmp_path: Path) -> None:
    document = as_json(runs_of(plain_model(tmp_path), random_tokens(60, 300), (0.5,)))
    assert document["agrees"]
    assert document["is_exact"]
    assert document["largest_bytes_difference"] == document["largest_hit_difference"] == document["largest_kl"] == 0
    assert {run["slots"] for run in document["runs"]} == {12}


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    with device_config(EngineConfig(plain_model(tmp_path), n_ctx=256, n_batch=16, n_threads=1), None) as config:
        half = plan_with_room(config, 0.5)
        check(plan_engine(half))
        with pytest.raises(UsageError, match="do not all fit into host memory"):
            check(tiered_plan(half, 0.5))
        with pytest.raises(DoesNotFitError, match="Raise --vram"):
            check(plan_engine(plan_with_room(config, 0.01)))


def test_mistakes_are_answered_in_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in ((["--model", "missing.gguf"], "missing.gguf"), (["--smoke", "--device", "GPU9"], "GPU9")):
        with pytest.raises(SystemExit) as caught:
            main(arguments, standalone_mode=False)
        assert caught.value.code not in (None, 0, 1)
        said = capsys.readouterr()
        assert words in said.err
        assert said.out == ""
