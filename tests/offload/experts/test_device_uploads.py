"""Experts that a single token's layer uploads: the same logits, the right slots, and what a stopped upload leaves."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from bench.baselines.rpc_server import rpc_server
from slimoe.offload.cache.device_pool import SlotPool
from slimoe.offload.cache.host_slots import Addresses
from slimoe.offload.engine import Engine
from slimoe.offload.experts.device_watch import measure_beside
from slimoe.offload.experts.layer_uploads import LayerUploads
from slimoe.offload.ggml.cpu_backend import EngineAbortedError
from slimoe.offload.machine.upload_costs import UploadCosts
from slimoe.offload.plan.engine_config import EngineConfig
from tests.models.configs import engine_config
from tests.models.conversation import TOKENS, conversation
from tests.models.tier_models import mixed_model, plain_model, tied_model
from tests.models.tiered import device_engine, resident_engine

FREE = UploadCosts(host=1.0, device=0.1, copy=1e-3, host_beside=1.0, copy_beside=1e-3)
SLOW = UploadCosts(host=1.0, device=0.1, copy=1e9, host_beside=1.0, copy_beside=1e9)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with rpc_server() as server:
        yield server.endpoint


def config_of(path: Path, endpoint: str) -> EngineConfig:
    return engine_config(path, n_ctx=256, n_batch=32, n_threads=1, rpc=(endpoint,))


def set_costs(engine: Engine, costs: UploadCosts) -> None:
    """Lets the engine believe that copies cost this."""
    (device,) = engine.device_experts
    assert device.swaps is not None
    device.uploads, device.watch = LayerUploads(device.swaps.policy, costs, device.kinds), None


@pytest.mark.parametrize("make", [plain_model, mixed_model, tied_model])
@pytest.mark.parametrize("in_memory", [0.0, 1.0], ids=["disk", "memory"])
def test_what_is_uploaded_and_computed_at_once_gives_the_same_logits(
    make: object, in_memory: float, endpoint: str, tmp_path: Path
) -> None:
    path = make(tmp_path)  # type: ignore[operator]
    with closing(resident_engine(engine_config(path, n_ctx=256, n_batch=32, n_threads=1))) as engine:
        expected = conversation(engine)
    with closing(device_engine(config_of(path, endpoint), 0.3, in_memory)) as engine:
        (device,) = engine.device_experts
        held, uploaded = set(device), device.bytes_uploaded
        set_costs(engine, FREE)
        np.testing.assert_array_equal(conversation(engine), expected)
        assert len(set(device)) == len(held)
        if in_memory and make is not tied_model:
            assert device.n_swaps > 0
            assert device.n_streamed > device.n_swaps
            assert set(device) != held
            assert device.bytes_uploaded > uploaded


def test_copies_that_take_longer_than_the_cpu_are_not_made(endpoint: str, tmp_path: Path) -> None:
    with closing(device_engine(config_of(plain_model(tmp_path), endpoint), 0.3, 1.0)) as engine:
        set_costs(engine, SLOW)
        decode_all(engine)
        (device,) = engine.device_experts
        assert (device.n_swaps, device.n_streamed) == (0, 0)


def test_an_upload_that_fails_leaves_free_slots_and_no_wrong_expert(
    endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Victims are gone, newcomers not there: both are the CPU's, and what is answered next is right."""
    path = plain_model(tmp_path)
    with closing(resident_engine(engine_config(path, n_ctx=256, n_batch=32, n_threads=1))) as engine:
        expected = conversation(engine)
    with closing(device_engine(config_of(path, endpoint), 0.3, 1.0)) as engine:
        (device,) = engine.device_experts
        held = set(device)
        set_costs(engine, FREE)
        with monkeypatch.context() as patch:
            patch.setattr(SlotPool, "write", write_passing_only)
            with pytest.raises(EngineAbortedError):
                decode_all(engine)
        assert set(device) < held
        n_free = sum(pool.n_free for pool in device.pools.values())
        assert n_free == len(held) - len(set(device))
        engine.truncate(0)
        np.testing.assert_array_equal(conversation(engine), expected)


def decode_all(engine: Engine) -> None:
    for token in TOKENS:
        engine.decode(token)


def write_passing_only(pool: SlotPool, slot: int, addresses: Addresses) -> None:
    """Stops what would fill a slot for good."""
    if slot < pool.n_slots - pool.n_passing:
        raise EngineAbortedError


def test_both_sides_are_measured_while_the_other_is_busy() -> None:
    ran, copied = [0], [0]

    def run() -> None:
        ran[0] += 1

    def copy() -> None:
        copied[0] += 1

    run_seconds, copy_seconds = measure_beside(run, copy)
    assert ran[0] == 4
    assert copied[0] >= 1
    assert 0 <= run_seconds < copy_seconds * max(1, copied[0]) + 1
