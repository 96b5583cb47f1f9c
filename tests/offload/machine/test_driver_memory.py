"""What drivers take of the host's memory: measured in a process of its own, remembered, planned with, and kept to."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bench.baselines.rpc_server import ROOT
from bench.limits.cgroup import MemoryGroup, NoControlGroupError, memory_group
from slimoe.offload.errors import DeviceError
from slimoe.offload.ggml.device_backend import DeviceBackend
from slimoe.offload.ggml.devices import Device, DriverMemory, available_devices, choose_devices
from slimoe.offload.machine.driver_memory import driver_version, with_driver_memory
from slimoe.offload.machine.driver_trial import measure
from slimoe.offload.machine.measurement_cache import MeasurementCache
from slimoe.offload.plan.engine_config import EngineConfig
from slimoe.offload.plan.engine_plan import EnginePlan, plan_engine
from slimoe.offload.plan.machine import Machine, this_machine
from slimoe.offload.resources.memory import HostMemory
from slimoe.offload.resources.system_files import SystemFiles
from slimoe.server.terminal.plan_report import PlanReport
from tests.models.configs import reconfigured
from tests.models.tiny_gguf import TinyShape, write_tiny_gguf
from tests.offload.devices import COMPILING, Devices

MIB = 1 << 20
CARD = Device("CUDA0", "a card", 1 << 34, 1 << 34, handle=0)
TAKEN = DriverMemory(300 * MIB, 40 * MIB)


class Trials:
    """Stands for processes that are started to try a device: each ends as the next of `ends` says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *ends: subprocess.CompletedProcess[str] | Exception) -> None:
        self.commands: list[Sequence[str]] = []
        self._ends = iter(ends)
        monkeypatch.setattr(subprocess, "run", lambda command, **options: self._run(command))

    def _run(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        end = next(self._ends)
        if isinstance(end, Exception):
            raise end
        return end


def ended(status: int, out: str = "", err: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess((), status, out, err)


@pytest.fixture
def cache(tmp_path: Path) -> MeasurementCache:
    return MeasurementCache(tmp_path / "measurements.json", "a machine")


def test_measured_once_for_a_device_and_a_driver(cache: MeasurementCache, monkeypatch: pytest.MonkeyPatch) -> None:
    out = f"what a driver prints\n{msgspec.json.encode(TAKEN).decode()}\n"
    trials = Trials(monkeypatch, ended(0, out), ended(0, out), ended(0, out))
    for _ in range(2):
        assert with_driver_memory(CARD, cache) == replace(CARD, driver=TAKEN)
    assert [command[-1] for command in trials.commands] == ["CUDA0"]
    with_driver_memory(replace(CARD, description="another card"), cache)
    monkeypatch.setattr("slimoe.offload.machine.driver_memory.driver_version", lambda: "a new driver")
    with_driver_memory(CARD, cache)
    assert len(trials.commands) == 3


def test_a_device_that_is_lent_has_its_driver_elsewhere(
    cache: MeasurementCache, endpoints: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = Trials(monkeypatch)
    *_, device = available_devices(endpoints[:1])
    assert with_driver_memory(device, cache).driver == DriverMemory()
    assert trials.commands == []


@pytest.mark.parametrize(
    ("end", "why"),
    [
        (
            ended(-signal.SIGSEGV),
            r"CUDA0 \(a card\) ended a trial by SIGSEGV\. Update its driver, or use --device none",
        ),
        (ended(1, "", "Traceback\nno memory"), r"CUDA0 \(a card\) failed in a trial \(no memory\)"),
        (
            subprocess.TimeoutExpired((), 300, b'{"opened":1}\n{"op'),
            r"CUDA0 \(a card\) did not end a trial within 300 seconds",
        ),
    ],
)
def test_a_driver_that_crashes_is_survived(
    cache: MeasurementCache,
    end: subprocess.CompletedProcess[str] | Exception,
    why: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trials = Trials(monkeypatch, end, end)
    for _ in range(2):  # it may have been bad luck
        with pytest.raises(DeviceError, match=why):
            with_driver_memory(CARD, cache)
    assert len(trials.commands) == 2


def test_of_a_software_device_that_compiles_for_long_the_last_figure_counts(
    cache: MeasurementCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = replace(TAKEN, is_device_resident=True)
    out = b"Found 1 device\n" + msgspec.json.encode(slow) + b'\n{"opened":99'
    Trials(monkeypatch, subprocess.TimeoutExpired((), 300, out))
    for _ in range(2):
        assert with_driver_memory(CARD, cache).driver == slow


def test_without_other_processes_nothing_is_known(cache: MeasurementCache, monkeypatch: pytest.MonkeyPatch) -> None:
    Trials(monkeypatch, OSError(), ended(0, msgspec.json.encode(TAKEN).decode()))
    assert with_driver_memory(CARD, cache).driver == DriverMemory()


def test_a_driver_s_version_is_its_files_own(tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    driver, other = tmp_path / "libvulkan_lvp.so", tmp_path / "libother.so"
    lines = (f"7f00-7f01 r-xp 00000000 08:01 42 {path}" for path in (driver, other, tmp_path / "libcuda.so.1"))
    (tmp_path / "self" / "maps").write_text("\n".join((*lines, "7f02-7f03 rw-p 00000000 00:00 0")))
    system, seen = SystemFiles(proc=tmp_path), set[str]()
    for path in (driver, other):
        path.write_text("old")
        os.utime(path, (1, 1))
    for changed in (None, other, driver):
        if changed is not None:
            os.utime(changed, (2, 2))
        seen.add(driver_version(system))
        assert len(seen) == (2 if changed is driver else 1)
    assert driver_version(SystemFiles(proc=tmp_path / "nothing"))


def test_a_trial_runs_every_kind_of_kernel(one_device: Devices, monkeypatch: pytest.MonkeyPatch) -> None:
    """On RPC's devices all of them; elsewhere those that the driver has, and compiles in time."""
    (device,) = choose_devices(one_device.names[0], one_device.endpoints)
    computed, compute = list[int](), DeviceBackend.compute

    def watched(backend: DeviceBackend, graph: int) -> None:
        computed.append(graph)
        compute(backend, graph)

    monkeypatch.setattr(DeviceBackend, "compute", watched)
    taken = measure(device)
    n_kernels = 2 * (13 + 2 * 5)
    assert len(computed) == n_kernels if one_device.is_exact else 0 < len(computed) <= n_kernels
    assert 0 <= taken.total < 1 << 31
    if one_device.is_exact:
        assert not taken.is_device_resident


# --- plans -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All but its experts takes little: 4 layers of 16 experts of 1.5 MiB each, in F32."""
    shape = TinyShape(n_layer=4, n_embd=256, n_ff=512, n_head=4, n_head_kv=2, n_expert=16, n_expert_used=2)
    return write_tiny_gguf(tmp_path_factory.mktemp("driver") / "m.gguf", None, shape=shape)


def planned(config: EngineConfig, device: Device, ram: int = 1 << 40) -> EnginePlan:
    machine = Machine(HostMemory(ram, ram, ram), (device,), 1, held=1 << 20)
    return plan_engine(config, machine)


def test_plans_count_what_the_driver_takes(one_device: Devices, model: Path) -> None:
    config = one_device.config(model, vram=("24MiB",))
    (device,) = this_machine(config).devices
    without = planned(config, replace(device, driver=DriverMemory()))
    plan = planned(config, replace(device, driver=TAKEN))
    assert plan.tiers is not None
    assert without.tiers is not None
    assert plan.tiers.fixed - without.tiers.fixed == plan.driver_bytes == TAKEN.total
    report = PlanReport(plan).as_json()
    assert report["bytes"]["drivers"] == TAKEN.total
    assert report["bytes"]["program"] == PlanReport(without).as_json()["bytes"]["program"]
    assert report["required_bytes"] - PlanReport(without).as_json()["required_bytes"] == TAKEN.total
    (line,) = (line for line in PlanReport(plan).memory_lines() if line.startswith("drivers of devices, at most"))
    assert line.endswith("340.0 MiB")


def test_where_the_driver_leaves_no_memory_the_cpu_computes(one_device: Devices, model: Path) -> None:
    """Unless the device was asked for: then what is lacking is told."""
    config = reconfigured(one_device.config(model), device="auto")
    (device,) = this_machine(one_device.config(model)).devices
    device = replace(device, driver=TAKEN, free_bytes=24 * MIB, total_bytes=24 * MIB, shares_host_memory=False)
    assert planned(config, device, ram=1 << 30).devices
    plan = planned(config, device, ram=300 * MIB)
    assert plan.shortfall is None
    assert not plan.devices
    (note,) = plan.notes
    assert note.startswith(f"Computing on the CPU: with {device.name}, whose driver takes 340.0 MiB, ")
    assert "needs at least" in note
    named = planned(reconfigured(config, device=device.name), device, ram=300 * MIB)
    assert named.shortfall is not None
    assert not named.shortfall.device


def test_a_driver_that_fails_is_left_out_unless_it_was_asked_for(
    one_device: Devices, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(device: Device) -> Device:
        raise DeviceError(f"The driver of {device.name} ended a trial by SIGSEGV.")

    monkeypatch.setattr("slimoe.offload.plan.machine.with_driver_memory", fails)
    config = one_device.config(model)
    plan = plan_engine(reconfigured(config, device="auto"))
    assert not plan.devices
    assert all(note.startswith("Without ") and note.endswith("by SIGSEGV.") for note in plan.notes)
    assert len(plan.notes) == len(choose_devices("auto", one_device.endpoints))
    with pytest.raises(DeviceError, match="SIGSEGV"):
        plan_engine(config)


# --- the promise -------------------------------------------------------------------------------------------


def test_a_budget_holds_with_a_device_open(one_device: Devices, model: Path, tmp_path: Path) -> None:
    """What a process holds at most is what it may, driver and compiler included; in a control group where one can be.

    What a software device holds is in this process's memory, and comes on top.
    """
    where = ["--device", one_device.names[0]]
    if one_device.endpoints:
        where = ["--device", "RPC0", "--rpc", one_device.endpoints[0]]  # the first server that a process knows
    words = [model, "--ctx", "256", "--batch", "64", "--threads", "1", "--vram", "24MiB", *where, "--json"]
    least = json.loads(commanded("plan", *words, "--no-measure", "--ram", "1MiB").stdout)["required_bytes"]
    ram = least + 12 * MIB
    plan = json.loads(commanded("plan", *words, "--no-measure", "--ram", ram).stdout)
    (device,) = plan["tiers"]["devices"]
    assert plan["tiers"]["host"]["n_slots"] < plan["tiers"]["n_experts"] == 64
    (found,) = this_machine(one_device.config(model)).devices
    on_host = device["required_bytes"] if found.driver.is_device_resident else 0
    words += ["--prompt-ids", ",".join(["5"] * 90), "-n", "12", "--ram", ram, "--ignore-eos"]
    with ExitStack() as stack:
        group = None
        with contextlib.suppress(NoControlGroupError):
            group = stack.enter_context(memory_group(ram + on_host))
        done = commanded("run", *words, group=group)
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    assert len(told["tokens"]) == 12
    assert told["memory"]["process_peak"] <= ram + on_host, done.stderr


def commanded(*words: object, group: MemoryGroup | None = None) -> subprocess.CompletedProcess[str]:
    """A command that has ended, which ran in a control group if one is given."""
    command = [sys.executable, "-P", "-m", "slimoe.server.cli", *map(str, words)]
    command = command if group is None else group.entering(command)
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=COMPILING)
