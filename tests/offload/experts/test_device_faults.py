"""Devices that fail: RPC servers that end in use, memory that is not given, graphs that are not computed."""

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest

from bench.baselines.rpc_server import ROOT, RpcServer, rpc_server
from slimoe.offload.engine import Engine
from slimoe.offload.errors import DeviceError, DeviceFullError
from slimoe.offload.ggml import buffers as ggml_backend
from slimoe.offload.ggml import device as ggml_device
from slimoe.offload.ggml.abort import device_error, thrown_error
from slimoe.offload.ggml.device_backend import DeviceBackend
from slimoe.offload.ggml.devices import choose_devices
from slimoe.offload.plan.engine_config import EngineConfig
from slimoe.offload.plan.engine_plan import plan_engine
from slimoe.offload.plan.machine import Machine, this_machine
from slimoe.offload.text.generation import GenerationRequest, SamplingParams, TokenStep
from slimoe.server.cli import run
from slimoe.server.process.request_handle import EngineFailure
from tests.models.configs import engine_config
from tests.models.live_server import DEADLINE, LiveOptions, LiveServer, live_server, serving, slimoe, until
from tests.models.tiny_gguf import TinyShape, write_tiny_gguf
from tests.offload.devices import COMPILING, Devices
from tests.offload.experts.full_device import none_allocated

LOST = "/src/ggml-rpc/ggml-rpc.cpp:566: Remote RPC server crashed or returned malformed response"
FULL = "/src/ggml-cuda/ggml-cuda.cu:98: CUDA error"
OURS = "/src/ggml.c:3140: GGML_ASSERT(ggml_can_mul_mat(a, b)) failed"


@pytest.fixture(scope="module")
def model(sentencepiece_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = TinyShape(n_layer=3, n_ctx=100_000)
    return write_tiny_gguf(tmp_path_factory.mktemp("faults") / "tiny.gguf", sentencepiece_path, shape=shape)


@pytest.fixture
def server() -> Iterator[RpcServer]:
    with rpc_server() as server:
        yield server


# --- why ggml gives up -------------------------------------------------------------------------------------


def test_a_lost_server_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as alive, socket.create_server(("127.0.0.1", 0)) as dead:
        names = [f"127.0.0.1:{one.getsockname()[1]}" for one in (alive, dead)]
        assert " or ".join(names) in str(device_error(LOST, names))
        dead.close()
        message = str(device_error(LOST, names))
    assert names[1] in message
    assert names[0] not in message


def test_other_reasons() -> None:
    error = device_error(FULL, [])
    assert isinstance(error, DeviceError)
    assert "CUDA device failed (CUDA error)" in str(error)
    assert device_error(OURS, ["127.0.0.1:1"]) is None


def test_ggml_may_still_give_up_for_its_own_reasons() -> None:
    code = (
        "import ctypes, resource\n"
        "from slimoe.offload.ggml.abort import on_device_abort\n"
        "from slimoe.offload.ggml.library import open_library\n"
        "resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"
        "on_device_abort((), lambda error: print('a device'))\n"
        "open_library('ggml-base').ggml_abort(b'some.c', 7, b'some reason')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == -6
    assert done.stderr == "some.c:7: some reason\n"
    assert done.stdout == ""


# --- a driver that throws ----------------------------------------------------------------------------------

LOSE = """
#include <system_error>
namespace vk { struct DeviceLostError : std::system_error { using std::system_error::system_error; }; }
extern "C" void lose() { throw vk::DeviceLostError(std::make_error_code(std::errc::io_error), "lost"); }
extern "C" void other() { throw std::system_error(std::make_error_code(std::errc::io_error), "other"); }
"""
"""What Vulkan's C++ bindings throw, in whose place the class stands."""


@pytest.fixture(scope="module")
def throwing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("throwing")
    (directory / "lose.cpp").write_text(LOSE)
    library = directory / "lose.so"
    subprocess.run(["c++", "-shared", "-fPIC", "-o", library, directory / "lose.cpp"], check=True)
    return library


def run_throwing(library: Path, function: str, *words: str) -> subprocess.CompletedProcess[str]:
    """A command whose fourth graph on a device ends in an exception of the driver's."""
    code = (
        "import ctypes, resource, sys\n"
        "from slimoe.offload.ggml import device\n"
        "resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"
        "fail, begin, calls = ctypes.CDLL(sys.argv[1])[sys.argv[2]], device.ggml_backend_graph_compute_async, []\n"
        "def compute(*args):\n"
        "    calls.append(args)\n"
        "    return fail() if len(calls) == 4 else begin(*args)\n"
        "device.ggml_backend_graph_compute_async = compute\n"
        "sys.argv = ['slimoe', *sys.argv[3:]]\n"
        "from slimoe.server.cli import main\nmain()\n"
    )
    command = [sys.executable, "-c", code, str(library), function, *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=COMPILING)


def test_a_device_that_is_lost_in_the_middle_of_an_answer(model: Path, one_device: Devices, throwing: Path) -> None:
    names = one_device.names if one_device.endpoints == () else ("RPC0",)  # another process counts anew
    where = ["--device", *names, *(word for one in one_device.endpoints for word in ("--rpc", one))]
    words = ["run", str(model), "--prompt-ids", "5", "-n", "9", "--ctx", "64", "--threads", "1", *where]
    done = run_throwing(throwing, "lose", *words)
    assert done.returncode == DeviceError.exit_code, done.stderr
    *_, last = done.stderr.splitlines()
    assert last.startswith("slimoe: The device failed (vk::DeviceLostError).")
    assert "Traceback" not in done.stderr
    done = run_throwing(throwing, "other", *words)
    assert done.returncode == -6
    assert "std::system_error" in done.stderr


LOSING = """
import ctypes, os, sys
if "slimoe.server.process.engine_start" in sys.orig_argv:
    from slimoe.offload.ggml import device
    begin = device.ggml_backend_graph_compute_async
    def compute(*args):
        if os.path.exists({now!r}):
            os.unlink({now!r})
            ctypes.CDLL({library!r}).lose()
        return begin(*args)
    device.ggml_backend_graph_compute_async = compute
"""
"""What Python runs first in each process: the engine's loses its device once the file is there, and once only."""


def test_serve_outlives_a_device_that_is_lost(
    model: Path, one_device: Devices, throwing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = tmp_path / "now"
    (tmp_path / "sitecustomize.py").write_text(LOSING.format(now=str(now), library=str(throwing)))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", ""))))
    where = ["--rpc", *one_device.endpoints] if one_device.endpoints else ["--device", *one_device.names]
    with serving(model, *where, "--ctx", "4096", "--batch", "32") as (process, url):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=20)
        before = complete(client)
        stream = client.completions.create(
            model="", prompt="hello", max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        now.touch()
        with pytest.raises(openai.APIError, match=r"The device failed \(vk::DeviceLostError\)") as broken:
            list(stream)
        assert broken.value.code == "device_failed"
        assert complete(client) == before
        assert process.poll() is None
    assert not now.exists()


def test_exceptions_of_drivers_by_their_names() -> None:
    assert "(vk::OutOfDeviceMemoryError)" in str(thrown_error("N2vk22OutOfDeviceMemoryErrorE"))
    assert "(sycl::_V1::exception)" in str(thrown_error("N4sycl3_V19exceptionE"))
    assert thrown_error("St12out_of_range") is None
    assert thrown_error("") is None


# --- an RPC server that ends -------------------------------------------------------------------------------


def test_run_says_that_the_server_is_gone(model: Path, server: RpcServer) -> None:
    process = slimoe("run", model, "-p", "hello", "-n", "90000", "--ignore-eos", "--threads", "1", *flags(server))
    assert process.stdout is not None
    assert process.stdout.read(1)
    server.kill()
    _, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == DeviceError.exit_code
    *_, last = err.splitlines()
    assert last.startswith(f"slimoe: The RPC server {server.endpoint} no longer answers")
    assert not any(raw in err for raw in ("Traceback", "recv failed", "send failed"))


def flags(server: RpcServer) -> tuple[str, ...]:
    return "--rpc", server.endpoint, "--ctx", "4096", "--batch", "32"


def test_serve_outlives_the_server(model: Path, server: RpcServer) -> None:
    """The running answer ends with an error, others are refused, and once the server is back all is well."""
    with serving(model, *flags(server)) as (process, url):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)
        before = complete(client)
        stream = client.completions.create(
            model="", prompt="hello", max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        server.kill()
        with pytest.raises(openai.APIError, match=f"{server.endpoint} no longer answers") as broken:
            list(stream)
        assert broken.value.code == "device_failed"
        with pytest.raises(openai.InternalServerError, match=server.endpoint) as refused:
            complete(client)
        assert (refused.value.status_code, refused.value.code) == (503, "device_failed")
        assert process.poll() is None
        with rpc_server(server.port):
            patient = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=20)
            assert complete(patient) == before


def complete(client: openai.OpenAI) -> str:
    return client.completions.create(model="", prompt="hello", max_tokens=8, temperature=0).choices[0].text


# --- a device without memory -------------------------------------------------------------------------------


class FullDevice:
    """Gives so many buffers and no more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, n_buffers: int) -> None:
        self.n_left = n_buffers
        self._allocate = DeviceBackend.allocate
        monkeypatch.setattr(DeviceBackend, "allocate", lambda backend, n_bytes: self.allocate(backend, n_bytes))

    def allocate(self, backend: DeviceBackend, n_bytes: int) -> int:
        self.n_left -= 1
        if self.n_left < 0:
            return none_allocated(backend, n_bytes)
        return self._allocate(backend, n_bytes)


def config(model: Path, **changed: Any) -> EngineConfig:
    options: dict[str, Any] = {"n_ctx": 64, "n_batch": 8, "n_threads": 1, "kv_type": "f32"}
    return engine_config(model, **options | changed)


def answer(engine: Engine) -> list[int]:
    request = GenerationRequest((5, 9), max_tokens=6, sampling=SamplingParams(temperature=0.0), ignore_eos=True)
    return [event.token for event in engine.generate(request) if isinstance(event, TokenStep)]


@pytest.mark.parametrize("n_buffers", [0, 1, 2])
def test_without_room_on_the_device_the_cpu_computes(
    model: Path, server: RpcServer, n_buffers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(Engine.open(config(model))) as engine:
        expected = answer(engine)
    full = FullDevice(monkeypatch, n_buffers)
    with closing(Engine.open(config(model, rpc=(server.endpoint,)))) as engine:
        assert full.n_left == -2  # half as much is tried as well
        (note,) = engine.notes
        assert note.startswith("Computing on the CPU: RPC")
        assert not engine.plan.devices
        assert answer(engine) == expected


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 layers of 16 experts of 384 KiB each."""
    shape = TinyShape(n_layer=4, n_embd=256, n_ff=128, n_expert=16, n_expert_used=2)
    return write_tiny_gguf(tmp_path_factory.mktemp("faults") / "wide.gguf", None, shape=shape)


def reporting(one_device: Devices, free: int) -> Machine:
    """This machine, whose device says that it has so much free."""
    (device,) = choose_devices(one_device.names[0], one_device.endpoints)
    alone = this_machine(engine_config(Path(), device="none"))
    return replace(alone, devices=(replace(device, free_bytes=free, total_bytes=free),))


def test_a_device_that_gives_less_than_it_reports_is_asked_for_half(
    wide: Path, one_device: Devices, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, allocate = dict[int, int](), DeviceBackend.allocate

    def allocate_some(backend: DeviceBackend, n_bytes: int) -> int:
        if sum(given.values()) + n_bytes > 24 << 20:
            return none_allocated(backend, n_bytes)
        buffer = allocate(backend, n_bytes)
        given[buffer] = n_bytes
        return buffer

    def free(buffer: int) -> None:
        given.pop(buffer, None)
        free_buffer(buffer)

    free_buffer = ggml_backend.ggml_backend_buffer_free
    monkeypatch.setattr(ggml_backend, "ggml_backend_buffer_free", free)
    monkeypatch.setattr(DeviceBackend, "allocate", allocate_some)
    machine = reporting(one_device, 36 << 20)
    whole = plan_engine(config(wide), machine)
    assert whole.devices[0].required > 24 << 20
    with closing(Engine.open(config(wide), machine=machine)) as engine:
        (device,) = engine.plan.devices
        assert 8 << 20 < device.required < 18 << 20
        (note,) = engine.notes
        assert note.startswith("Half as much is taken of devices: ")
        assert "gave no" in note
        assert len(answer(engine)) == 6
    assert given == {}
    with pytest.raises(DeviceFullError, match=r"gave no .* Lower --vram"):
        Engine.open(config(wide, device=one_device.names[0]), machine=machine)


def test_a_device_that_reports_nothing_free_is_left_out(wide: Path, one_device: Devices) -> None:
    machine = reporting(one_device, 0)
    plan = plan_engine(config(wide), machine)
    assert not plan.devices
    assert plan.notes == (f"Without {one_device.names[0]}: it says that none of its memory is free.",)
    named = plan_engine(config(wide, device=one_device.names[0]), machine)
    assert named.shortfall is not None
    assert named.shortfall.device == one_device.names[0]


def test_a_device_that_reports_less_than_it_has_gets_no_more(wide: Path, one_device: Devices) -> None:
    """Of two budgets the smaller one holds: what is reported free, and --vram."""
    plan = plan_engine(config(wide, vram=("30MiB",), device=one_device.names[0]), reporting(one_device, 20 << 20))
    (device,) = plan.devices
    assert device.required <= device.budget == 20 << 20
    (note,) = plan.notes
    assert note.endswith("has 20.0 MiB to give now: taking no more than that.")


def test_a_device_that_was_asked_for_is_not_left_out(
    model: Path, server: RpcServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    FullDevice(monkeypatch, 1)
    words = ["run", str(model), "--prompt-ids", "5", "-n", "1", "--ctx", "64", "--rpc", server.endpoint]
    assert run([*words, "--vram", "64MiB"]) == DeviceFullError.exit_code
    err = capsys.readouterr().err
    assert "gave no" in err
    assert "Lower --vram" in err
    assert "Computing on the CPU" not in err


def test_notes_of_run_go_to_standard_error(
    model: Path, server: RpcServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    FullDevice(monkeypatch, 1)
    words = ["run", str(model), "--prompt-ids", "5", "-n", "1", "--ctx", "64", "--rpc", server.endpoint, "--json"]
    assert run(words) == 0
    out, err = capsys.readouterr()
    assert err.count("Computing on the CPU") == 1
    assert len(json.loads(out)["tokens"]) == 1


def test_a_graph_that_fails_ends_the_answer(
    model: Path, server: RpcServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = iter([False] * 3 + [True])
    begin = ggml_device.ggml_backend_graph_compute_async

    def fail(backend: int, graph: int) -> int:
        return 1 if next(calls) else int(begin(backend, graph))

    monkeypatch.setattr(ggml_device, "ggml_backend_graph_compute_async", fail)
    assert run(["run", str(model), "--prompt-ids", "5", "-n", "9", "--ctx", "64", "--rpc", server.endpoint]) == 6
    assert re.search(r"slimoe: RPC\S* failed to compute \(ggml status 1\)\. Lower --vram", capsys.readouterr().err)


# --- behind the server -------------------------------------------------------------------------------------


async def ask(server: LiveServer, text: str) -> str:
    async with server.client() as client:
        answer = await client.completions.create(model="", prompt=text, max_tokens=90_000)
    return answer.choices[0].text


@pytest.mark.parametrize(
    ("engine", "after"),
    [
        (engine_config(Path()), "none"),
        (engine_config(Path(), device="auto"), "none"),
        (engine_config(Path(), vram=("1GiB",)), "auto"),
        (engine_config(Path(), rpc=("h:1",)), "auto"),
    ],
)
async def test_an_engine_starts_again_without_a_device_that_nobody_named(
    model: Path, engine: EngineConfig, after: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async with live_server(model, LiveOptions(engine=engine)) as server:
        with pytest.raises(openai.InternalServerError, match="GPU0 gave no 9 B") as failure:
            await ask(server, "device")
        assert (failure.value.status_code, failure.value.code) == (503, "device_failed")
        assert await ask(server, "next") == " next"
        assert server.supervisor.n_restarts == 1
    err = capsys.readouterr().err
    assert err.count("GPU0 gave no 9 B") == 1
    assert err.count("Going on without devices") == (after == "none")
    assert f"Its device is {after}." in err


async def test_others_are_told_as_well(model: Path) -> None:
    """Whoever is being answered when a device fails gets that as the reason."""
    async with live_server(model, LiveOptions(engine=engine_config(Path(), n_parallel=2))) as server:
        running = asyncio.create_task(ask(server, "forever"))
        await until(lambda: server.n_underway == 1)
        for one in (ask(server, "device"), running):
            with pytest.raises(openai.InternalServerError, match="GPU0"):
                await one


async def test_a_device_that_cannot_be_opened(sentencepiece_path: Path, tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "unplugged.gguf", sentencepiece_path)
    async with live_server(path) as server:
        assert await ask(server, "next") == " next"
    async with live_server(path, LiveOptions(engine=engine_config(Path(), device="GPU0"), waits=False)) as server:
        with pytest.raises(EngineFailure, match="GPU0 cannot be opened") as failure:
            await server.supervisor.wait_ready()
        assert failure.value.exit_code == DeviceError.exit_code
