"""Other limits while requests are being answered: the same tokens as without, and nothing changes where they fail."""

import threading
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from slimoe.offload.engine import Engine
from slimoe.offload.errors import DeviceFullError, DoesNotFitError, LostModelError, ModelFileError, UsageError
from slimoe.offload.loaded_model import LoadedModel
from slimoe.offload.plan.engine_config import EngineConfig
from slimoe.offload.text.generation import Failed, GenerationRequest, SamplingParams, TokenStep
from tests.models.configs import engine_config
from tests.models.conversation import TOKENS
from tests.models.gguf_content import write_content
from tests.models.tier_models import WIDE, content_of
from tests.offload.devices import Devices

MiB = 1 << 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts of 96 MiB in all, so that budgets differ by more than a process's own ups and downs."""
    directory = tmp_path_factory.mktemp("rebudget")
    shape = replace(WIDE, n_layer=4, n_embd=256, n_ff=512, n_expert=16, n_expert_used=2)
    return write_content(directory / "model.gguf", content_of(directory, shape))


def config(path: Path, **changed: Any) -> EngineConfig:
    settings = {"n_ctx": 256, "n_batch": 32, "n_threads": 1, "n_parallel": 3, "device": "none", "ram": "100%"}
    return engine_config(path, **settings | changed)


def least_ram(engine: Engine) -> int:
    """The smallest limit that the engine takes now; refusing is told before anything changes."""
    before = engine.plan
    with pytest.raises(DoesNotFitError) as refusal:
        engine.rebudget("1MiB", ())
    assert engine.plan is before
    assert "--ram" in str(refusal.value)
    return refusal.value.required_bytes


def submit_all(engine: Engine) -> None:
    for length, seed in ((30, None), (3, 7), (17, 8)):
        sampling = SamplingParams(temperature=0.0 if seed is None else 1.0, seed=seed)
        engine.submit(GenerationRequest(tuple(TOKENS[:length]), 24, sampling, ignore_eos=True))


def answers(engine: Engine, at_step: Mapping[int, Callable[[], object]] | None = None) -> dict[int, list[int]]:
    """Tokens by request, with something done before certain steps."""
    submit_all(engine)
    told: dict[int, list[int]] = {}
    n_steps = 0
    while not engine.is_idle:
        (at_step or {}).get(n_steps, lambda: None)()
        n_steps += 1
        for id, event in engine.step():
            assert not isinstance(event, Failed), event
            if isinstance(event, TokenStep):
                told.setdefault(id, []).append(event.token)
    return told


def n_slots(engine: Engine) -> int:
    assert engine.tiers is not None
    assert engine.tiers.host_pool is not None
    engine.tiers.host_pool.check()
    return len(engine.tiers.host_pool.slots)


def test_answers_go_on_whatever_the_limits_become(model: Path) -> None:
    with closing(Engine.open(config(model))) as engine:
        expected = answers(engine)
        assert engine.tiers is None
    with closing(Engine.open(config(model))) as engine:
        least = least_ram(engine)
        sizes: list[int] = []

        def take(n_bytes: int) -> Callable[[], None]:
            def do() -> None:
                engine.rebudget(str(n_bytes), ())
                sizes.append(-1 if engine.tiers is None else n_slots(engine))

            return do

        steps = {
            1: take(least),
            5: take(least + 8 * MiB),
            9: take(least + 2 * MiB),
            11: take(least + 12 * MiB),
            13: take(least + 400 * MiB),
            17: take(least + 4 * MiB),
        }
        assert answers(engine, steps) == expected
        memory = engine.memory()
    assert sizes[0] < sizes[2] < sizes[1] < sizes[3]
    assert sizes[0] < sizes[5] < sizes[3]
    assert sizes[4] == -1
    assert memory["host_pool"] > 0


def test_growing_and_shrinking_reads_nothing_again(model: Path) -> None:
    with closing(Engine.open(config(model))) as engine:
        least = least_ram(engine)
        engine.rebudget(str(least + 30 * MiB), ())
        answers(engine)
        more = engine.rebudget(str(least + 50 * MiB), ())
        held, before = n_slots(engine), engine.counters()["bytes_read"]
        less = engine.rebudget(str(least + 24 * MiB), ())
        assert more.is_kept
        assert less.is_kept
        assert n_slots(engine) < held
        assert engine.counters()["bytes_read"] == before
        assert less.loaded_bytes == more.loaded_bytes == 0
        # What stayed is what it was.
        again = answers(engine)
    with closing(Engine.open(config(model))) as engine:
        assert list(answers(engine).values()) == list(again.values())


def test_a_cache_that_is_not_yet_full_shrinks(model: Path) -> None:
    """Right after it has grown, when slots are free and others hold experts."""
    with closing(Engine.open(config(model))) as engine:
        expected = answers(engine)
    with closing(Engine.open(config(model))) as engine:
        least = least_ram(engine)
        engine.rebudget(str(least + 20 * MiB), ())
        engine.rebudget(str(least + 60 * MiB), ())
        assert engine.rebudget(str(least + 16 * MiB), ()).is_kept
        n_slots(engine)
        assert list(answers(engine).values()) == list(expected.values())


def test_memory_stays_below_the_larger_of_two_limits(model: Path) -> None:
    """As the process holds it, at any moment: the old model goes before the new one comes."""
    with closing(Engine.open(config(model))) as engine:
        least = least_ram(engine)
        process, peak, is_over = psutil.Process(), [0], threading.Event()

        def watch() -> None:
            while not is_over.wait(0.001):
                peak[0] = max(peak[0], process.memory_info().rss)

        thread = threading.Thread(target=watch)
        before = process.memory_info().rss
        thread.start()
        for n_bytes in (least + 4 * MiB, least + 400 * MiB, least + 3 * MiB, least + 400 * MiB):
            engine.rebudget(str(n_bytes), ())
        is_over.set()
        thread.join()
    assert peak[0] < before + 8 * MiB


def test_conversations_are_still_known(model: Path) -> None:
    with closing(Engine.open(config(model))) as engine:
        engine.read(TOKENS[:20])
        expected = engine.decode(TOKENS[20]).copy()
        engine.truncate(20)
        engine.rebudget(str(least_ram(engine) + MiB), ())
        assert engine.n_past == 20
        assert (engine.decode(TOKENS[20]) == expected).all()


def test_figures_go_on(model: Path) -> None:
    with closing(Engine.open(config(model))) as engine:
        least = least_ram(engine)
        engine.rebudget(str(least), ())
        answers(engine)
        before, seconds = engine.counters(), engine.compute_seconds
        uses = engine.snapshot().experts.layers[0].total_uses
        engine.rebudget("100%", ())
        assert engine.counters() == before
        assert engine.compute_seconds >= seconds > 0
        assert engine.snapshot().experts.layers[0].total_uses == uses
        assert engine.snapshot().memory.places[0].setting == "100%"
        engine.rebudget(str(least), ())
        assert engine.counters()["misses"] >= before["misses"]


@pytest.mark.parametrize("ram", ["", "much", "-1", "101%", "1 XB"])
def test_what_is_no_size_is_refused(model: Path, ram: str) -> None:
    with closing(Engine.open(config(model))) as engine:
        with pytest.raises(UsageError, match="--ram"):
            engine.rebudget(ram, ())
        with pytest.raises(UsageError, match="--vram"):
            engine.rebudget("100%", ("1GiB",))
        assert engine.config.memory.ram == "100%"


def test_a_recording_is_not_begun_anew(model: Path, tmp_path: Path) -> None:
    traced = config(model, trace=tmp_path / "trace")
    with closing(Engine.open(traced)) as engine, pytest.raises(UsageError, match="recorded"):
        engine.rebudget("100%", ())


class Unlucky:
    """Opens a model, but not the first `n_failures` times."""

    def __init__(self, n_failures: int) -> None:
        self.n_failures = n_failures

    def __call__(self, *arguments: Any) -> LoadedModel:
        self.n_failures -= 1
        if self.n_failures >= 0:
            raise DeviceFullError("GPU0 gave no 9 B of memory.", required_bytes=9, available_bytes=5)
        return LoadedModel(*arguments)


def test_where_opening_fails_the_old_limits_hold(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(Engine.open(config(model))) as engine:
        expected = answers(engine)
    with closing(Engine.open(config(model))) as engine:
        least = least_ram(engine)

        def fail() -> None:
            monkeypatch.setattr("slimoe.offload.engine.LoadedModel", Unlucky(1))
            with pytest.raises(DeviceFullError):
                engine.rebudget(str(least), ())
            assert engine.config.memory.ram == "100%"
            assert engine.tiers is None

        assert answers(engine, {7: fail}) == expected


def test_where_nothing_opens_any_more_the_engine_is_lost(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(Engine.open(config(model))) as engine:
        least = least_ram(engine)
        monkeypatch.setattr("slimoe.offload.engine.LoadedModel", Unlucky(2))
        with pytest.raises(LostModelError, match="old limits either"):
            engine.rebudget(str(least), ())


def test_a_file_that_is_gone_is_told_before_anything_changes(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "gone.gguf"
    path.write_bytes(model.read_bytes())
    with closing(Engine.open(config(path))) as engine:
        path.unlink()
        with pytest.raises(ModelFileError):
            engine.rebudget("1MiB", ())
        assert len(answers(engine)) == 3


def test_layers_move_between_devices_and_host(model: Path, two_devices: Devices) -> None:
    """With their part of the KV cache, in the middle of answers; RPC devices over the CPU compute what the CPU does."""
    on_devices = config(model, **two_devices.settings, vram=("100MiB", "100MiB"))
    with closing(Engine.open(config(model))) as engine:
        expected = answers(engine)
    with closing(Engine.open(on_devices)) as engine:
        assert [len(device.layers) for device in engine.plan.devices] == [2, 2]
        shares: list[list[int]] = []

        def take(*vram: str) -> Callable[[], None]:
            def do() -> None:
                engine.rebudget("100%", vram)
                shares.append([len(device.layers) for device in engine.plan.devices])

            return do

        told = answers(
            engine, {3: take("20MiB"), 7: take("150MiB", "50MiB"), 12: take("0", "120MiB"), 15: take("40MiB")}
        )
        with pytest.raises(DoesNotFitError) as refusal:
            engine.rebudget("100%", ("1MiB",))
        assert "--vram" in str(refusal.value)
        assert engine.config.devices.vram == ("40MiB",)
    assert told == expected or not two_devices.is_exact
    assert told.keys() == expected.keys()
    assert shares == [[2, 2], [3, 1], [4], [2, 2]]
