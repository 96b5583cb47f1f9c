"""`plan`, `run` and `serve` come to one verdict for a budget; what they advise is enough, and little less is not."""

import dataclasses
import json
import re
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Type

from slimoe.offload.engine import Engine
from slimoe.offload.errors import DoesNotFitError
from slimoe.offload.ggml.devices import choose_devices
from slimoe.offload.plan.engine_config import EngineConfig
from slimoe.offload.plan.engine_plan import EnginePlan, plan_engine
from slimoe.offload.plan.expert_placement import expert_placement
from slimoe.offload.plan.machine import Machine
from slimoe.server.options.engine_options import DEMO
from slimoe.server.options.serving_memory import serving_bytes
from tests.models.configs import engine_config, reconfigured, roomy_machine
from tests.models.live_server import serving
from tests.models.native_files import plain_ffn, write_native
from tests.models.tier_models import apart_model, content_of, mixed_model, plain_model, tied_model, uneven_model
from tests.models.tiny_gguf import TinyShape
from tests.offload.devices import Devices

MIB = 1 << 20
ROOMY = TinyShape(n_layer=3, n_embd=128, n_head=2, n_head_kv=1, n_ff=1024, n_expert=4, n_expert_used=2)
"""Experts of some MiB, so that whole MiB of a budget tell them apart."""


def pair_model(directory: Path) -> Path:
    """Two copies of each expert."""
    layers = [plain_ffn(4, Type.Q8_0, Type.Q4_0) for _ in range(ROOMY.n_layer)]
    return write_native(directory / "pair.gguf", content_of(directory, ROOMY), layers)


MODELS = {
    "stock": plain_model,
    "mixed": mixed_model,
    "tied": tied_model,
    "apart": apart_model,
    "native": uneven_model,
    "pair": pair_model,
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MODELS[request.param](tmp_path_factory.mktemp(request.param))


MACHINE = roomy_machine(held=2 << 30)
"""One with room, and a process that holds the same each time that it opens a model, as a command's does."""


@pytest.fixture(params=["run", "serve"])
def config(request: pytest.FixtureRequest, model: Path) -> EngineConfig:
    """What a command asks of the engine, but for the budget."""
    reserve = serving_bytes() if request.param == "serve" else 0
    return engine_config(model, n_ctx=256, n_threads=1, device="none", reserve_bytes=reserve)


def machine_of(config: EngineConfig) -> Machine:
    return dataclasses.replace(MACHINE, devices=choose_devices(config.devices.device, config.devices.rpc))


def shortfall(config: EngineConfig) -> DoesNotFitError:
    found = plan_engine(config, machine_of(config)).shortfall
    assert found is not None
    return found


def advised(error: DoesNotFitError | str, flag: str) -> tuple[int, ...]:
    """The sizes in MiB that a message says a flag is to be raised to."""
    found = re.search(rf"{flag} to (\d+MiB(?:,\d+MiB)*)", str(error))
    return () if found is None else tuple(int(size.removesuffix("MiB")) for size in found[1].split(","))


def lies(plan: EnginePlan) -> tuple[object, ...]:
    """What a plan says of a model's place in memory."""
    tiers = plan.tiers
    slots = None if tiers is None else (tiers.n_slots, tiers.fixed)
    where = expert_placement(plan)
    return plan.is_resident, plan.n_batch, plan.weight_forms, slots, where.on_host, where.disk_share


@pytest.mark.parametrize("lossy", [None, "low", "elastic"])
def test_opening_does_what_the_plan_says(config: EngineConfig, lossy: str | None) -> None:
    config = reconfigured(config, lossy=lossy if config.model.stem == "pair" else None)
    least = shortfall(reconfigured(config, ram="1MiB")).required_bytes
    whole = plan_engine(reconfigured(config, ram="16GiB", weights="copied"), MACHINE).load_bytes
    for ram in (least - 1, least, least + whole // 3, least + whole, least + 16 * whole + (64 << 20)):
        case = reconfigured(config, ram=str(ram))
        plan = plan_engine(case, MACHINE)
        if ram < least:
            assert plan.shortfall is not None
            with pytest.raises(DoesNotFitError) as refused:
                Engine.open(case, machine=MACHINE)
            assert str(refused.value) == str(plan.shortfall)
            continue
        assert plan.shortfall is None, ram
        with closing(Engine.open(case, machine=MACHINE)) as engine:
            assert lies(engine.plan) == lies(plan)
            memory, tiers = engine.memory(), engine.tiers
            if plan.tiers is not None:
                assert tiers is not None
                assert tiers.host_pool is not None
                assert memory["host_pool"] == plan.tiers.host_pool
                assert len(tiers.host_pool.keys) == plan.tiers.n_resident
            assert memory["compute"] <= (plan.tiers or plan.weight_forms).compute


def test_what_is_advised_is_enough_and_a_mib_less_is_not(config: EngineConfig) -> None:
    (ram,) = advised(shortfall(reconfigured(config, ram="1MiB")), "--ram")
    with pytest.raises(DoesNotFitError):
        Engine.open(reconfigured(config, ram=f"{ram - 1}MiB"), machine=MACHINE)
    Engine.open(reconfigured(config, ram=f"{ram}MiB"), machine=MACHINE).close()


@pytest.mark.parametrize("weights", ["mapped", "repacked", "both"])
def test_what_is_advised_for_weights_that_stay_whole_is_enough(model: Path, weights: str) -> None:
    config = engine_config(model, n_ctx=256, n_threads=1, device="none", weights=weights)
    (ram,) = advised(shortfall(reconfigured(config, ram="1MiB")), "--ram")
    assert shortfall(reconfigured(config, ram=f"{ram - 1}MiB"))
    Engine.open(reconfigured(config, ram=f"{ram}MiB"), machine=MACHINE).close()


def test_more_than_there_is_is_not_advised(model: Path) -> None:
    config = engine_config(model, n_ctx=1 << 33, n_threads=1, device="none")
    for ram in (None, "1MiB", "9999GiB"):
        hint = shortfall(reconfigured(config, ram=ram)).hint
        assert hint.startswith("There is no more to give now: free memory of the host, lower --ctx")
        assert "--ram" not in hint


# --- devices -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vram", [("1MiB",), ("8MiB", "8MiB"), ("8MiB", "12MiB")])
@pytest.mark.parametrize("ram", ["1MiB", "8GiB"])
def test_what_is_advised_for_devices_is_enough(
    tmp_path: Path, two_devices: Devices, vram: tuple[str, ...], ram: str
) -> None:
    used = two_devices.names[: len(vram)]
    model = pair_model(tmp_path)
    settings = two_devices.settings | {"device": ",".join(used), "ram": ram}
    config = engine_config(model, n_ctx=256, n_batch=64, n_threads=1, **settings)
    error = shortfall(reconfigured(config, vram=vram))
    sizes = advised(error, "--vram") or tuple(int(size.removesuffix("MiB")) for size in vram)
    (host,) = advised(error, "--ram") or (int(ram.removesuffix("GiB")) * 1024,)
    enough = reconfigured(config, vram=tuple(f"{size}MiB" for size in sizes), ram=f"{host}MiB")
    with closing(Engine.open(enough, machine=machine_of(enough))) as engine:
        assert len(engine.plan.devices) == len(used)
        assert engine.notes == ()
    if len(used) == 1:
        assert shortfall(reconfigured(enough, vram=(f"{sizes[0] - 1}MiB",)))


# --- processes ---------------------------------------------------------------------------------------------


def command(*words: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "slimoe.server.cli", *words]
    return subprocess.run(line, capture_output=True, text=True, check=False)


def told(*words: str) -> tuple[int, str]:
    """How a command of the demo model ends, and what it says that went wrong."""
    done = command(words[0], str(DEMO), *words[1:])
    return done.returncode, done.stderr


def test_one_figure_in_every_process() -> None:
    """This process, which has loaded far more, is not asked."""
    flags = ("--device", "none", "--ctx", "256")
    no, why = told("run", "-p", "The river", "-n", "1", "--ram", "20MiB", *flags)
    assert no == 4
    (least,) = advised(why, "--ram")
    for words in (("plan", "--no-measure"), ("run", "-p", "x", "-n", "1"), ("bench", "-p", "8", "-n", "1", "-r", "1")):
        status, why = told(*words, "--ram", f"{least - 1}MiB", *flags)
        assert (status, advised(why.splitlines()[-1], "--ram")) == (4, (least,)), words
        assert told(*words, "--ram", f"{least}MiB", *flags)[0] == 0, words


def test_serving_needs_what_plan_says() -> None:
    flags = ("--device", "none", "--ctx", "256")
    no, why = told("serve", "--port", "0", "--ram", "20MiB", *flags)
    assert no == 4
    (least,) = advised(why, "--ram")
    no, why = told("plan", "--serve", "--no-measure", "--ram", f"{least - 1}MiB", *flags)
    assert (no, advised(why.splitlines()[-1], "--ram")) == (4, (least,))
    done = command("plan", str(DEMO), "--json", "--no-measure", "--ram", f"{least - 1}MiB", *flags)
    assert done.returncode == 0  # run alone needs less
    assert not json.loads(done.stdout)["serve"]["fits"]
    assert advised(json.loads(done.stdout)["serve"]["shortfall"], "--ram") == (least,)
    assert told("serve", "--port", "0", "--ram", f"{least - 1}MiB", *flags)[0] == 4
    words = ["serve", str(DEMO), "--port", "0", "--ram", f"{least}MiB", *flags]
    line = [sys.executable, "-m", "slimoe.server.cli", *words]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as served:
        assert served.stdout is not None
        assert json.loads(served.stdout.readline())["event"] == "ready"
        served.send_signal(signal.SIGTERM)
        assert served.wait() == 0
    assert command("plan", str(DEMO), "--serve", "--no-measure", "--ram", f"{least}MiB", *flags).returncode == 0


@pytest.mark.parametrize(
    "flags", [("--parallel", "4"), ("--ctx", "1024", "--kv-type", "q8_0"), ("--ctx", "512", "--batch", "64")]
)
def test_a_server_starts_with_what_it_advised_once(flags: tuple[str, ...]) -> None:
    """And `plan --serve` advises the same."""
    flags = ("--device", "none", *flags)
    _, why = told("plan", "--serve", "--no-measure", "--ram", "90MiB", *flags)
    (least,) = advised(why.splitlines()[-1], "--ram")
    with serving(DEMO, "--ram", f"{least}MiB", *flags) as (_, url):
        assert url


def test_a_context_that_is_said_to_fit_fits() -> None:
    flags = ("--device", "none", "--ram", "110MiB")
    no, why = told("plan", "--no-measure", "--ctx", "65536", *flags)
    found = re.search(r"It would fit with --ctx (\d+)\.", why)
    assert no == 4
    assert found is not None
    assert told("run", "-p", "x", "-n", "1", "--ctx", found[1], *flags)[0] == 0
    assert told("run", "-p", "x", "-n", "1", "--ctx", str(2 * int(found[1])), *flags)[0] == 4
