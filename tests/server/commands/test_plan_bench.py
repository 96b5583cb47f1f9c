"""`slimoe plan` and `slimoe bench`."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.baselines.rpc_server import rpc_server
from slimoe.offload.engine import Engine
from slimoe.offload.errors import DoesNotFitError
from slimoe.offload.machine.cost_model import Prediction
from slimoe.offload.machine.measurement_cache import MeasurementCache
from slimoe.offload.machine.speed import MachineSpeed, Overheads
from slimoe.offload.machine.upload_costs import ExchangeChoice, UploadCosts
from slimoe.offload.plan import machine
from slimoe.offload.plan.engine_config import EngineConfig
from slimoe.offload.plan.engine_plan import EnginePlan, plan_engine
from slimoe.offload.plan.prediction import PlanPrediction, known_as
from slimoe.server.cli import run
from slimoe.server.commands import plan
from slimoe.server.options.engine_options import DEMO
from slimoe.server.terminal.plan_report import PlanReport
from tests.models.configs import engine_config
from tests.models.gguf_content import read_content, write_content
from tests.models.live_server import DEADLINE, slimoe
from tests.models.measured_machine import machine_for
from tests.models.tiny_gguf import FineShape, TinyShape, write_family, write_tiny_gguf
from tests.offload.drafted import with_mtp_block

PLAN = ["plan", "--batch", "64", "--no-measure"]


@pytest.fixture(autouse=True)
def nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this machine, at the start of each test; what the tests' own process holds grows meanwhile, and stays out."""
    monkeypatch.setenv("SLIMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(machine, "resident_bytes", lambda: 0)
    monkeypatch.setattr(machine, "with_driver_memory", lambda device: device)


def test_plan_counts_what_opening_then_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "--json", "--ctx", "512", "--no-measure"]) == 0
    planned = json.loads(capsys.readouterr().out)
    engine = Engine.open(engine_config(DEMO, n_ctx=512))
    taken = engine.memory()
    engine.close()
    assert planned["fits"] is True
    assert {name: planned["bytes"][name] for name in ("mapped", "copied", "repacked", "kv")} == {
        name: taken[name] for name in ("mapped", "copied", "repacked", "kv")
    }
    assert planned["bytes"]["compute"] >= taken["compute"]
    assert planned["required_bytes"] == sum(planned["bytes"].values())


def test_plan_counts_the_block_that_drafts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = FineShape(n_layer=2, n_embd_head=64, n_expert=8, n_expert_used=2)
    content = read_content(write_family(tmp_path / "plain.gguf", "glm4moe", shape=shape))
    written = with_mtp_block(content, shape.n_layer)
    path = write_content(tmp_path / "m.gguf", written)
    block = sum(one.data.nbytes for name, one in written.tensors.items() if name.startswith("blk.2."))
    plans = {}
    for draft in ("none", "ngram", "mtp", "auto"):
        assert run([*PLAN, str(path), "--json", "--device", "none", "--draft", draft]) == 0
        plans[draft] = json.loads(capsys.readouterr().out)
    assert plans["none"]["bytes"] == plans["ngram"]["bytes"]
    assert plans["mtp"]["bytes"] == plans["auto"]["bytes"]
    assert plans["none"]["bytes"]["mtp"] == 0
    assert plans["mtp"]["bytes"]["mtp"] >= block
    sizes = [plans[draft]["bytes"] for draft in ("none", "mtp")]
    without, with_block = ({name: n for name, n in one.items() if name != "mtp"} for one in sizes)
    assert without == with_block
    assert plans["mtp"]["required_bytes"] == sum(plans["mtp"]["bytes"].values())
    assert run([*PLAN, str(path), "--device", "none", "--draft", "mtp"]) == 0
    assert "MTP block, for drafts" in capsys.readouterr().out


def test_plan_says_what_drafts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf", None)
    assert run([*PLAN, str(path), "--json", "--device", "none", "--draft", "mtp"]) == 0
    out, err = capsys.readouterr()
    told = "No tokens are drafted (--draft mtp): the file has no block that predicts tokens, or none that can be run."
    assert told in json.loads(out)["notes"]
    assert told in err


def test_plan_that_does_not_fit_ends_with_4_and_both_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "--json", "--ctx", "1000000000"]) == 4
    out, err = capsys.readouterr()
    plan = json.loads(out)
    assert plan["fits"] is False
    assert plan["required_bytes"] > plan["available_bytes"]
    assert "TiB" in err or "GiB" in err
    assert "--ctx" in err


def test_plan_of_a_model_that_does_not_fit_whole(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*PLAN, "--json", "--ram", "0"]) == 4
    least = json.loads(capsys.readouterr().out)["required_bytes"]
    ram = ("--ram", str(least))
    assert run([*PLAN, "--json", *ram]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["fits"] is True
    assert planned["bytes"]["host_pool"] > 0
    assert planned["required_bytes"] == sum(planned["bytes"].values()) == planned["available_bytes"]
    assert run([*PLAN, *ram]) == 0
    assert "experts, read from disk" in capsys.readouterr().out


def test_plan_without_json_names_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(PLAN) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("weights, copied", "KV cache, 2048 tokens", "in all", "may be taken"))


def test_bytes_of_a_plan_stand_below_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where a part of the KV cache is of windows."""
    shape = FineShape(n_layer=2, n_embd=64, n_ff=64, n_embd_head=32, n_expert=8, n_expert_used=2)
    path = write_family(tmp_path / "m.gguf", "gpt-oss", shape=shape)
    assert run([*PLAN, str(path), "--ctx", "4096", "--parallel", "2", "--device", "none"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "iB" in line]
    [windowed] = [line for line in rows if line.startswith("KV cache, 2 x 4096 tokens ")]
    assert windowed.endswith(" tokens in windows)")
    assert {line.index("iB") for line in rows} == {windowed.index("iB")}


# --- what lies where ---------------------------------------------------------------------------------------


def test_plan_of_a_device_names_what_lies_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf", None, shape=TinyShape(n_layer=3))
    with rpc_server() as server:
        words = [*PLAN, str(path), "--ctx", "64", "--rpc", server.endpoint]
        assert run([*words, "--vram", "1B", "--json"]) == 4
        short = json.loads(capsys.readouterr().out)
        assert (short["fits"], short["tiers"], short["prediction"]) == (False, None, None)
        assert "--vram" in short["shortfall"]
        vram = short["required_bytes"] + 4 * 3 * 64 * 96 * 4
        assert run([*words, "--vram", str(vram), "--json"]) == 0
        planned = json.loads(capsys.readouterr().out)
        assert run([*words, "--vram", str(vram)]) == 0
        out = capsys.readouterr().out
    (device,) = planned["tiers"]["devices"]
    assert device["layers"] == [0, 1, 2]
    assert device["n_experts"] == 5
    assert not device["is_whole"]
    assert device["required_bytes"] == sum(device["bytes"].values()) <= device["budget_bytes"] == vram
    assert planned["tiers"]["host"]["n_experts"] == 13
    assert planned["tiers"]["disk"]["n_experts"] == 0
    hits = planned["tiers"]["expected_hits"]
    assert hits == pytest.approx({"devices": 5 / 18, "host": 13 / 18, "disk": 0})
    assert all(text in out for text in (server.endpoint, "layers 0 to 2, 5 experts", "28 % on devices, 72 % in memory"))


def test_the_nearest_context_that_fits_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """Each token takes 4096 bytes of the KV cache; the room is for one and a half thousand of them."""
    assert run([*PLAN, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    room = planned["required_bytes"] - planned["bytes"]["host_pool" if "host_pool" in planned["bytes"] else "copied"]
    ram = ("--ram", str(room))
    assert run([*PLAN, *ram, "--ctx", "1000000", "--json"]) == 4
    out, _ = capsys.readouterr()
    nearest = json.loads(out)["nearest"]["n_ctx"]
    assert 256 <= nearest < 1000000
    assert run([*PLAN, *ram, "--ctx", "1000000"]) == 4
    assert f"--ctx {nearest}" in capsys.readouterr().err
    assert run([*PLAN, *ram, "--ctx", str(nearest)]) == 0
    assert run([*PLAN, *ram, "--ctx", str(2 * nearest + 2)]) == 4


def test_notes_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*PLAN, "--ram", "100TiB", "--json"]) == 0
    out, err = capsys.readouterr()
    assert "taking no more than that" in err
    assert len(json.loads(out)["notes"]) == 1


# --- predictions -------------------------------------------------------------------------------------------


class KnownMachine:
    """A machine of 1 GB/s, and what was told before each thing was measured."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def __call__(
        self, config: EngineConfig, planned: EnginePlan, before: Callable[[str], None], cache: MeasurementCache
    ) -> MachineSpeed:
        for name in ("one thing", "another"):
            before(name)
            self.told.append(name)
        return machine_for(planned, disk=1e8)


def tell(*flags: str, measure: plan.Measure) -> None:
    plan.tell_engine_plan(plan.command.make_context("plan", list(flags)).params, measure)


def test_speed_is_predicted_and_its_limit_named(capsys: pytest.CaptureFixture[str]) -> None:
    machine = KnownMachine()
    tell("--json", measure=machine)
    out, err = capsys.readouterr()
    predicted = json.loads(out)["prediction"]
    for phase in ("decode", "prefill"):
        one = predicted[phase]
        assert one["bound_tier"] == "cpu"
        assert one["tokens_per_second"] == pytest.approx(1000 / one["ms_per_token"])
        assert one["bound_ms"] == max(one["tier_ms"].values()) <= one["ms_per_token"]
    assert err.count("Measuring this machine") == 1
    assert machine.told == ["one thing", "another"]
    tell(measure=machine)
    out, _ = capsys.readouterr()
    assert f"about {predicted['decode']['tokens_per_second']:.1f} tokens/s" in out
    assert "the CPU is the limit" in out


@pytest.mark.parametrize("trip_seconds", [1e-9, 1.0])
def test_a_device_that_slows_down_is_told(
    trip_seconds: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a round trip of a second takes, this machine does many times by itself."""

    def measure(config: EngineConfig, planned: EnginePlan, *_others: object) -> MachineSpeed:
        names = [known_as(one.device) for one in planned.devices]
        speed = machine_for(planned, *names)
        overheads = Overheads(trip_seconds, 1e-12)
        devices = {name: dataclasses.replace(speed.devices[name], overheads=overheads) for name in names}
        return dataclasses.replace(speed, devices=devices)

    path = write_tiny_gguf(tmp_path / "m.gguf", None)
    with rpc_server() as server:
        words = [str(path), "--ctx", "64", "--rpc", server.endpoint]
        tell(*words, "--json", measure=measure)
        found = json.loads(capsys.readouterr().out)
        tell(*words, measure=measure)
        out = capsys.readouterr().out
    far, near = (found[name]["decode"]["ms_per_token"] for name in ("prediction", "without_rpc"))
    assert (far > near) == (trip_seconds == 1.0)
    assert f"answers about {1000 / near:.1f} tokens/s" in out
    warning = "The other machine is used as asked, but slows answers and prompts down: leave --rpc out."
    assert (warning in out) == (trip_seconds == 1.0)


def test_what_other_programs_disturb_is_measured_once_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLIMOE_CACHE", str(tmp_path))
    measured, quiet = list[str](), False

    def measure(
        config: EngineConfig, planned: EnginePlan, before: Callable[[str], None], cache: MeasurementCache
    ) -> MachineSpeed:
        def speed() -> MachineSpeed:
            measured.append("kernels")
            return machine_for(planned, *(known_as(one.device) for one in planned.devices))

        if quiet and cache.get("kernels", MachineSpeed) is None:
            # What is put there is remembered, however busy the machine is that runs this test.
            cache.put({"kernels": speed()})
        return cache.measured("kernels", MachineSpeed, speed, lambda: False)

    path = write_tiny_gguf(tmp_path / "m.gguf", None)
    with rpc_server() as server:
        words = [str(path), "--ctx", "64", "--rpc", server.endpoint]
        for _ in range(2):
            tell(*words, measure=measure)
            err = capsys.readouterr().err
            assert "1 measurement was disturbed by other programs (1 of kernels) and not remembered" in err
            assert "It is remembered" not in err
        assert measured == ["kernels"] * 2, "once for both predictions, and again in the next run"
        quiet = True
        tell(*words, measure=measure)
        tell(*words, measure=measure)
    assert "disturbed" not in capsys.readouterr().err
    assert measured == ["kernels"] * 3


def test_many_disturbed_measurements_are_one_short_line() -> None:
    names = [f"CPU, 2 threads, 16 MiB: Q4_K {n} dense x 256" for n in range(256, 8192, 256)]
    line = plan.disturbance([*names, "CPU, 2 threads: overheads", "disk 65024, 128 KiB, direct", "RPC0 (h:1): link"])
    assert line.startswith(
        "34 measurements were disturbed by other programs (32 of CPU, 1 of disk, 1 of RPC0) and not "
    )
    assert len(line) < 240


def test_what_becomes_of_experts_that_a_card_lacks_is_told(tmp_path: Path) -> None:
    one = Prediction(1.0, 1.0, "cpu", {"cpu": 1.0})
    choice = ExchangeChoice("static", "experts on the card stay: an upload takes 12 ms, saves 0.3 ms per use")
    plan = plan_engine(engine_config(write_tiny_gguf(tmp_path / "m.gguf", None), n_ctx=64))
    costs = {"GPU0": UploadCosts(host=4e-3, device=1e-3, copy=12e-3, host_beside=4e-3, copy_beside=12e-3)}
    report = PlanReport(plan, PlanPrediction(one, 1, one, 1, {"GPU0": choice}, costs))
    assert [line for line in report.speed_lines() if line.startswith("GPU0 ") and line.endswith(choice.reason)]
    assert any(line.startswith("while it runs ") for line in report.speed_lines())
    told = report.as_json()["prediction"]["exchange"]["GPU0"]
    assert (told["mode"], told["reason"]) == ("static", choice.reason)
    assert told["expected_ms"] == pytest.approx({"copy": 12, "host": 4, "device": 1})


def test_a_model_that_needs_the_other_machine_is_compared_with_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(config: EngineConfig, planned: EnginePlan, *_others: object) -> MachineSpeed:
        return machine_for(planned, *(known_as(one.device) for one in planned.devices))

    path = write_tiny_gguf(tmp_path / "m.gguf", None)
    assert run([*PLAN, str(path), "--ctx", "64", "--ram", "0", "--json"]) == 4
    least = json.loads(capsys.readouterr().out)["required_bytes"]
    with rpc_server() as server:
        ram = str(least - 1)
        tell(
            str(path), "--ctx", "64", "--rpc", server.endpoint, "--ram", ram, "--batch", "64", "--json", measure=measure
        )
        found = json.loads(capsys.readouterr().out)
    assert found["prediction"] is not None
    assert found["without_rpc"] is None


def test_nothing_is_measured_without_leave(capsys: pytest.CaptureFixture[str]) -> None:
    machine = KnownMachine()
    tell(*PLAN[1:], "--json", measure=machine)
    out, err = capsys.readouterr()
    assert json.loads(out)["prediction"] is None
    assert "--no-measure" in err
    assert machine.told == []


@pytest.mark.parametrize(
    ("error", "told"),
    [(KeyboardInterrupt(), "stopped"), (DoesNotFitError("No room.", required_bytes=2, available_bytes=1), "No room.")],
    ids=["interrupted", "without room"],
)
def test_a_plan_outlives_its_measurement(error: BaseException, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*arguments: object) -> MachineSpeed:
        raise error

    tell("--batch", "64", measure=fail)
    out, err = capsys.readouterr()
    assert "in all" in out
    assert f"not predicted: {told}" in err or told in err


# --- slimoe bench ------------------------------------------------------------------------------------------


def test_bench_reports_speeds_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "--json", "-p", "16", "-n", "2", "-d", "3", "-r", "1", "--threads", "1"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["prefill_per_second"] > 0
    assert report["decode_ms"] == pytest.approx(1000 / report["decode_per_second"])
    assert report["depth"] == 3
    assert report["memory"]["copied"] > 0


def test_bench_prints_llama_benchs_table(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["-p", "8,16", "-n", "2", "-pg", "8,2", "-d", "0,4", "-r", "2", "--threads", "1"]
    assert run(["bench", *words]) == 0
    head, marks, *rows = capsys.readouterr().out.splitlines()
    assert [cell.strip() for cell in head.split("|")[1:-1]][5:] == ["test", "t/s cold", "t/s"]
    assert set(marks) == set("|-: ")
    names = [row.split("|")[6].strip() for row in rows]
    assert names == ["pp8", "pp16", "tg2", "pp8+tg2", "pp8 @ d4", "pp16 @ d4", "tg2 @ d4", "pp8+tg2 @ d4"]
    assert all(float(row.split("|")[8].partition("±")[0]) > 0 for row in rows)
    assert len({len(line) for line in (head, marks, *rows)}) == 1


def test_bench_tells_cold_from_warm() -> None:
    """With a cache too small for the experts the hits of the warm rounds are told as well."""
    shape = ["--batch", "64", "--ctx", "64", "--threads", "1"]

    def printed(*words: str) -> dict[str, Any]:
        """By a process of its own: this one's memory would count."""
        report: dict[str, Any] = json.loads(slimoe(*words, "--json", *shape).communicate(timeout=DEADLINE)[0])
        return report

    least = printed("plan", "--no-measure", "--ram", "0")["required_bytes"]
    (test,) = printed("bench", "--ram", str(least), "-p", "0", "-n", "3", "-r", "2")["tests"]
    assert test["test"] == "tg3"
    assert 0 <= test["hit_share"] < 1
    assert len(test["rounds_per_second"]) == 2
    assert test["cold_per_second"] > 0
    assert min(test["rounds_per_second"]) <= test["median_per_second"] <= max(test["rounds_per_second"])


@pytest.mark.parametrize("words", [["-p", "x"], ["-p", "-1"], ["-pg", "3"], ["-n", "1,,2"], ["-p", "0", "-n", "0"]])
def test_bench_refuses_what_is_no_count(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", *words]) == 2
    assert capsys.readouterr().out == ""


def test_bench_longer_than_the_context_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "-p", "5000"]) == 2
    assert "5000 tokens of context" in capsys.readouterr().err
