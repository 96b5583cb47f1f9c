"""The block that predicts further tokens on a device: it drafts what the CPU's does, and answers stay the same."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slimoe.offload.engine import Engine
from slimoe.offload.errors import DoesNotFitError
from slimoe.offload.graph.batch import Batch, make_batch
from slimoe.offload.loaded_model import LoadedModel
from slimoe.offload.plan.engine_config import EngineConfig
from slimoe.offload.plan.engine_plan import plan_engine
from slimoe.offload.plan.machine import Machine, this_machine
from tests.models.configs import engine_config, reconfigured, roomy_machine
from tests.models.gguf_content import read_content, write_content
from tests.models.tiered import device_engine, least_vram
from tests.models.tiny_gguf import FineShape, write_family
from tests.offload.devices import Devices
from tests.offload.drafted import answers, with_mtp_block, with_right_block
from tests.offload.test_predicted_drafts import REQUESTS, TEXT

SHAPE = FineShape(n_layer=4, n_embd_head=64, n_expert=8, n_expert_used=2)
FAMILIES = ("glm4moe", "qwen3next", "qwen35moe")
LATENT = [pytest.param(name, id=f"latent_attention of {name}") for name in ("deepseek2", "glm-dsa")]
"""Named so that `scripts/test-device` leaves them out where kernels of latent attention are compiled for too long."""
WHOLE = 2.0
Array = np.ndarray[Any, Any]


def config(path: Path, **changed: Any) -> EngineConfig:
    return engine_config(path, **{"n_ctx": 256, "n_batch": 64, "n_threads": 1, "n_parallel": 3} | changed)


@pytest.fixture(scope="module", params=[*FAMILIES, *LATENT])
def right(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file whose block is right but for some tokens."""
    folder = tmp_path_factory.mktemp("right")
    content = read_content(write_family(folder / "plain.gguf", request.param, shape=SHAPE))
    return write_content(folder / "m.gguf", with_right_block(content, SHAPE.n_layer))


@pytest.fixture(scope="module", params=[False, True], ids=["the model's output", "its own output"])
def random(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file whose block has random weights."""
    folder = tmp_path_factory.mktemp("random")
    content = read_content(write_family(folder / "plain.gguf", "qwen35moe", shape=SHAPE))
    return write_content(folder / "m.gguf", with_mtp_block(content, SHAPE.n_layer, has_own_ends=request.param))


@pytest.mark.parametrize("on_device", [0.5, WHOLE], ids=["cut", "whole"])
def test_answers_are_the_same(right: Path, one_device: Devices, on_device: float) -> None:
    opened, requests = config(right, **one_device.settings), list(REQUESTS.values())
    with closing(device_engine(opened, on_device)) as engine:
        plain = answers(engine, *requests)
    with closing(device_engine(reconfigured(opened, draft="mtp"), on_device)) as engine:
        assert not engine.notes
        drafted = answers(engine, *requests)
        drafted_alone = answers(engine, requests[0])
    assert sum(one.finished.timings.draft_n_accepted for one in (*drafted, *drafted_alone)) > 30
    if one_device.is_exact:
        assert [one.tokens for one in drafted] == [one.tokens for one in plain]
        assert drafted_alone[0].tokens == plain[0].tokens


def test_beside_layers_on_two_devices(right: Path, two_devices: Devices) -> None:
    opened, requests = config(right, **two_devices.settings), list(REQUESTS.values())
    with closing(device_engine(opened, WHOLE)) as engine:
        plain = answers(engine, *requests)
    with closing(device_engine(reconfigured(opened, draft="mtp"), WHOLE)) as engine:
        assert [device.mtp > 0 for device in engine.plan.devices] == [False, True]
        drafted = answers(engine, *requests)
        (alone,) = answers(engine, requests[0])
    assert alone.finished.timings.draft_n_accepted > 30
    if two_devices.is_exact:
        assert [one.tokens for one in drafted] == [one.tokens for one in plain]


def batch_of(tokens: tuple[int, ...], begin: int) -> Batch:
    return make_batch([(tokens, np.arange(begin + len(tokens)))], 1, ((0, 1),) if begin == 0 else ())


def predicted(opened: EngineConfig) -> tuple[Array, Array]:
    """The model's hidden states, and the block's logits for three tokens in turn that follow on them."""
    with closing(LoadedModel(opened, plan_engine(opened), lambda done, total: None)) as model:
        assert model.mtp is not None
        model.runner.run(batch_of(TEXT, 0))
        hidden = model.runner.hidden.copy()
        model.mtp.store(batch_of(TEXT, 0), np.concatenate([np.zeros_like(hidden[:1]), hidden[:-1]]))
        rows, last = [], hidden[-1:]
        for place, token in enumerate((50, 3, 17), len(TEXT)):
            logits, last = model.mtp.predict(batch_of((token,), place), last)
            rows.append(logits.copy())
    return hidden, np.concatenate(rows)


def test_the_block_predicts_what_the_cpus_does(random: Path, one_device: Devices) -> None:
    opened = config(random, draft="mtp")
    hidden, logits = predicted(reconfigured(opened, device="none", weights="copied"))
    assert logits.std() > 0.1
    own_hidden, own_logits = predicted(reconfigured(opened, **one_device.settings))
    one_device.check(own_logits, logits, random)
    if one_device.is_exact:
        np.testing.assert_array_equal(own_hidden, hidden)


def test_its_memory_is_the_devices(random: Path, one_device: Devices) -> None:
    opened = config(random, **one_device.settings)
    without, with_block = (plan_engine(reconfigured(opened, draft=draft)) for draft in ("none", "mtp"))
    assert with_block.mtp is not None
    n_weights = sum(source.n_bytes for source in with_block.mtp.weights)
    (device,), (plain,) = with_block.devices, without.devices
    assert device.required - plain.required == device.mtp
    assert n_weights < device.mtp < 3 * n_weights
    assert 0 < with_block.mtp_bytes < n_weights / 2, "rows of the token table, and hidden states"
    drafting = reconfigured(opened, draft="mtp", vram=(str(least_vram(opened)),))
    shortfall = plan_engine(drafting).shortfall
    assert isinstance(shortfall, DoesNotFitError)
    assert "and the block that drafts tokens" in str(shortfall)
    with pytest.raises(DoesNotFitError):
        Engine.open(drafting)


def on_a_machine(opened: EngineConfig, n_bytes: int) -> Machine:
    """One whose host memory never lacks, and whose device has so much, of which a sixteenth is left free."""
    (device,) = this_machine(opened).devices
    n_bytes = n_bytes * 16 // 15 + 1
    device = replace(device, free_bytes=n_bytes, total_bytes=n_bytes, shares_host_memory=False)
    return replace(roomy_machine(), devices=(device,))


def test_layers_come_first_on_a_device_that_nobody_named(random: Path, one_device: Devices) -> None:
    opened = config(random, **one_device.settings)
    machine = on_a_machine(opened, least_vram(opened))
    plan = plan_engine(reconfigured(opened, device="auto", draft="mtp"), machine)
    (device,) = plan.devices
    assert plan.mtp is None
    assert any("--draft mtp" in note and f"{device.device.name} would have no room" in note for note in plan.notes)


def test_auto_takes_the_block_where_the_whole_model_is_on_devices(random: Path, one_device: Devices) -> None:
    opened = config(random, draft="auto", **one_device.settings)
    whole = plan_engine(opened)
    assert whole.mtp is not None
    (device,) = whole.devices
    cut = plan_engine(reconfigured(opened, vram=(str(device.required - 1),)))
    assert cut.mtp is None
    assert [one.is_whole for one in cut.devices] == [True], "without the block all of it has room"
    assert not cut.notes
