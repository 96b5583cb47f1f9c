"""Models whose layers with a window keep only that: llama.cpp's logits, beginnings used again, disk, devices."""

import random
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from bench.baselines.llama_cpp import LlamaCpp, LlamaCppConfig
from slimoe.offload.engine import Engine
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.memory.kv_cache import KVSize, kv_size
from slimoe.offload.model.model_file import ModelFile
from slimoe.offload.text.generation import Failed, Finished, GenerationRequest, SamplingParams, TokenStep
from tests.models.configs import engine_config
from tests.models.conversation import conversation
from tests.models.gguf_content import Array, read_content, write_content
from tests.models.tiered import device_engine, resident_engine, tiered_engine
from tests.models.tiny_gguf import FineShape, write_family
from tests.offload.devices import Devices
from tests.offload.drafted import answers as drafted

WINDOWS = {"gpt-oss": 40, "gemma4": 24}
SHAPES = {
    "gpt-oss": FineShape(n_layer=3, n_embd=64, n_ff=32, n_embd_head=32, n_expert=4, n_expert_used=2),
    "gemma4": FineShape(n_layer=4, n_head_kv=1, n_expert=8, n_expert_used=2),
}
N_CTX, N_BATCH = 1024, 64
draw = random.Random(5)
TEXT = [draw.randrange(300) for _ in range(1000)]


@pytest.fixture(scope="module", params=WINDOWS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file whose window is wide enough to be no multiple of anything, and narrower than a batch."""
    folder = tmp_path_factory.mktemp("windowed")
    content = read_content(write_family(folder / "plain.gguf", request.param, shape=SHAPES[request.param]))
    keys = {f"{request.param}.attention.sliding_window": WINDOWS[request.param]}
    return write_content(folder / "m.gguf", content.with_keys(keys))


def config(model: Path, **changed: Any) -> Any:
    """The cache in F32: in F16 sums in another order, as over cells that are lent again, differ by more."""
    options = {"n_ctx": N_CTX, "n_batch": N_BATCH, "n_threads": 1, "weights": "copied", "kv_type": "f32"}
    return engine_config(model, **options | changed)


def read(engine: Engine, parts: Sequence[Sequence[int]]) -> Array:
    return np.concatenate([engine.read(part, len(part)).copy() for part in parts])


def greedy(prompt: Sequence[int], n: int = 6) -> GenerationRequest:
    return GenerationRequest(tuple(prompt), n, SamplingParams(temperature=0.0), ignore_eos=True)


def answers(engine: Engine, prompts: Sequence[Sequence[int]], n: int = 6) -> list[list[int]]:
    """The tokens of answers to requests at once."""
    ids, told = [engine.submit(greedy(prompt, n)) for prompt in prompts], dict[int, list[int]]()
    while not engine.is_idle:
        for id, event in engine.step():
            assert not isinstance(event, Failed), event.error
            if isinstance(event, TokenStep):
                told.setdefault(id, []).append(event.token)
    return [told[id] for id in ids]


def watched(engine: Engine, prompt: Sequence[int], n: int = 6) -> tuple[list[int], int]:
    """An answer, and how many tokens of the prompt the graphs really computed, which is what the request was told."""
    before = engine.snapshot().work.total
    engine.submit(greedy(prompt, n))
    tokens, told = list[int](), -1
    while not engine.is_idle:
        for _, event in engine.step():
            if isinstance(event, TokenStep):
                tokens.append(event.token)
            if isinstance(event, Finished):
                told = event.timings.prompt_n
    after = engine.snapshot().work.total
    n_computed = after.n_prompt + after.n_predicted - before.n_prompt - before.n_predicted - (n - 1)
    assert n_computed == told
    return tokens, n_computed


@pytest.fixture
def engine(model: Path) -> Iterator[Engine]:
    with closing(Engine.open(config(model))) as engine:
        assert 0 < engine.plan.kv.n_window_cells < engine.plan.kv.n_cells
        yield engine


@pytest.fixture(scope="module")
def alone(model: Path) -> Iterator[Engine]:
    """Layers with a window keep all tokens here: the batch may be as large as the context."""
    with closing(Engine.open(config(model, n_batch=N_CTX))) as engine:
        assert engine.plan.kv.n_window_cells == 0
        yield engine


def anew(engine: Engine, prompt: Sequence[int], n: int = 6) -> list[int]:
    """The answer of an engine that goes on from nothing."""
    engine.truncate(0)
    return [event.token for event in engine.generate(greedy(prompt, n)) if isinstance(event, TokenStep)]


def test_many_windows_later_logits_are_llama_cpps(model: Path) -> None:
    """In batches larger than the window, smaller ones and single tokens: llama.cpp is given the same ones.

    They are to the last bit until cells are lent a second time: then sums are made in another order.
    """
    sizes = [64] * 6 + [17] * 3 + [1] * 40 + [64] * 3 + [1] * 20
    ends = np.cumsum(sizes)
    parts = [TEXT[end - size : end] for size, end in zip(sizes, ends, strict=True)]
    with closing(LlamaCpp(LlamaCppConfig(model, N_CTX, 1, extra_buffers=False))) as baseline:
        expected = np.concatenate([baseline.score(part) for part in parts])
    assert expected.std() > 0.5, "logits that are all alike show nothing"
    with closing(Engine.open(config(model, kv_type="f16"))) as engine:
        found, n_lent = read(engine, parts), engine.plan.kv.n_window_cells
    np.testing.assert_array_equal(found[:n_lent], expected[:n_lent])
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-2)


@pytest.mark.parametrize(("kv_type", "most"), [("f32", 1e-3), ("q8_0", 0.2), ("q4_0", 0.5)])
def test_windows_apart_change_no_logit_by_more_than_rounding(model: Path, kv_type: str, most: float) -> None:
    """Of a quantised cache rounding selects other experts for some tokens."""
    parts = [*(TEXT[n : n + N_BATCH] for n in range(0, 640, N_BATCH)), *([token] for token in TEXT[640:680])]
    with closing(Engine.open(config(model, kv_type=kv_type))) as engine:
        assert engine.plan.kv.n_window_cells
        found = read(engine, parts)
    with closing(Engine.open(config(model, kv_type=kv_type, n_batch=N_CTX))) as engine:
        assert engine.plan.kv.n_window_cells == 0
        expected = read(engine, parts)
    assert np.sqrt(np.square(found - expected).mean()) < most / 10
    assert np.quantile(np.abs(found - expected).max(axis=1), 0.9) < most


def test_requests_at_once_answer_as_each_alone(model: Path, alone: Engine) -> None:
    prompts = [TEXT[:n] for n in (300, 41, 500, 7, 130)] + [[*TEXT[:200], *TEXT[600:700]]]
    with closing(Engine.open(config(model, n_parallel=3))) as engine:
        assert engine.plan.kv.n_window_cells
        assert answers(engine, prompts, 20) == [anew(alone, prompt, 20) for prompt in prompts]


def test_a_conversation_goes_on_where_it_ended(engine: Engine, alone: Engine) -> None:
    prompt = TEXT[:500]
    told, n_first = watched(engine, prompt)
    following = [*prompt, *told, *TEXT[500:520]]
    found, n_computed = watched(engine, following)
    assert (n_first, n_computed) == (500, 21)
    assert found == anew(alone, following)


def test_a_question_that_is_asked_again_reads_little(engine: Engine, alone: Engine) -> None:
    """After an answer of several windows, the place before the question's end is still kept."""
    prompt = TEXT[:500]
    watched(engine, prompt, 300)
    found, n_computed = watched(engine, prompt)
    assert n_computed <= 40
    assert found == anew(alone, prompt)


def test_what_cannot_be_gone_on_from_is_computed_again(engine: Engine, alone: Engine) -> None:
    """A text that leaves another one where its windows are passed is read from the last place before that is kept."""
    watched(engine, TEXT[:900], 50)
    left_early = [*TEXT[:410], *TEXT[700:720]]
    found, n_computed = watched(engine, left_early)
    assert 20 < n_computed <= 430
    assert (430 - n_computed) % N_BATCH == 0, "places are kept behind what was read at once"
    assert found == anew(alone, left_early)


def test_a_beginning_in_common_is_read_once(model: Path, alone: Engine) -> None:
    """As long as its window is held: by who reads on from there, or kept for others."""
    prompts = [[*TEXT[:320], *TEXT[500 + 20 * n : 520 + 20 * n]] for n in range(3)]
    with closing(Engine.open(config(model))) as engine:
        counts = []
        for prompt in prompts:
            found, n_computed = watched(engine, prompt)
            counts.append(n_computed)
            assert found == anew(alone, prompt)
    assert counts == [340, 20, 20]


def test_forgetting_the_end_falls_back_to_a_place_that_is_whole(engine: Engine, alone: Engine) -> None:
    engine.prefill(TEXT[:600])
    engine.truncate(597)
    assert engine.n_past == 597
    expected = anew(alone, [*TEXT[:597], 7], 1)
    assert [int(engine.decode(7).argmax())] == expected
    engine.truncate(100)
    assert engine.n_past == 0


def test_in_tiers_too(model: Path) -> None:
    parts = [
        TEXT[:64],
        TEXT[64:128],
        TEXT[128:192],
        TEXT[192:256],
        TEXT[256:300],
        *([token] for token in TEXT[300:310]),
    ]
    with closing(resident_engine(config(model))) as engine:
        expected = read(engine, parts)
    with closing(tiered_engine(config(model), 0.5)) as engine:
        assert engine.plan.kv.n_window_cells
        np.testing.assert_array_equal(read(engine, parts), expected)


@pytest.mark.parametrize("on_device", [0.5, 2.0], ids=["cut", "whole"])
def test_on_devices_that_share_the_layers(model: Path, two_devices: Devices, on_device: float) -> None:
    options: dict[str, Any] = {"n_ctx": N_CTX, "n_batch": 48, "n_parallel": 2, "n_threads": 1, "kv_type": "f16"}
    with closing(resident_engine(engine_config(model, **options))) as engine:
        assert engine.plan.kv.n_window_cells
        expected = conversation(engine)
    with closing(device_engine(engine_config(model, **options, **two_devices.settings), on_device)) as engine:
        two_devices.check(conversation(engine), expected, model)


def test_a_saved_slot_has_the_last_window_only(model: Path, tmp_path: Path) -> None:
    with closing(Engine.open(config(model))) as engine:
        told = answers(engine, [TEXT[:500]])[0]
        saved = engine.slots.save(0, tmp_path / "slot")
        following = [*TEXT[:500], *told, *TEXT[500:520]]
        expected, n_expected = watched(engine, following)
        spec, n_tokens = engine.spec, saved.n_tokens
    sizes = KVSize(Type.F32, n_tokens, 0, spec.n_window - 1)
    assert n_tokens == 505
    assert 0 < saved.n_bytes - sizes.n_bytes(spec) - 4 * n_tokens < 1000
    with closing(Engine.open(config(model))) as engine:
        assert engine.slots.restore(0, tmp_path / "slot").n_tokens == n_tokens
        assert watched(engine, following) == (expected, n_expected)


def test_prompts_on_disk_are_gone_on_from(model: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"prompt_cache": tmp_path / "prompts", "prompt_cache_size": 1 << 30}
    prompt = TEXT[:500]
    with closing(Engine.open(config(model, **settings))) as engine:
        first, _ = watched(engine, prompt)
        while engine.tidy():
            pass
    kinds = {path.suffix for path in (tmp_path / "prompts").iterdir()}
    assert {".kv", ".window"} <= kinds
    following = [*prompt, *first, *TEXT[500:530]]
    with closing(Engine.open(config(model, **settings))) as engine:
        again, n_again = watched(engine, prompt)
        assert again == first
        assert n_again <= N_BATCH + 20
        found, n_computed = watched(engine, following)
        assert n_computed <= 40
    with closing(Engine.open(config(model))) as engine:
        assert found == watched(engine, following)[0]
    for path in (tmp_path / "prompts").glob("*.window"):
        path.unlink()
    with closing(Engine.open(config(model, **settings))) as engine:
        assert watched(engine, prompt) == (first, 500)


def test_limits_that_change_keep_what_was_read(model: Path) -> None:
    with closing(Engine.open(config(model, weights="auto", ram="auto"))) as engine:
        told, _ = watched(engine, TEXT[:500])
        least = engine.plan.weight_forms.required
        engine.rebudget(str(least + (8 << 20)), ())
        found, n_computed = watched(engine, [*TEXT[:500], *told, 7])
    assert n_computed == 2
    with closing(Engine.open(config(model, weights="auto", ram="auto"))) as engine:
        assert found == watched(engine, [*TEXT[:500], *told, 7])[0]


def test_the_plan_counts_windows_apart(model: Path) -> None:
    """Cells for a window of each request and one more, and for a batch, in steps of 256."""
    spec = ModelFile.of(read_gguf(model)).spec
    windowed = [layer for layer in range(spec.n_layer) if spec.window(layer)]
    others = [layer for layer in range(spec.n_layer) if not spec.window(layer)]
    with closing(Engine.open(config(model, n_parallel=2, kv_type="f16"))) as engine:
        size, held = engine.plan.kv, engine.memory()["kv"]
    assert (size.n_cells, size.n_window_cells) == (2048, 256)
    rows = {layer: 2 * spec.attention_of(layer).n_cached for layer in range(spec.n_layer)}
    expected = sum(2048 * rows[layer] for layer in others) + sum(256 * rows[layer] for layer in windowed)
    assert held == size.n_bytes(spec) == expected
    assert size.n_bytes(spec, windowed) == sum(256 * rows[layer] for layer in windowed)
    assert size.n_masked(spec) == 2048 + 256
    assert kv_size(spec, Type.F16, 256, 256, 1).n_window_cells == 0
    assert kv_size(spec, Type.F16, 4096, 512, 1).n_window_cells == 768


def test_drafts_change_no_answer(model: Path, alone: Engine) -> None:
    """Wrong ones are taken out of windows again, which then still hold all that the next token sees."""
    few = SamplingParams(0.0, logit_bias=dict.fromkeys((5, 9, 30), 50.0))
    prompts = [TEXT[:12] * 10, TEXT[40:52] * 8]
    requests = [GenerationRequest(tuple(prompt), 150, few, ignore_eos=True) for prompt in prompts]
    with closing(Engine.open(config(model, draft="ngram", n_parallel=2))) as engine:
        assert engine.plan.kv.n_window_cells
        found = drafted(engine, *requests)
    assert [one.tokens for one in found] == [drafted(alone, request)[0].tokens for request in requests]
    timings = [one.finished.timings for one in found]
    assert sum(one.draft_n for one in timings) >= sum(one.draft_n_accepted for one in timings) > 50
