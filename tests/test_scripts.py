"""The README's two commands, as far as they go without a network: what they refuse, and when they do nothing."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def executable(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def install(checkout: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("CMAKE_ARGS", "PYTHON", "SLIMOE_VENV")}
    command = [str(checkout / "scripts" / "install"), *words]
    return subprocess.run(command, env=clean | environment, capture_output=True, text=True, check=False)


def fake_venv(checkout: Path, *, built: bool = True) -> Path:
    """A .venv whose pip writes down what it is asked, and which may have a built library."""
    log = checkout / "pip.log"
    executable(checkout / ".venv/bin/pip", f'echo "$CMAKE_ARGS | $@" >>{log}')
    folder = checkout / ".venv/lib/python3.11/site-packages/llama_cpp/lib"
    for name in ("libggml-base.so", "libggml-rpc.so") if built else ():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return log


def test_a_python_without_venv_is_answered_with_what_to_install(checkout: Path) -> None:
    only_runs_code = executable(checkout / "python3", '[ "$1" = -c ]')
    done = install(checkout, PYTHON=str(only_runs_code))
    assert done.returncode == 1
    assert "apt install python3-venv" in done.stderr
    assert done.stdout == ""


def test_an_extra_that_there_is_not_is_refused_with_those_there_are(checkout: Path) -> None:
    log = fake_venv(checkout)
    wrong, helped = install(checkout, "convert,bogus"), install(checkout, "--help")
    names = "native convert test bench eval"
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("slimoe: There is no extra bogus. ")
    assert wrong.stderr.endswith(f"one of: {names}\n")
    assert (helped.returncode, helped.stderr) == (0, "")
    assert names in helped.stdout
    assert not log.exists()
    assert install(checkout, "convert,eval").returncode == 0
    assert "--editable .[convert,eval,native]" in log.read_text()


def test_no_python_is_answered_with_how_to_name_one(checkout: Path) -> None:
    tools = checkout / "tools"
    tools.mkdir()
    for name in ("bash", "cat", "cksum", "dirname", "env", "sed"):
        (tools / name).symlink_to(shutil.which(name) or "")
    done = install(checkout, PATH=str(tools))
    assert done.returncode == 1
    assert "Python 3.11 or newer is needed" in done.stderr


def test_second_time_does_nothing_until_something_changes(checkout: Path) -> None:
    log = fake_venv(checkout)
    assert install(checkout).returncode == 0
    assert len(log.read_text().splitlines()) == 1
    assert install(checkout).returncode == 0
    assert len(log.read_text().splitlines()) == 1
    with (checkout / "pyproject.toml").open("a") as file:
        file.write("# a new dependency\n")
    assert install(checkout).returncode == 0
    assert len(log.read_text().splitlines()) == 2


def test_without_a_compiler_nothing_is_built_and_the_build_is_offered(checkout: Path) -> None:
    log = fake_venv(checkout, built=False)
    done = install(checkout)
    assert done.returncode == 0
    assert log.read_text().partition(" | ")[2] == "install --editable .\n"
    assert "scripts/install native" in done.stderr.splitlines()[-1]


def test_changed_cmake_args_rebuild_the_library(checkout: Path) -> None:
    log = fake_venv(checkout)
    install(checkout)
    install(checkout, CMAKE_ARGS="-DGGML_CUDA=ON")
    install(checkout)  # what was built stays
    first, rebuild, again = log.read_text().splitlines()
    assert "CUDA" not in first
    assert "-DGGML_RPC=ON" in rebuild.split()
    assert rebuild.partition(" | ")[0].endswith("-DGGML_CUDA=ON")
    assert "--no-cache-dir" in rebuild
    assert "--editable .[native]" in again


def test_another_folder_for_the_virtual_environment(checkout: Path) -> None:
    log = fake_venv(checkout)
    (checkout / ".venv").rename(checkout / ".venv-device")
    assert install(checkout, SLIMOE_VENV=".venv-device").returncode == 0
    assert "--editable" in log.read_text()
    assert not (checkout / ".venv").exists()


def device_tests(checkout: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(checkout / "scripts" / "test-device"), *words]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


def test_where_no_library_is_built_for_a_device_it_is_said(checkout: Path) -> None:
    done = device_tests(checkout, "--built")
    assert done.returncode == 0
    assert done.stdout.startswith("Devices tested: none but RPC")


def test_the_devices_that_were_tested_are_named(checkout: Path) -> None:
    """With a Python that finds two devices, and writes down the tests that it is to run."""
    python = checkout / ".venv-device/bin/python"
    found = (
        "Device(name='CUDA0', description='a card', free=1)",
        "Device(name='Vulkan1', description='an, other', free=2)",
    )
    (checkout / "found").write_text("\n".join(found) + "\n")
    executable(python, f'[ "$1" = -c ] && cat {checkout}/found || echo "$@" >{checkout}/asked')
    done = device_tests(checkout, "--built", "-x")
    assert done.stdout.endswith("Devices tested: RPC over this machine's CPU, CUDA0 (a card), Vulkan1 (an, other).\n")
    asked = (checkout / "asked").read_text()
    assert "-k CUDA0 or Vulkan1 or rpc" in asked
    assert asked.endswith("-x\n")
