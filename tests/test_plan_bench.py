"""`slimoe plan` and `slimoe bench`."""

import json

import pytest

import offload.engine_plan
from offload.budget import Budget
from offload.engine import Engine
from offload.engine_plan import EngineConfig
from server.cli import run
from server.engine_options import DEMO


def test_plan_counts_what_opening_then_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "--json", "--ctx", "512"]) == 0
    planned = json.loads(capsys.readouterr().out)
    engine = Engine.open(EngineConfig(DEMO, n_ctx=512))
    taken = engine.memory()
    engine.close()
    assert planned["fits"] is True
    assert {name: planned["bytes"][name] for name in ("mapped", "copied", "repacked", "kv")} == {
        name: taken[name] for name in ("mapped", "copied", "repacked", "kv")
    }
    assert planned["bytes"]["compute"] >= taken["compute"]
    assert planned["required_bytes"] == sum(planned["bytes"].values())


def test_plan_that_does_not_fit_ends_with_4_and_both_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "--json", "--ctx", "1000000000"]) == 4
    out, err = capsys.readouterr()
    plan = json.loads(out)
    assert plan["fits"] is False
    assert plan["required_bytes"] > plan["available_bytes"]
    assert "TiB" in err or "GiB" in err
    assert "--ctx" in err


def test_plan_of_a_model_that_does_not_fit_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload.engine_plan, "program_bytes", lambda *_: 1000)
    monkeypatch.setattr(offload.engine_plan, "decide_budget", lambda *_: Budget(0, ()))
    assert run(["plan", "--json", "--batch", "64"]) == 4
    least = json.loads(capsys.readouterr().out)["required_bytes"]
    monkeypatch.setattr(offload.engine_plan, "decide_budget", lambda *_: Budget(least, ()))
    assert run(["plan", "--json", "--batch", "64"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["fits"] is True
    assert planned["bytes"]["arena"] > 0
    assert planned["required_bytes"] == sum(planned["bytes"].values()) == planned["available_bytes"]
    assert run(["plan", "--batch", "64"]) == 0
    assert "experts, read from disk" in capsys.readouterr().out


def test_plan_without_json_names_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("weights, copied", "KV cache, 2048 tokens", "in all", "free now"))


def test_bench_reports_speeds_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "--json", "-p", "16", "-n", "2", "-d", "3", "-r", "1", "--threads", "1"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["prefill_per_second"] > 0
    assert report["decode_ms"] == pytest.approx(1000 / report["decode_per_second"])
    assert report["depth"] == 3
    assert report["memory"]["copied"] > 0


def test_bench_longer_than_the_context_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "-p", "5000"]) == 2
    assert "5000 tokens of context" in capsys.readouterr().err
