"""Tiny tokenizers and checkpoints, made once per test run.

What makes them is imported by the fixtures: pytest's first process reads this file too, and tests run in others.
"""

import gc
import os
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.offload.devices import Devices

# Hundreds of tests start the program, which compiles itself each time where Python is told to keep no bytecode.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Keeps what is imported and collected, millions of objects, out of the garbage collector's way: it stays."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session")
def sentencepiece_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.models.tiny_checkpoint import train_sentencepiece

    return train_sentencepiece(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, sentencepiece_path: Path) -> Path:
    """A Mixtral of two layers as a GGUF file, with a real vocabulary and Mixtral's chat template."""
    from tests.models.tiny_gguf import write_tiny_gguf

    return write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf", sentencepiece_path)


@pytest.fixture(scope="module")
def endpoints() -> Iterator[tuple[str, str]]:
    """HOST:PORT of two RPC servers over this machine's CPU."""
    from bench.baselines.rpc_server import rpc_server

    with rpc_server() as one, rpc_server() as other:
        yield one.endpoint, other.endpoint


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs what needs devices on each kind that there is."""
    for name in ("one_device", "two_devices"):
        if name in metafunc.fixturenames:
            from tests.offload.devices import KINDS

            metafunc.parametrize(name, KINDS, indirect=True)


@pytest.fixture
def one_device(request: pytest.FixtureRequest, endpoints: tuple[str, str]) -> "Devices":
    """The device of an RPC server over the CPU, and each GPU of this machine, in turn."""
    from tests.offload.devices import one_of

    return one_of(request.param, endpoints[0])


@pytest.fixture
def two_devices(request: pytest.FixtureRequest, endpoints: tuple[str, str]) -> "Devices":
    """Devices of two RPC servers over the CPU, and each GPU of this machine beside one of them, in turn."""
    from tests.offload.devices import two_of

    return two_of(request.param, endpoints)


@pytest.fixture(scope="session")
def moe_checkpoint(tmp_path_factory: pytest.TempPathFactory, sentencepiece_path: Path) -> Path:
    """A Mixtral of 6 experts, top 3, whose sizes fit no K-quant, in float32."""
    from tests.models.tiny_checkpoint import TinyConfig, save_checkpoint

    return save_checkpoint(tmp_path_factory.mktemp("moe") / "tiny-moe", sentencepiece_path, TinyConfig())


@pytest.fixture(scope="session")
def moe_gguf(tmp_path_factory: pytest.TempPathFactory, moe_checkpoint: Path) -> Path:
    """`moe_checkpoint` as a GGUF file in F32: two layers of 6 experts, top 3, n_embd 64, n_ff 96."""
    from slimoe.converter.convert import ConvertOptions, convert

    target = tmp_path_factory.mktemp("moe-gguf") / "model.gguf"
    return convert(ConvertOptions(moe_checkpoint, target, "F32", n_threads=1)).path


@pytest.fixture(scope="session")
def k_quant_checkpoint(tmp_path_factory: pytest.TempPathFactory, sentencepiece_path: Path) -> Path:
    """A Mixtral whose sizes fit every type."""
    from tests.models.tiny_checkpoint import K_QUANT_SIZES, save_checkpoint

    return save_checkpoint(tmp_path_factory.mktemp("kq") / "tiny-k-quant", sentencepiece_path, K_QUANT_SIZES)


@pytest.fixture(scope="session")
def dense_checkpoint(tmp_path_factory: pytest.TempPathFactory, sentencepiece_path: Path) -> Path:
    """A Mistral without experts."""
    from tests.models.tiny_checkpoint import TinyConfig, save_checkpoint

    sizes = TinyConfig(n_expert=0, n_expert_used=0)
    return save_checkpoint(tmp_path_factory.mktemp("dense") / "tiny-dense", sentencepiece_path, sizes)
