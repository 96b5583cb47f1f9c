"""RPC servers that stop answering while their connection stays: a person is told which, and Ctrl-C ends a command."""

import asyncio
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from bench.baselines.rpc_server import RpcServer, rpc_server
from slimoe.offload.errors import DeviceError
from slimoe.offload.ggml.device_backend import DeviceBackend
from slimoe.offload.ggml.device_calls import longest_wait
from slimoe.offload.ggml.devices import available_devices
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.memory.contents import read_rows
from slimoe.offload.memory.kv_cache import KVSize
from slimoe.offload.memory.kv_store import KVPlace, KVStore
from slimoe.offload.model.model_file import ModelFile
from slimoe.offload.text.generation import GenerationRequest
from slimoe.server.messages import Failure, Step, TokenPrompt
from slimoe.server.process.request_handle import EngineFailure, RequestHandle
from slimoe.server.process.supervisor import Supervisor
from slimoe.server.process.watchdog import Patience
from tests.models.configs import engine_config
from tests.models.live_server import DEADLINE, until
from tests.models.tiny_gguf import TinyShape, write_tiny_gguf

CTX = 4096
"""Tokens of an answer that no test waits for."""
ADVICE = "Check that its RPC server runs"


@pytest.fixture(scope="module")
def model(sentencepiece_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("frozen")
    return write_tiny_gguf(folder / "tiny.gguf", sentencepiece_path, shape=TinyShape(n_ctx=2 * CTX))


@pytest.fixture
def server() -> Iterator[RpcServer]:
    with rpc_server() as server:
        yield server


def freeze(server: RpcServer) -> None:
    server.process.send_signal(signal.SIGSTOP)


FREEZING = """
import os, signal, sys, time
from slimoe.offload.ggml import device
get, calls, server = device.ggml_backend_tensor_get_async, [], int(sys.argv[1])
def freeze_and_get(*args):
    calls.append(args)
    if len(calls) == 5:
        os.kill(server, signal.SIGSTOP)
        while open(f"/proc/{server}/stat").read().rpartition(")")[2].split()[0] != "T":
            time.sleep(0.01)
        print("frozen", flush=True)
    return get(*args)
device.ggml_backend_tensor_get_async = freeze_and_get
sys.argv = ["slimoe", *sys.argv[2:]]
from slimoe.server.cli import main
main()
"""
"""The command, which waits for a server that stops at the fifth result that is asked of it."""


def answering(model: Path, server: RpcServer) -> "subprocess.Popen[str]":
    """An answer in which the server has stopped."""
    words = ["run", str(model), "--prompt-ids", "5", "-n", str(CTX), "--ignore-eos", "--threads", "1"]
    where = ["--rpc", server.endpoint, "--ctx", str(CTX), "--batch", "32"]
    command = [sys.executable, "-P", "-c", FREEZING, str(server.process.pid), *words, *where]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert any("frozen" in line for line in iter(process.stdout.readline, ""))
    return process


def told(process: "subprocess.Popen[str]") -> str:
    """What the command tells of a device that does not answer."""
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "has not answered" in line:
            return line
    raise AssertionError(lines)


def test_the_second_interrupt_ends_an_answer_of_a_frozen_server(model: Path, server: RpcServer) -> None:
    process = answering(model, server)
    process.send_signal(signal.SIGINT)
    line = told(process)
    assert f"({server.endpoint}) has not answered for" in line
    assert ADVICE in line
    assert "Ctrl-C ends the program at once." in line
    process.send_signal(signal.SIGINT)
    assert process.wait(DEADLINE) == 130


async def to_the_end(handle: RequestHandle) -> None:
    while not handle.is_over or await handle.next():
        await handle.next()


async def test_the_engine_of_a_frozen_server_is_ended_and_the_device_named(
    model: Path, server: RpcServer, capsys: pytest.CaptureFixture[str]
) -> None:
    config = engine_config(model, rpc=(server.endpoint,), n_ctx=CTX, n_batch=32, n_threads=1)
    supervisor = Supervisor(config, patience=Patience(deaf=0.5, stuck=2.5))
    supervisor.start()
    try:
        await asyncio.wait_for(supervisor.wait_ready(), DEADLINE)
        handle = supervisor.submit(TokenPrompt((5,)), GenerationRequest((), max_tokens=CTX, ignore_eos=True))
        while not any(isinstance(answer, Step) for answer in await handle.next()):
            pass
        freeze(server)
        await until(lambda: supervisor.trouble is not None)
        assert supervisor.trouble is not None
        assert server.endpoint in supervisor.trouble
        assert ADVICE in supervisor.trouble
        with pytest.raises(EngineFailure, match=server.endpoint) as failed:
            await to_the_end(handle)
        assert failed.value.exit_code == DeviceError.exit_code
        # What comes after that cannot be answered either, and says why as well.
        await until(lambda: supervisor.phase == "failed")
        assert isinstance(supervisor.failure, Failure)
        assert server.endpoint in supervisor.failure.message
    finally:
        await supervisor.stop()
    assert ADVICE in capsys.readouterr().err


def test_copies_of_the_cache_name_the_server_that_they_wait_for(model: Path, server: RpcServer) -> None:
    """They are ggml's own calls, and no backend's."""
    (device,) = available_devices([server.endpoint])[-1:]
    spec = ModelFile.of(read_gguf(model)).spec
    with closing(DeviceBackend(device)) as backend, closing(KVStore(spec, KVSize(Type.F16, 256))) as store:
        store.arrange({device.name: KVPlace(backend, tuple(range(spec.n_layer)))})
        tensor = store.tensors()[0]
        assert longest_wait() is None
        freeze(server)
        reading = threading.Thread(target=read_rows, args=(tensor, np.arange(4), range(1)))
        reading.start()
        try:
            asyncio.run(until(lambda: longest_wait() is not None))
            waiting = longest_wait()
        finally:
            server.process.send_signal(signal.SIGCONT)
            reading.join()
    assert waiting is not None
    assert server.endpoint in waiting.device
    assert ADVICE in waiting.advice
    assert longest_wait() is None
