"""Batches whose experts pass through a device in a queue beside its graphs: the same logits, whatever is under way."""

from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slimoe.offload.cache.device_pool import SlotPool, n_passing
from slimoe.offload.cache.swap import SwapRule
from slimoe.offload.engine import Engine
from slimoe.offload.errors import DeviceError
from slimoe.offload.experts.device_experts import DeviceExperts
from slimoe.offload.ggml import buffers as ggml_backend
from slimoe.offload.ggml.cpu_backend import EngineAbortedError
from slimoe.offload.machine.expert_times import ExpertTimes, LinkTimes
from slimoe.offload.plan.engine_plan import plan_engine
from tests.models.configs import engine_config, reconfigured
from tests.models.conversation import TOKENS, answers, conversation, stopped_after
from tests.models.tier_models import mixed_model, plain_model, tied_model
from tests.models.tiered import device_engine, least_vram, resident_engine
from tests.models.tiny_gguf import TinyShape, write_tiny_gguf
from tests.offload.devices import Devices, lent, let_rpc_pin

Array = np.ndarray[Any, Any]


@pytest.fixture
def card(endpoints: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> Devices:
    """An RPC device that passes for a card: copies have a queue of their own, and go through pinned memory."""
    let_rpc_pin(monkeypatch)
    return lent(endpoints[0])


def fine_model(directory: Path) -> Path:
    """So many small experts that several pass through a device at once."""
    shape = TinyShape(n_layer=4, n_expert=32, n_expert_used=6, n_ff=64)
    return write_tiny_gguf(directory / "fine.gguf", None, shape=shape)


def let_stream(engine: Engine) -> None:
    """The host is taken to be slow, and copies to be free."""
    for device in engine.device_experts:
        device.times = LinkTimes(ExpertTimes((1, 2), (1, 1)), ExpertTimes((1, 2), (0, 0)), 1e-3, device.link.is_apart)


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many experts were asked for ahead of their layers."""
    asked, copy = list[int](), DeviceExperts.stream_ahead

    def note(device: DeviceExperts, wanted: Any, *rest: Any) -> None:
        asked.append(len(wanted))
        copy(device, wanted, *rest)

    monkeypatch.setattr(DeviceExperts, "stream_ahead", note)
    return asked


@pytest.mark.parametrize("make", [plain_model, mixed_model, tied_model, fine_model])
@pytest.mark.parametrize("in_memory", [0.3, 1.0])
def test_experts_that_pass_through_beside_graphs(
    card: Devices, make: Any, in_memory: float, tmp_path: Path, ahead: list[int]
) -> None:
    path = make(tmp_path)
    with closing(resident_engine(engine_config(path, n_ctx=256, n_batch=32, n_threads=1))) as engine:
        expected, told = conversation(engine), answers(engine)
    with closing(device_engine(card.config(path), 0.1, in_memory)) as engine:
        let_stream(engine)
        for _ in range(3):
            engine.truncate(0)
            np.testing.assert_array_equal(conversation(engine), expected)
        engine.truncate(0)
        if make is not fine_model:
            assert answers(engine).keys() == told.keys()
        assert engine.counters()["streamed"] > 0
        assert ahead or in_memory < 1
        assert engine.memory()["pinned"] == engine.plan.pinned > 0


def test_a_layer_that_the_batch_needs_little_of_is_not_copied_ahead(
    card: Devices, tmp_path: Path, ahead: list[int]
) -> None:
    with closing(device_engine(card.config(plain_model(tmp_path)), 0.1)) as engine:
        let_stream(engine)
        engine.prefill(TOKENS[:3])
        assert engine.counters()["streamed"] > 0
        assert ahead == []
        engine.prefill(TOKENS[3:30])
        # The last layer is computed for one row of a prompt.
        assert len(ahead) == engine.spec.n_layer - 2


def test_devices_with_one_queue_copy_nothing_ahead(
    endpoints: tuple[str, ...], tmp_path: Path, ahead: list[int]
) -> None:
    with closing(device_engine(lent(endpoints[0]).config(plain_model(tmp_path)), 0.1)) as engine:
        let_stream(engine)
        engine.prefill(TOKENS[:30])
        assert engine.counters()["streamed"] > 0
        assert ahead == []
        assert engine.plan.pinned == 0
        assert "pinned" not in engine.memory()


def test_a_step_may_be_stopped_while_experts_are_copied_ahead(card: Devices, tmp_path: Path) -> None:
    path = plain_model(tmp_path)
    with closing(resident_engine(engine_config(path, n_ctx=256, n_batch=32, n_threads=1))) as engine:
        expected = [engine.prefill(TOKENS[:12]).copy(), engine.decode(TOKENS[12]).copy()]
    n_stopped = 0
    with closing(device_engine(card.config(path, policy="lru"), 0.3, 0.6)) as engine:
        for n_calls in range(0, 40, 3):
            let_stream(engine)
            try:
                engine.read(TOKENS[20:32], 1, stopped_after(n_calls))
            except EngineAbortedError:
                n_stopped += 1
            engine.truncate(0)
            np.testing.assert_array_equal(engine.prefill(TOKENS[:12]), expected[0])
            np.testing.assert_array_equal(engine.decode(TOKENS[12]), expected[1])
            engine.truncate(0)
    assert n_stopped > 5


def test_a_copy_ahead_that_fails(card: Devices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is told, and the step after it is right."""
    path = plain_model(tmp_path)
    with closing(resident_engine(engine_config(path, n_ctx=256, n_batch=32, n_threads=1))) as engine:
        expected = conversation(engine)

    def fail(device: DeviceExperts, *rest: Any) -> None:
        raise DeviceError("The card is gone.")

    with closing(device_engine(card.config(path), 0.1)) as engine:
        let_stream(engine)
        with monkeypatch.context() as patch:
            patch.setattr(DeviceExperts, "stream_ahead", fail)
            with pytest.raises(DeviceError, match="The card is gone"):
                engine.prefill(TOKENS[:12])
        engine.truncate(0)
        np.testing.assert_array_equal(conversation(engine), expected)


# --- swaps -------------------------------------------------------------------------------------------------


@pytest.fixture
def filled_behind(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Slots that were filled behind what is demanded."""
    filled, write = list[int](), SlotPool.write_behind

    def note(pool: SlotPool, slot: int, addresses: Any) -> None:
        write(pool, slot, addresses)
        filled.append(slot)

    monkeypatch.setattr(SlotPool, "write_behind", note)
    return filled


@pytest.mark.parametrize("kind", ["card", "one queue"])
def test_swaps_are_copied_while_the_next_token_is_computed(
    kind: str, endpoints: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, filled_behind: list[int]
) -> None:
    path = plain_model(tmp_path)
    if kind == "card":
        let_rpc_pin(monkeypatch)
    with closing(resident_engine(engine_config(path, n_ctx=256, n_batch=32, n_threads=1))) as engine:
        expected = [engine.decode(token).copy() for token in TOKENS]
    with closing(device_engine(lent(endpoints[0]).config(path, policy="lru"), 0.3)) as engine:
        (device,) = engine.device_experts
        assert device.swaps is not None
        device.swaps.rule = SwapRule(1.0, 0.0, margin=1.0)
        device.uploads = device.watch = None
        for token, row in zip(TOKENS, expected, strict=True):
            np.testing.assert_array_equal(engine.decode(token), row)
        device.arrive()
        assert device.n_swaps >= len(filled_behind) > 5


def decode_all(engine: Engine) -> None:
    for token in TOKENS:
        engine.decode(token)


def test_a_swap_that_fails_leaves_the_expert_to_the_host(
    card: Devices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = plain_model(tmp_path)
    with closing(resident_engine(engine_config(path, n_ctx=256, n_batch=32, n_threads=1))) as engine:
        expected = conversation(engine)

    def fail(pool: SlotPool, slot: int, addresses: Any) -> None:
        raise DeviceError("The card is gone.")

    with closing(device_engine(card.config(path, policy="lru"), 0.3)) as engine:
        (device,) = engine.device_experts
        assert device.swaps is not None
        device.swaps.rule = SwapRule(1.0, 0.0, margin=1.0)
        device.uploads = device.watch = None
        n_slots = len(set(device))
        with monkeypatch.context() as patch:
            patch.setattr(SlotPool, "write_behind", fail)
            with pytest.raises(DeviceError, match="The card is gone"):
                decode_all(engine)
            with suppress(DeviceError):
                device.arrive()
        n_free = sum(pool.n_free for pool in device.pools.values())
        assert n_free == n_slots - len(set(device)) > 0
        engine.truncate(0)
        np.testing.assert_array_equal(conversation(engine), expected)


# --- memory ------------------------------------------------------------------------------------------------


def test_pinned_memory_counts_within_the_budget(card: Devices, tmp_path: Path) -> None:
    config = card.config(plain_model(tmp_path))
    config = reconfigured(config, vram=(str(least_vram(config)),))
    plan = plan_engine(config)
    assert plan.tiers is not None
    assert plan.pinned == sum(device.pinned for device in plan.devices) > 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(plan.devices[0]), "pinned", 0)
        without = plan_engine(config)
    assert without.tiers is not None
    assert plan.tiers.compute - without.tiers.compute == plan.pinned


def test_pinned_memory_that_is_refused_is_told_once(
    card: Devices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = plain_model(tmp_path)
    with closing(resident_engine(engine_config(path, n_ctx=256, n_batch=32, n_threads=1))) as engine:
        expected = conversation(engine)
    monkeypatch.setattr(ggml_backend, "ggml_backend_buffer_get_type", lambda buffer: 1)
    with closing(device_engine(card.config(path), 0.3)) as engine:
        (note,) = engine.notes
        assert "of pinned memory: experts are copied there without it" in note
        assert "pinned" not in engine.memory()
        let_stream(engine)
        np.testing.assert_array_equal(conversation(engine), expected)


def test_small_experts_pass_through_together() -> None:
    with pytest.MonkeyPatch.context() as patch:
        for n_bytes, n_of_layer, expected in (
            (99 << 20, 8, 2),
            (3 << 20, 128, 10),
            (1 << 10, 512, 16),
            (1 << 10, 6, 2),
        ):
            patch.setattr("slimoe.offload.cache.device_pool.device_slot_bytes", lambda kind, n=n_bytes: n)
            assert n_passing(None, n_of_layer) == expected  # type: ignore[arg-type]
