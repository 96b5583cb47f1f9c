"""Engines whose link becomes slow while they run: uploads stop, come back when it is well again, and answers stay."""

import logging
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from bench.baselines.rpc_server import RpcServer, rpc_server
from bench.baselines.shaped_link import parse_link, shaped_link
from slimoe.offload.engine import Engine
from slimoe.offload.experts.device_experts import DeviceExperts
from slimoe.offload.experts.device_watch import DeviceWatch
from slimoe.offload.machine.expert_times import ExpertTimes, LinkTimes
from slimoe.offload.machine.upload_costs import UploadCosts
from slimoe.offload.machine.watchdog import PARTS, Part, Watchdog
from slimoe.offload.plan.engine_config import EngineConfig
from slimoe.offload.plan.prediction import known_as, predict_plan
from slimoe.offload.text.generation import Finished, GenerationRequest, SamplingParams
from tests.models.configs import engine_config
from tests.models.conversation import TOKENS, Array
from tests.models.measured_machine import machine_for
from tests.models.tier_models import plain_model
from tests.models.tiered import device_engine, resident_engine
from tests.offload.devices import Devices

FAST = UploadCosts(host=1e-3, device=1e-4, copy=1e-3, host_beside=1e-3, copy_beside=1e-3)
N_USED = 3


@pytest.fixture(scope="module")
def server() -> Iterator[RpcServer]:
    with rpc_server() as server:
        yield server


def config_of(path: Path, *endpoints: str, policy: str = "lfu-decay") -> EngineConfig:
    return engine_config(path, n_ctx=256, n_batch=32, n_threads=1, rpc=endpoints, policy=policy)


@dataclass
class Steady:
    """A watch to which all tokens take the same time, so long that something is measured again after each."""

    inner: DeviceWatch

    @property
    def watchdog(self) -> Watchdog:
        return self.inner.watchdog

    @watchdog.setter
    def watchdog(self, watchdog: Watchdog) -> None:
        self.inner.watchdog = watchdog

    def step(self, seconds: float, *, is_token: bool) -> None:
        self.inner.step(1e6, is_token=is_token)


def watched(engine: Engine, probe: Callable[[Part], float | None]) -> DeviceExperts:
    """Lets the engine begin with the costs of a fast link, and measure what `probe` says."""
    (device,) = engine.device_experts
    assert device.swaps is not None
    times = LinkTimes(
        ExpertTimes((1, 32), (FAST.host, 32 * FAST.host)), ExpertTimes((1, 32), (FAST.device,) * 2), FAST.copy
    )
    watchdog = Watchdog(FAST, N_USED)
    device.watch = Steady(DeviceWatch("RPC0", device, device.swaps.policy, times, watchdog, probe))
    return device


def mode_of(device: DeviceExperts) -> str:
    assert device.choice is not None
    return device.choice.mode


def decoded(engine: Engine, n_tokens: int) -> Array:
    """Logits of a sequence that begins anew."""
    engine.truncate(0)
    return np.stack([engine.decode(TOKENS[number % len(TOKENS)]).copy() for number in range(n_tokens)])


def test_uploads_stop_on_a_slow_link_and_come_back_with_a_fast_one(
    server: RpcServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Measurements are made up, and so is what tokens take."""
    path = plain_model(tmp_path)
    with closing(resident_engine(config_of(path))) as engine:
        expected = decoded(engine, 60)
    now = {"host": FAST.host, "device": FAST.device, "copy": FAST.copy}
    with closing(device_engine(config_of(path, server.endpoint), 0.3)) as engine:
        device = watched(engine, lambda part: now[part])
        np.testing.assert_array_equal(decoded(engine, 60), expected)
        assert mode_of(device) == "upload"
        assert device.times is not None
        before = device.n_streamed
        assert before > 0
        now["copy"] = 1000 * FAST.copy
        with caplog.at_level(logging.WARNING):
            np.testing.assert_array_equal(decoded(engine, 60), expected)
        assert mode_of(device) == "static"
        (line,) = caplog.messages
        assert line.startswith("RPC0: a copy over the link takes 1000 ms in place of 1 ms, so experts on the card stay")
        assert device.times.copy_seconds == pytest.approx(1.0)
        stopped = device.n_streamed, device.n_swaps
        np.testing.assert_array_equal(decoded(engine, 60), expected)
        assert (device.n_streamed, device.n_swaps) == stopped
        now["copy"] = FAST.copy
        for _ in range(5):
            np.testing.assert_array_equal(decoded(engine, 60), expected)
        assert mode_of(device) == "upload"
        assert device.n_streamed > stopped[0]


def test_a_link_that_becomes_slow_is_noticed(server: RpcServer, tmp_path: Path) -> None:
    """A copy takes 60 ms over it, an expert on the CPU is said to take 1 ms: uploads pay below 15."""
    path = plain_model(tmp_path)
    with closing(resident_engine(config_of(path))) as engine:
        expected = decoded(engine, 20)
    with (
        shaped_link(server.endpoint, parse_link("10Gbit,0ms")) as link,
        closing(device_engine(config_of(path, link.endpoint), 0.3)) as engine,
    ):
        (device,) = engine.device_experts
        assert isinstance(device.watch, DeviceWatch)
        copied, sides = device.watch.probe, {"host": FAST.host, "device": FAST.device}
        device = watched(engine, lambda part: copied(part) if part == "copy" else sides[part])
        np.testing.assert_array_equal(decoded(engine, 20), expected)
        assert device.n_streamed > 0
        link.change(parse_link("20Mbit,0ms"))
        np.testing.assert_array_equal(decoded(engine, 20), expected)
        assert mode_of(device) != "upload"
        stopped = device.n_streamed
        np.testing.assert_array_equal(decoded(engine, 20), expected)
        assert device.n_streamed == stopped
        assert device.watch is not None
        assert device.watch.watchdog.costs.copy > 0.05


def test_tokens_that_are_compared_move_nothing(server: RpcServer, tmp_path: Path) -> None:
    with closing(device_engine(config_of(plain_model(tmp_path), server.endpoint), 0.3)) as engine:
        device = watched(engine, lambda part: {"host": FAST.host, "device": FAST.device, "copy": FAST.copy}[part])
        assert device.watch is not None
        n_still = 0
        for number in range(60):
            is_still, moved = device.watch.watchdog.is_still, (device.n_streamed, device.n_swaps)
            engine.decode(TOKENS[number % len(TOKENS)])
            n_still += is_still
            assert not is_still or moved == (device.n_streamed, device.n_swaps)
        assert n_still == 8
        assert mode_of(device) == "upload"


def test_everything_is_measured_again_between_steps(one_device: Devices, tmp_path: Path) -> None:
    """What a probe has computed and copied changes no answer."""
    path = plain_model(tmp_path)
    with closing(resident_engine(config_of(path))) as engine:
        expected = decoded(engine, 10)
    got = []
    with closing(device_engine(one_device.config(path), 0.3)) as engine:
        (device,) = engine.device_experts
        assert isinstance(device.watch, DeviceWatch)
        for number in range(10):
            found = [device.watch.probe(part) for part in PARTS]
            assert all(seconds is not None and seconds >= 0 for seconds in found)
            got.append(engine.decode(TOKENS[number]).copy())
    one_device.check(np.stack(got), expected, path)


def test_policies_that_load_whatever_they_miss_are_not_watched(server: RpcServer, tmp_path: Path) -> None:
    with closing(device_engine(config_of(plain_model(tmp_path), server.endpoint, policy="lru"), 0.3)) as engine:
        (device,) = engine.device_experts
        assert device.watch is None
        assert device.choice is not None
        decoded(engine, 30)
        assert device.n_swaps > 0


def test_an_answer_tells_what_was_expected_and_what_is_measured(server: RpcServer, tmp_path: Path) -> None:
    now = {"host": FAST.host, "device": FAST.device, "copy": FAST.copy}
    with closing(device_engine(config_of(plain_model(tmp_path), server.endpoint), 0.3)) as engine:
        watched(engine, lambda part: now[part])
        told = [answered(engine).tiers]
        now["copy"] = 1000 * FAST.copy
        told.append(answered(engine).tiers)
    first, second = (one.exchange[0] for one in told)
    assert (first.mode, first.since_token, first.n_changes) == ("upload", 0, 0)
    assert first.expected_ms == second.expected_ms == pytest.approx({"copy": 1, "host": 1, "device": 0.1})
    assert (second.mode, second.n_changes) == ("static", 1)
    assert "an upload takes 1000 ms" in second.reason
    assert 40 <= second.since_token < 80
    assert [one.exchange[0].measured_ms["copy"] for one in told] == pytest.approx([1, 1000])
    assert [one.counts["exchange_changes"] for one in told] == [0, 1]


def answered(engine: Engine) -> Finished:
    *_, end = engine.generate(GenerationRequest((5,), 41, SamplingParams(temperature=0), ignore_eos=True))
    assert isinstance(end, Finished)
    return end


def test_an_answer_tells_what_the_plan_has_promised(
    server: RpcServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another machine too, asked before the model is opened there; nothing where nothing was measured."""
    config = config_of(plain_model(tmp_path), server.endpoint)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with closing(device_engine(config, 0.3)) as engine:
        assert answered(engine).timings.expected_per_token_ms is None
        assert engine.snapshot().work.speed.predicted is None
        plan = engine.plan
    speed = machine_for(plan, *(known_as(device.device) for device in plan.devices))
    monkeypatch.setattr("slimoe.offload.observation.measure_machine", lambda config, plan, on_measure: speed)
    with closing(device_engine(config, 0.3)) as engine:
        expected = answered(engine).timings.expected_per_token_ms
        promised = engine.snapshot().work.speed.predicted
    assert expected == predict_plan(plan, speed).decode.ms_per_token
    assert promised == pytest.approx(1000 / expected)
