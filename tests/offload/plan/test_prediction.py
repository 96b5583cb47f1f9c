"""What a plan predicts: where experts will lie, against an engine opened as planned, and speeds by hand."""

import dataclasses
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from bench.baselines.rpc_server import rpc_server
from slimoe.offload.engine import Engine
from slimoe.offload.machine.cost_model import Residency, Step, predict
from slimoe.offload.machine.measurement_cache import MeasurementCache
from slimoe.offload.machine.probe import FormSpeed, KernelSpeed
from slimoe.offload.machine.speed import MatrixKernel
from slimoe.offload.machine.workload import workload
from slimoe.offload.model.native_layout import LayerHints
from slimoe.offload.plan.engine_config import EngineConfig
from slimoe.offload.plan.engine_plan import EnginePlan, plan_engine
from slimoe.offload.plan.expert_placement import ExpertPlacement, expert_placement, following_power
from slimoe.offload.plan.prediction import known_as, measure_machine, predict_plan, repacked_speed
from slimoe.offload.plan.weight_forms import MatrixKind
from tests.models.configs import engine_config, reconfigured
from tests.models.gguf_content import read_content
from tests.models.measured_machine import machine_for
from tests.models.native_files import NativeFfn, StoredExpert, plain_ffn, write_native
from tests.models.tiered import tiered_plan
from tests.models.tiny_gguf import TinyShape, write_tiny_gguf

SHAPE = TinyShape(n_layer=4)
EXPERT_BYTES = 3 * 64 * 96 * 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("prediction") / "tiny.gguf", None, shape=SHAPE)


def with_slots(config: EngineConfig, n_slots: int) -> EnginePlan:
    """The plan of an engine with so many slots in host memory."""
    plan = tiered_plan(config, 0)
    assert plan.tiers is not None
    ((kind, _),) = plan.tiers.n_slots
    return dataclasses.replace(plan, tiers=dataclasses.replace(plan.tiers, n_slots=((kind, n_slots),)))


# --- where experts are -------------------------------------------------------------------------------------


def test_a_resident_model_is_in_one_place(model: Path) -> None:
    where = expert_placement(plan_engine(engine_config(model, n_threads=1)))
    assert where == ExpertPlacement(24, (), 24, 0.0, 1.0, is_cut=False)
    assert (where.on_disk, where.disk_share) == (0, 0.0)


def test_a_model_without_experts(model: Path) -> None:
    """Nothing of it is ever read later."""
    plan = dataclasses.replace(plan_engine(engine_config(model, n_threads=1)), layers=(None,) * 4)
    assert expert_placement(plan) == ExpertPlacement(0, (), 0, 0.0, 1.0, is_cut=False)


@pytest.mark.parametrize("n_slots", [3, 13, 23])
def test_slots_serve_their_share(model: Path, n_slots: int) -> None:
    where = expert_placement(with_slots(engine_config(model, n_threads=1), n_slots))
    assert (where.n_experts, where.on_host, where.on_disk) == (24, n_slots, 24 - n_slots)
    assert where.host_share == pytest.approx(n_slots / 24)
    assert where.disk_share == pytest.approx(1 - n_slots / 24)
    assert where.is_cut


def test_a_cache_that_follows_the_text_misses_less(model: Path) -> None:
    """A guess where the file does not tell uses: the more experts, the more unevenly a text uses them."""
    plan = with_slots(engine_config(model, n_threads=1), 12)
    guessed = expert_placement(plan)
    missed = 0.5 ** following_power(0.5, 6)
    assert (guessed.missed_share, guessed.found_share) == pytest.approx((missed, 1 - missed))
    told = expert_placement(dataclasses.replace(plan, priors=np.ones((4, 6))))
    assert (told.missed_share, told.found_share) == pytest.approx((0.5**1.5, 1 - 0.5**1.5)), "of what it tells"
    beside = dataclasses.replace(guessed, device_share=0.5, host_share=0.25)
    assert beside.missed_share == pytest.approx(0.5 * missed), "of what is left for the host, half"
    assert following_power(0.5, 128) > following_power(0.5, 8) == following_power(0.5, 4) > following_power(0.1, 8)
    resident = expert_placement(plan_engine(engine_config(model, n_threads=1)))
    assert (resident.missed_share, resident.passing_share) == (0, 0)


def test_what_is_read_ahead_takes_slots(model: Path) -> None:
    """Those of two layers, of three experts each: they are there when a prompt needs them, and gone in an answer."""
    plan = with_slots(engine_config(model, n_threads=1), 12)
    assert plan.tiers is not None
    ahead = dataclasses.replace(plan, tiers=dataclasses.replace(plan.tiers, prefetch_depth=2))
    where, without = expert_placement(ahead), expert_placement(plan)
    assert (where.host_share, where.passing_share, without.passing_share) == pytest.approx((0.5, 6 / 24, 0))
    assert where.missed_share == pytest.approx(0.75 ** following_power(0.75, 6))
    few = with_slots(engine_config(model, n_threads=1), 4)
    assert few.tiers is not None
    few = dataclasses.replace(few, tiers=dataclasses.replace(few.tiers, prefetch_depth=2))
    assert expert_placement(few).missed_share == pytest.approx(1)


@pytest.mark.parametrize(
    ("n_experts", "n_used", "n_slots", "missed"),
    [
        (8, 2, 38, 0.277),
        (8, 2, 18, 0.648),
        (8, 2, 5, 0.963),
        (128, 8, 669, 0.128),
        (128, 8, 352, 0.358),
        (128, 8, 151, 0.627),
    ],
)
def test_what_engines_missed_is_expected(n_experts: int, n_used: int, n_slots: int, missed: float) -> None:
    """Models of 8 layers with natural routing, means of two texts: see bench/RESULTS.md, "Expected hits"."""
    host, passing = n_slots / (8 * n_experts), min(n_slots, 2 * n_used) / (8 * n_experts)
    where = ExpertPlacement(
        8 * n_experts, (), n_slots, 0.0, host, is_cut=True, passing_share=passing, n_expert=n_experts
    )
    assert where.missed_share == pytest.approx(missed, rel=0.15)


@pytest.mark.parametrize(
    ("static", "passing", "missed"),
    [(0.693, 0.076, 0.674), (0.487, 0.066, 0.398), (0.285, 0.059, 0.203), (0.161, 0.054, 0.103)],
)
def test_what_engines_missed_of_a_calibrated_file_is_expected(static: float, passing: float, missed: float) -> None:
    """A trained model, means of three texts; the shares are what its file says."""
    where = ExpertPlacement(64, (), 32, 0.0, 1 - static, is_cut=True, passing_share=passing)
    assert where.missed_share == pytest.approx(missed, rel=0.15)


def test_the_most_used_experts_come_first(model: Path) -> None:
    """Of 3 selected ones of 6 experts, two take nearly one each; experts of equal worth come by layers."""
    priors = np.ones((4, 6))
    priors[2, [1, 4]] = 1e6
    plan = dataclasses.replace(with_slots(engine_config(model, n_threads=1), 2), priors=priors)
    assert expert_placement(plan).host_share == pytest.approx(2 / 12, rel=1e-3)


def test_rows_without_an_expert_take_no_slot(tmp_path: Path) -> None:
    """Aliases count twice, layers without experts and constant experts never."""
    stock = read_content(write_tiny_gguf(tmp_path / "stock.gguf", None, shape=SHAPE))
    constants = np.ones((2, SHAPE.n_embd), np.float32)
    aliased = NativeFfn(tuple(StoredExpert(e) for e in range(3)), (0, 0, 1, 2, -1, -2), constants)
    path = write_native(tmp_path / "m.gguf", stock, [plain_ffn(6), None, aliased, plain_ffn(6)])
    where = expert_placement(plan_engine(engine_config(path, n_threads=1, n_ctx=64)))
    assert (where.n_experts, where.on_host) == (15, 15)
    assert where.host_share == pytest.approx(1.0)


def test_priors_of_the_file_count(tmp_path: Path) -> None:
    stock = read_content(write_tiny_gguf(tmp_path / "stock.gguf", None, shape=SHAPE))
    hints = LayerHints(use=(0.9, 0.9, 0.9, 0.1, 0.1, 0.1))
    path = write_native(tmp_path / "m.gguf", stock, [plain_ffn(6, hints=hints)] * 4)
    where = expert_placement(with_slots(engine_config(path, n_threads=1, n_ctx=64), 12))
    assert where.host_share == pytest.approx(0.9)


# --- with devices ------------------------------------------------------------------------------------------


def on_devices(engine: Engine) -> Sequence[int]:
    tiers = engine.tiers
    assert tiers is not None
    return [24 if experts is None else len(set(experts)) for _, experts in tiers.devices]


def test_an_engine_puts_on_a_device_what_the_plan_says(model: Path) -> None:
    with rpc_server() as server:
        config = engine_config(model, n_threads=1, n_ctx=64, n_batch=8, rpc=(server.endpoint,))
        whole = plan_engine(config)
        everything = ExpertPlacement(24, (24,), 0, 1.0, 0.0, is_cut=False, by_layer=(1.0,) * 4)
        assert expert_placement(whole) == everything
        too_small = plan_engine(reconfigured(config, vram=("1B",))).shortfall
        assert too_small is not None
        part = f"{too_small.required_bytes + 6 * EXPERT_BYTES}B"
        plan = plan_engine(reconfigured(config, vram=(part,)))
        where = expert_placement(plan)
        assert where.on_devices == (7,)
        assert where.is_cut
        assert where.device_share == pytest.approx(where.on_devices[0] / 24)
        assert where.by_layer == pytest.approx((1.0, 1 / 6, 0.0, 0.0))
        assert where.disk_share == pytest.approx(0)
        name = known_as(plan.devices[0].device)
        chosen = predict_plan(plan, machine_for(plan, name)).exchange[name]
        copy, gain = EXPERT_BYTES / machine_for(plan, name).links[name].to_device, EXPERT_BYTES * (1e-9 - 1e-10)
        assert f"an upload takes {1e3 * copy:.2g} ms, saves {1e3 * gain:.2g} ms per use" in chosen.reason
        assert not predict_plan(whole, machine_for(whole, name)).exchange
        with closing(Engine.open(reconfigured(config, vram=(part,)))) as engine:
            assert on_devices(engine) == list(where.on_devices)
            assert engine.counters()["bytes_uploaded"] > 0


def test_a_device_is_what_the_speed_depends_on(model: Path) -> None:
    with rpc_server() as server:
        plan = plan_engine(engine_config(model, n_threads=1, n_ctx=64, rpc=(server.endpoint,)))
    name = known_as(plan.devices[0].device)
    assert server.endpoint in name
    fast, slow = (
        predict_plan(plan, machine_for(plan, name)),
        predict_plan(cpu_only := on_cpu(plan), machine_for(cpu_only)),
    )
    assert fast.decode.bound_name == name
    assert slow.decode.ms_per_token > 5 * fast.decode.ms_per_token


def on_cpu(plan: EnginePlan) -> EnginePlan:
    return dataclasses.replace(plan, devices=())


# --- speeds ------------------------------------------------------------------------------------------------


def test_both_phases_are_the_cost_models(model: Path) -> None:
    plan = with_slots(engine_config(model, n_threads=1, n_batch=32), 12)
    speed = machine_for(plan, disk=1e8)
    prediction = predict_plan(plan, speed)
    load = workload(plan.spec, plan.sources, plan.layers)
    assert (prediction.n_past, prediction.n_prompt) == (511, plan.n_batch)
    found = expert_placement(plan).found_share
    assert plan.tiers is not None
    assert plan.tiers.prefetch_depth == 0
    alone = Step(n_past=511, look_ahead=0.0)
    assert prediction.decode == predict(load, Residency(0.0, found), speed, alone), "nothing is read ahead"
    ahead = dataclasses.replace(plan, tiers=dataclasses.replace(plan.tiers, prefetch_depth=1))
    found_then = expert_placement(ahead).found_share
    expected = predict(load, Residency(0.0, found_then), speed, Step(n_past=511))
    assert predict_plan(ahead, speed).decode == expected
    prompt = Step(n_tokens=plan.n_batch, look_ahead=1.0)
    assert prediction.prefill == predict(load, Residency(0.0, 0.5), speed, prompt), "which needs every expert"
    assert prediction.decode.bound_name == "disk"
    assert prediction.decode.bound_ms == pytest.approx(4 * 3 * (1 - found) * EXPERT_BYTES / 1e8 * 1000)


def test_everything_is_measured_once(model: Path, tmp_path: Path) -> None:
    config, cache = engine_config(model, n_threads=1, n_ctx=64), MeasurementCache(tmp_path / "m.json")
    plan = with_slots(config, 12)
    told: list[str] = []
    speed = measure_machine(config, plan, told.append, cache)
    assert speed.disk
    assert any(name.startswith("disk") for name in told)
    assert 0 < predict_plan(plan, speed).decode.ms_per_token < 1e6
    resident = plan_engine(config)
    assert measure_machine(config, resident, told.append, cache).disk is None


def test_what_is_told_may_prevent_it(model: Path, tmp_path: Path) -> None:
    config = engine_config(model, n_threads=1, n_ctx=64)

    def refuse(name: str) -> None:
        raise KeyboardInterrupt(name)

    with pytest.raises(KeyboardInterrupt):
        measure_machine(config, plan_engine(config), refuse, MeasurementCache(tmp_path / "m.json"))
    assert not (tmp_path / "m.json").exists()


@pytest.mark.parametrize(("n_most", "prefill"), [(1, 1.0), (1 << 20, 3.0)])
def test_repacked_weights_have_their_own_speed(model: Path, n_most: int, prefill: float) -> None:
    """Half the time for a token, and three times for a batch where the plain ones are not taken."""
    plan = plan_engine(engine_config(model, n_threads=1, n_ctx=64))
    plain = machine_for(plan)
    kinds = {MatrixKind(Type.F32, False): n_most, MatrixKind(Type.F32, True): n_most}
    plan = dataclasses.replace(plan, weight_forms=dataclasses.replace(plan.weight_forms, repacked_tokens=kinds))
    n_rows = next(iter(plain.cpu.kernels.values())).n_rows
    measured = FormSpeed(n_rows, (2, 1), (1, 3))
    speed = repacked_speed(plain, plan, {"F32": KernelSpeed(measured, measured)})
    for name, curve in speed.cpu.kernels.items():
        ratios = np.divide(curve.seconds_per_byte, plain.cpu.kernels[name].seconds_per_byte)
        assert list(ratios) == pytest.approx([0.5, prefill])
    assert list(speed.cpu.output_kernels.values()) == list(plain.cpu.kernels.values())


def test_the_output_matrix_has_its_own_speed(model: Path) -> None:
    """Where it alone is repacked, the others are as fast as they were."""
    plan = plan_engine(engine_config(model, n_threads=1, n_ctx=64))
    plain = machine_for(plan)
    forms = dataclasses.replace(plan.weight_forms, repacked_tokens={MatrixKind(Type.F32, False, True): 1 << 20})
    plan = dataclasses.replace(plan, weight_forms=forms)
    measured = FormSpeed((1,), (2,), (1,))
    speed = repacked_speed(plain, plan, {"F32": KernelSpeed(measured, measured)})
    assert speed.cpu.kernels == plain.cpu.kernels
    name = next(name for name in plain.cpu.kernels if name.endswith("dense"))
    kernel = MatrixKernel(Type.F32, int(name.split()[1]), False)
    assert speed.cpu.output_seconds({kernel: 1e6}, 1) == pytest.approx(0.5 * plain.cpu.output_seconds({kernel: 1e6}, 1))
    assert predict_plan(plan, speed).decode.ms_per_token < predict_plan(plan, plain).decode.ms_per_token
