"""`slimoe doctor` tells what libllama and the system tell, for a person and for a program."""

import json
from pathlib import Path
from typing import Any

import llama_cpp
import msgspec
import pytest
from gguf import GGMLQuantizationType as Type

from slimoe.offload.errors import LibraryError
from slimoe.offload.ggml.devices import DriverMemory
from slimoe.offload.ggml.library import ENVIRONMENT
from slimoe.offload.ggml.packages import NATIVE, PREBUILT
from slimoe.offload.machine.measurement_cache import MeasurementCache
from slimoe.offload.machine.probe import FormSpeed, KernelSpeed, measurement_name
from slimoe.offload.machine.speed import LinkSpeed, Overheads, SpeedCurve
from slimoe.offload.resources.processors import default_threads
from slimoe.server.cli import run
from tests.offload.ggml.test_library import lay_out, told

DOCTOR = "import sys; from slimoe.server.cli import run; sys.exit(run(['doctor']))"


def reported(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    assert run(["doctor", "--json", *flags]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def test_the_library_and_its_instructions_are_libllamas(capsys: pytest.CaptureFixture[str]) -> None:
    report = reported(capsys)
    first = report["libraries"][0]
    assert (first["package"], first["version"], first["problem"]) == (NATIVE.name, llama_cpp.__version__, None)
    assert Path(first["folder"], "x").parent == Path(llama_cpp.__file__).parent / "lib"
    told_by_llama = llama_cpp.llama_print_system_info().decode()
    assert report["uses"]
    assert all(f"{name} = 1" in told_by_llama for name in report["uses"])


def test_what_was_measured_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLIMOE_CACHE", str(tmp_path))
    monkeypatch.setenv(ENVIRONMENT, NATIVE.name)
    name = measurement_name(Type.Q4_K, default_threads())
    speed = FormSpeed((1, 128), (2e-3, 3e-2), (1e-3, 4e-2))
    MeasurementCache().put({name: KernelSpeed(speed, speed)})
    report = reported(capsys, "--measure")
    assert report["products"] == {NATIVE.name: {"one_ms": 1.0, "batch_ms": 30.0}}
    assert report["measured"][name]["expert"]["plain"] == [2e-3, 3e-2]


def test_figures_are_told_with_their_units(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLIMOE_CACHE", str(tmp_path))
    forms = FormSpeed((1, 8, 128), (2e-3, 1.0, 3e-2), (1e-3, 1.0, 4e-2))
    known: dict[str, object] = {
        "CPU, 2 threads: Q4_K plain and repacked by rows": KernelSpeed(forms, forms),
        "CPU, 2 threads: overheads": Overheads(63e-6, 1.25e-6, 3e-8),
        "CPU, 2 threads, 16 MiB: Q4_K 256 dense x 256": SpeedCurve((1, 8, 64), (1e-10, 2e-10, 2e-9)),
        "CPU, 2 threads, 16 MiB: attention 8/4 x 32 F16": {"value": 1.2e-8},
        "disk 65024, 128 KiB, direct": {"value": 1.23e9},
        "RPC0 (127.0.0.1:3): link": LinkSpeed(1e9, 2e9, 1e-4),
        "GPU0 (card), driver x: host memory": DriverMemory(1 << 28, 1 << 20),
        "of another version": {"z": 1},
        "damaged": {"value": 0},
    }
    MeasurementCache().put(known)
    assert run(["doctor"]) == 0
    lines = iter(capsys.readouterr().out.splitlines())
    told = {line.split(maxsplit=1)[1]: next(lines).strip() for line in lines if line.startswith("measured ")}
    assert told == {
        "CPU, 2 threads: Q4_K plain and repacked by rows": "an expert's matrix: with 1 row 2 ms plain, 1 ms repacked; "
        "with 128 rows 30 ms plain, 40 ms repacked",
        "CPU, 2 threads: overheads": "a graph 63 µs, each operation 1.25 µs, each view 30 ns",
        "CPU, 2 threads, 16 MiB: Q4_K 256 dense x 256": "10.00 GB/s of weights with 1 row, 0.50 GB/s of weights with "
        "64 rows",
        "CPU, 2 threads, 16 MiB: attention 8/4 x 32 F16": "12 ns for a token, a layer and a token before it",
        "disk 65024, 128 KiB, direct": "1.23 GB/s",
        "RPC0 (127.0.0.1:3): link": "1.00 GB/s to the device, 2.00 GB/s back, a round trip 100 µs",
        "GPU0 (card), driver x: host memory": "256.0 MiB when it is opened, 1.0 MiB for kernels",
        "of another version": "{'z': 1}",
        "damaged": "0 ns for a token, a layer and a token before it",
    }
    assert reported(capsys)["measured"] == json.loads(msgspec.json.encode(known)), "as it is remembered"


def test_a_prebuilt_library_is_told_with_what_a_build_would_bring(tmp_path: Path) -> None:
    done = told(tmp_path, DOCTOR, SLIMOE_LIBRARY=PREBUILT.name)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"library     xllamacpp {PREBUILT.wanted}: ggml 0." in done.stdout
    last = done.stdout.splitlines()[-1]
    assert last.startswith("A ggml built on this machine would ")
    assert last.endswith("scripts/install native")


def test_no_library_is_told_with_the_reason_and_the_command(tmp_path: Path) -> None:
    lay_out(tmp_path, NATIVE).path("ggml-cpu").unlink()
    done = told(tmp_path, DOCTOR, SLIMOE_LIBRARY=NATIVE.name)
    assert (done.returncode, done.stderr) == (LibraryError.exit_code, "")
    assert "library     llama-cpp-python ? lacks " in done.stdout
    assert done.stdout.splitlines()[-1].endswith(f"{NATIVE.install}; or set SLIMOE_LIBRARY to xllamacpp.")
