"""Models with recurrent layers answer several requests at once, and go on from what they have read, as others do."""

import random
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from slimoe.offload.engine import Engine
from slimoe.offload.errors import ModelFileError
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.model.model_file import ModelFile
from slimoe.offload.text.generation import (
    Event,
    Finished,
    GenerationRequest,
    PromptProgress,
    SamplingParams,
)
from tests.models.configs import engine_config
from tests.models.conversation import conversation, events_of, tokens_of
from tests.models.gguf_content import read_content, write_content
from tests.models.tiered import device_engine, resident_engine, tiered_engine
from tests.models.tiny_gguf import FAMILIES as FAMILIES_OF_FILES
from tests.models.tiny_gguf import FineShape, write_family
from tests.offload.devices import Devices

FAMILIES = ("qwen3next", "qwen3next-old", "qwen35moe", "lfm2moe", "granitehybrid", "nemotron_h_moe-latent")
SHAPE = FineShape(n_layer=4, n_embd_head=64, n_expert=8, n_expert_used=2)
draw = random.Random(3)
SYSTEM = tuple(draw.randrange(300) for _ in range(100))
QUESTIONS = [tuple(draw.randrange(300) for _ in range(n)) for n in (1, 9, 30, 70)]
N_BATCH = 48
STEP = 32
"""A state is kept at a multiple of so many tokens."""


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("recurrent") / "m.gguf", request.param, shape=SHAPE)


def open_engine(model: Path, **changed: Any) -> Engine:
    options: dict[str, Any] = {"n_ctx": 300, "n_batch": N_BATCH, "n_parallel": 3, "n_threads": 1, "kv_type": "f32"}
    return Engine.open(engine_config(model, **options | changed))


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Engine]:
    with closing(open_engine(model)) as engine:
        yield engine


@pytest.fixture(scope="module")
def alone(model: Path) -> Iterator[Engine]:
    with closing(open_engine(model, n_parallel=1)) as engine:
        yield engine


def greedy(prompt: tuple[int, ...], n: int = 6) -> GenerationRequest:
    return GenerationRequest(prompt, n, SamplingParams(temperature=0.0), ignore_eos=True)


def anew(engine: Engine, prompt: tuple[int, ...], n: int = 6) -> list[int]:
    """The answer of an engine that goes on from nothing."""
    engine.truncate(0)
    return tokens_of(list(engine.generate(greedy(prompt, n))))


def together(engine: Engine, prompts: list[tuple[int, ...]], n: int = 6) -> list[list[Event]]:
    return events_of(engine, [greedy(prompt, n) for prompt in prompts])


def n_read(events: list[Event]) -> int:
    """How many tokens of the prompt were computed, by what the engine says of each step."""
    [cached] = {event.n_cached for event in events if isinstance(event, PromptProgress)}
    finished = events[-1]
    assert isinstance(finished, Finished)
    assert finished.timings.cached_n == cached
    return finished.timings.prompt_n


def watched(engine: Engine, prompt: tuple[int, ...]) -> tuple[list[Event], int]:
    """The events of one request, and how many tokens the graphs really computed for its prompt and answer."""
    before = engine.snapshot().work.total
    [events] = together(engine, [prompt])
    after = engine.snapshot().work.total
    return events, after.n_prompt + after.n_predicted - before.n_prompt - before.n_predicted


def test_answers_at_once_are_those_of_each_alone(engine: Engine, alone: Engine) -> None:
    prompts = [(*SYSTEM[:20], *question) for question in QUESTIONS] + [QUESTIONS[3], (5,)]
    for events, prompt in zip(together(engine, prompts), prompts, strict=True):
        assert tokens_of(events) == anew(alone, prompt)


def test_the_same_question_again_reads_its_end_only(model: Path, alone: Engine) -> None:
    prompt = (*SYSTEM, *QUESTIONS[2])
    with closing(open_engine(model)) as engine:
        _, n_first = watched(engine, prompt)
        events, n_computed = watched(engine, prompt)
    assert n_first == len(prompt) + 5
    assert n_computed == n_read(events) + 5
    assert n_read(events) <= STEP + 8
    assert tokens_of(events) == anew(alone, prompt)


def test_a_conversation_goes_on_from_its_last_answer(model: Path, alone: Engine) -> None:
    with closing(open_engine(model)) as engine:
        first = watched(engine, (*SYSTEM, *QUESTIONS[1]))[0]
        following = (*SYSTEM, *QUESTIONS[1], *tokens_of(first), *QUESTIONS[2])
        events, _ = watched(engine, following)
    # The last token of an answer is drawn, and not read.
    assert n_read(events) == len(QUESTIONS[2]) + 1
    assert tokens_of(events) == anew(alone, following)


def test_an_edited_question_goes_on_from_the_last_state_before_it(model: Path, alone: Engine) -> None:
    edited = (*SYSTEM, *QUESTIONS[1], *QUESTIONS[3])
    with closing(open_engine(model)) as engine:
        watched(engine, (*SYSTEM, *QUESTIONS[2]))
        events, n_computed = watched(engine, edited)
    assert len(edited) - len(SYSTEM) <= n_read(events) <= len(edited) - len(SYSTEM) + N_BATCH
    assert n_computed == n_read(events) + 5
    assert tokens_of(events) == anew(alone, edited)


def test_a_cancelled_prompt_goes_on_where_it_stopped(model: Path, alone: Engine) -> None:
    prompt = (*SYSTEM, *QUESTIONS[3])
    with closing(open_engine(model)) as opened:

        def is_cancelled() -> bool:
            return opened.snapshot().work.total.n_prompt > 2 * N_BATCH

        opened.submit(greedy(prompt), is_cancelled)
        while not opened.is_idle:
            opened.step()
        assert opened.snapshot().work.total.n_prompt < len(prompt)
        [events] = together(opened, [prompt])
    assert n_read(events) <= len(prompt) - 2 * N_BATCH
    assert tokens_of(events) == anew(alone, prompt)


def test_a_step_that_fails_loses_nothing(model: Path, alone: Engine) -> None:
    prompt = (*SYSTEM, *QUESTIONS[1])
    with closing(open_engine(model, n_parallel=1)) as engine:
        engine.prefill(prompt)
        expected = engine.decode(7).copy()
        engine.truncate(0)
        engine.prefill(prompt)
        with pytest.raises(Exception, match=r".*"):
            engine.read(QUESTIONS[0] * 3, is_cancelled=lambda: True)
        assert engine.n_past == len(prompt)
        np.testing.assert_array_equal(engine.decode(7), expected)


def test_more_conversations_than_states(model: Path, alone: Engine) -> None:
    prompts = [(*SYSTEM[: 10 * n], *QUESTIONS[n % 4]) for n in range(10)]
    expected = [anew(alone, prompt) for prompt in prompts]
    with closing(open_engine(model, n_parallel=2)) as engine:
        for _ in range(2):
            assert [tokens_of(events) for events in together(engine, prompts)] == expected


def test_in_tiers_too(model: Path, alone: Engine) -> None:
    prompts = [(*SYSTEM, *question) for question in QUESTIONS]
    expected = [anew(alone, prompt) for prompt in prompts]
    options: dict[str, Any] = {"n_ctx": 300, "n_batch": N_BATCH, "n_parallel": 3, "n_threads": 1, "kv_type": "f32"}
    with closing(tiered_engine(engine_config(model, **options), 0.5)) as engine:
        assert [tokens_of(events) for events in together(engine, prompts)] == expected
        events, _ = watched(engine, prompts[2])
        assert n_read(events) <= STEP + 8
        assert tokens_of(events) == expected[2]


def test_cutting_falls_back_to_a_place_that_has_a_state(model: Path) -> None:
    with closing(open_engine(model, n_parallel=1)) as engine:
        engine.prefill(SYSTEM)
        engine.decode(3)
        engine.truncate(len(SYSTEM))
        assert engine.n_past == len(SYSTEM)
        engine.truncate(5)
        assert engine.n_past == 0


def test_a_slot_goes_on_after_a_restart(model: Path, alone: Engine, tmp_path: Path) -> None:
    prompt = (*SYSTEM, *QUESTIONS[1])
    with closing(open_engine(model)) as engine:
        [first] = together(engine, [prompt])
        saved = engine.slots.save(0, tmp_path / "slot")
        assert saved.n_tokens == len(prompt) + 5
    following = (*prompt, *tokens_of(first), *QUESTIONS[2])
    with closing(open_engine(model)) as engine:
        together(engine, [QUESTIONS[3]])
        assert engine.slots.restore(0, tmp_path / "slot")[:2] == saved[:2]
        events, n_computed = watched(engine, following)
    assert n_read(events) == len(QUESTIONS[2]) + 1 == n_computed - 5
    assert tokens_of(events) == anew(alone, following)


def test_taps_of_another_type_are_refused(tmp_path: Path) -> None:
    path = write_family(tmp_path / "m.gguf", "lfm2moe", shape=SHAPE)
    content = read_content(path)
    name = "blk.0.shortconv.conv.weight"
    halves = content.quantised(Type.F16, lambda tensor: tensor == name)
    with pytest.raises(ModelFileError, match=rf"tensor {name} is F16"):
        ModelFile.of(read_gguf(write_content(tmp_path / "f16.gguf", halves)))


@pytest.mark.parametrize(
    ("name", "keys", "problem"),
    [
        ("qwen3next", {"full_attention_interval": 9}, "no layer has attention"),
        ("qwen35moe", {"ssm.conv_kernel": 1}, "convolutions see a single token"),
        ("lfm2moe", {"shortconv.l_cache": 1}, "convolutions see a single token"),
        ("qwen3next", {"ssm.group_count": 3}, "in 4 heads of 64, and 3 key heads"),
        ("qwen3next", {"ssm.inner_size": 128}, "its delta net has 128 values"),
        ("qwen35moe", {"ssm.state_size": None}, r"ssm\.state_size is missing"),
        ("qwen35moe", {"ssm.state_size": 0}, "is no count"),
        ("granitehybrid", {"ssm.inner_size": 500}, "Mamba-2 layers have 500 values in 8 heads, and 1 groups"),
        ("granitehybrid", {"ssm.group_count": 3}, "Mamba-2 layers have 512 values in 8 heads, and 3 groups"),
        ("granitehybrid", {"attention.head_count_kv": 0}, "is no count"),
    ],
)
def test_impossible_sizes_are_refused(tmp_path: Path, name: str, keys: dict[str, int | None], problem: str) -> None:
    content = read_content(write_family(tmp_path / "whole.gguf", name, shape=SHAPE))
    changed = content.with_keys({f"{name}.{key}": value for key, value in keys.items()})
    with pytest.raises(ModelFileError, match=problem):
        ModelFile.of(read_gguf(write_content(tmp_path / "m.gguf", changed)))


def test_recurrence_may_be_in_no_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES_OF_FILES["qwen3next"]
    without = replace(family, recurrent=(), keys=family.keys | {"full_attention_interval": 1})
    monkeypatch.setitem(FAMILIES_OF_FILES, "qwen3next", without)
    with closing(open_engine(write_family(tmp_path / "m.gguf", "qwen3next", shape=SHAPE))) as engine:
        assert engine.spec.recurrent is None
        assert len(anew(engine, SYSTEM)) == 6


@pytest.mark.parametrize("on_device", [0.5, 2.0], ids=["cut", "whole"])
def test_on_devices_that_share_the_layers(model: Path, two_devices: Devices, tmp_path: Path, on_device: float) -> None:
    options: dict[str, Any] = {"n_ctx": 300, "n_batch": N_BATCH, "n_parallel": 2, "n_threads": 1, "kv_type": "f16"}
    with closing(resident_engine(engine_config(model, **options))) as engine:
        expected = conversation(engine)
    with closing(device_engine(engine_config(model, **options, **two_devices.settings), on_device)) as engine:
        two_devices.check(conversation(engine), expected, model)
        engine.truncate(0)
        events, _ = watched(engine, (*SYSTEM, *QUESTIONS[2]))
        again, _ = watched(engine, (*SYSTEM, *QUESTIONS[2]))
        assert n_read(again) <= STEP + 8
        assert tokens_of(again) == tokens_of(events) or not two_devices.is_exact
        engine.slots.save(0, tmp_path / "slot")
        following = (*SYSTEM, *QUESTIONS[2], *tokens_of(again), *QUESTIONS[1])
        on_devices, _ = watched(engine, following)
    with closing(open_engine(model, kv_type="f16")) as engine:
        engine.slots.restore(0, tmp_path / "slot")
        events, _ = watched(engine, following)
    assert n_read(events) == n_read(on_devices) == len(QUESTIONS[1]) + 1
    assert tokens_of(events) == tokens_of(on_devices) or not two_devices.is_exact
