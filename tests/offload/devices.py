"""The devices that tests run on, and how far answers of theirs may be from the CPU's.

Two kinds: ggml's RPC servers over this machine's CPU, which are there on every machine, and every GPU that ggml finds
here: none where the library is built without a graphics API. `scripts/test-device` builds one that has some.
"""

import functools
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from bench.baselines.llama_cpp import LlamaCpp, LlamaCppConfig
from bench.baselines.stepping import kl_divergence
from slimoe.offload.ggml import buffers as ggml_backend
from slimoe.offload.ggml import device as ggml_device
from slimoe.offload.ggml.devices import available_devices
from slimoe.offload.machine.driver_memory import with_driver_memory
from slimoe.offload.plan.engine_config import EngineConfig
from tests.models.configs import engine_config
from tests.models.conversation import TOKENS, Array
from tests.models.gguf_content import read_content, write_content

LOCAL = tuple(device.name for device in available_devices())
KINDS = ("rpc", *LOCAL)
COMPILING = 900.0
"""Seconds in which a process is done that may have to compile kernels for a software device first."""
MARGIN = 4.0
"""Divergences from the CPU may be so many times llama.cpp's own: theirs and ours round at different places."""


@dataclass(frozen=True, slots=True)
class Devices:
    """Devices by name, and the RPC servers that some of them are on.

    `is_exact` says that the kernels of all of them are the CPU's, so that answers are the CPU's to the last bit.
    """

    names: tuple[str, ...]
    endpoints: tuple[str, ...]
    is_exact: bool

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of an EngineConfig that uses these devices and no other."""
        return {"device": ",".join(self.names), "rpc": self.endpoints}

    def config(self, model: Path, **changed: Any) -> EngineConfig:
        """An engine on these devices, with room for `tests.models.conversation`."""
        return engine_config(model, **{"n_ctx": 256, "n_batch": 32, "n_threads": 1} | self.settings | changed)

    def check(self, got: Array, expected: Array, stock: Path, kv_type: Type = Type.F16) -> None:
        """Asserts that logits [rows, n_vocab] are the CPU's, as far as llama.cpp's are on these devices with `stock`.

        `stock` is the same file, or one of the same sizes where llama.cpp cannot read that. `kv_type` is that of the KV
        cache: the CPU rounds the queries, too, that it multiplies with quantised keys, and devices do not.
        """
        assert got.shape == expected.shape
        if self.is_exact:
            np.testing.assert_array_equal(got, expected)
        else:
            allowed = MARGIN * max(divergence(stock, name, kv_type) for name in self.names if name in LOCAL)
            assert largest_divergence(got, expected) < allowed


def lent(*endpoints: str) -> Devices:
    """The devices of RPC servers over this machine's CPU."""
    return Devices(tuple(device.name for device in available_devices(endpoints)[len(LOCAL) :]), endpoints, True)


def one_of(kind: str, endpoint: str) -> Devices:
    """A device of a kind: that of the RPC server, or a local one."""
    return lent(endpoint) if kind == "rpc" else local(kind)


@functools.cache
def local(name: str) -> Devices:
    """A GPU of this machine. What its driver takes is measured now, so that no test waits for it: it is remembered."""
    (device,) = (device for device in available_devices() if device.name == name)
    with_driver_memory(device)
    return Devices((name,), (), False)


def two_of(kind: str, endpoints: tuple[str, str]) -> Devices:
    """Two devices: those of two RPC servers, or a local one and that of a server."""
    if kind == "rpc":
        return lent(*endpoints)
    other = lent(endpoints[0])
    return Devices((*local(kind).names, *other.names), other.endpoints, False)


def largest_divergence(got: Array, expected: Array) -> float:
    """The largest KL divergence in nats among rows of logits."""
    return max(kl_divergence(*rows) for rows in zip(got, expected, strict=True))


@functools.cache
def divergence(path: Path, name: str, kv_type: Type = Type.F16) -> float:
    """The largest divergence of llama.cpp's logits on a local device from its own on the CPU, in nats."""
    (handle,) = (device.handle for device in available_devices() if device.name == name)
    return largest_divergence(llama_conversation(path, handle, kv_type), llama_conversation(path, None, kv_type))


def llama_conversation(path: Path, device: int | None, kv_type: Type = Type.F16) -> Array:
    """What llama.cpp answers in `tests.models.conversation`, with the whole model on a device, or on the CPU."""
    content = read_content(path)
    if "tokenizer.ggml.model" not in content.keys:
        path = write_content(path.with_suffix(".llama.gguf"), content.with_keys({"tokenizer.ggml.model": "none"}))
    config = LlamaCppConfig(path, 256, 1, extra_buffers=False, device=device, kv_type=kv_type)
    with closing(LlamaCpp(config)) as baseline:
        told = [baseline.score(TOKENS[:9]), baseline.prefill(TOKENS[9:30])[None].copy()]
        told += [baseline.decode(token)[None].copy() for token in TOKENS[30:40]]
        told.append(baseline.score(TOKENS[40:45])[-2:])
        baseline.truncate(20)
        told.append(baseline.decode(TOKENS[45])[None].copy())
    return np.concatenate(told)


def let_rpc_pin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets RPC devices be taken for cards: uploads in a queue of their own, through what passes for pinned memory."""
    get_props = ggml_device.ggml_backend_dev_get_props

    def get_changed(handle: int, address: int) -> None:
        get_props(handle, address)
        caps = ggml_device.DeviceProps.from_address(address).caps
        caps.asynchronous = caps.events = caps.host_buffer = True

    monkeypatch.setattr(ggml_device, "ggml_backend_dev_get_props", get_changed)
    plain = ggml_backend.ggml_backend_cpu_buffer_type
    monkeypatch.setattr(ggml_device, "ggml_backend_dev_host_buffer_type", lambda handle: plain())
