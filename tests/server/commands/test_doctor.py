"""`slimoe doctor` tells what libllama and the system tell, for a person and for a program."""

import json
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from gguf import GGMLQuantizationType as Type

from slimoe.offload.errors import LibraryError
from slimoe.offload.ggml.library import ENVIRONMENT
from slimoe.offload.ggml.packages import NATIVE, PREBUILT
from slimoe.offload.machine.measurement_cache import MeasurementCache
from slimoe.offload.machine.probe import FormSpeed, KernelSpeed, measurement_name
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
    assert done.stdout.splitlines()[-1].endswith(PREBUILT.install)
