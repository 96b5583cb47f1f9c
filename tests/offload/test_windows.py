"""Sliding windows: the layers that have one are llama.cpp's; what is refused; prompts that share a beginning."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from bench.baselines.llama_cpp import LlamaCpp, LlamaCppConfig
from bench.baselines.stepping import random_tokens
from slimoe.offload.engine import Engine
from slimoe.offload.errors import ModelFileError
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.model.model_file import ModelFile
from slimoe.offload.model.spec import ModelSpec
from slimoe.offload.plan.context_notes import context_notes, window_note
from slimoe.offload.text.generation import Finished, GenerationRequest, SamplingParams, Timings, TokenStep
from tests.models.configs import engine_config
from tests.models.gguf_content import Array, GGUFContent, StoredKey, read_content, write_content
from tests.models.tiny_gguf import FineShape, write_family

TOKENS = random_tokens(90, 300)
SHAPE = FineShape(n_layer=3, n_embd=64, n_ff=32, n_embd_head=32, n_expert=4, n_expert_used=2)
PATTERN = "gpt-oss.attention.sliding_window_pattern"
WINDOW = "gpt-oss.attention.sliding_window"


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> GGUFContent:
    return read_content(write_family(tmp_path_factory.mktemp("windows") / "m.gguf", "gpt-oss", shape=SHAPE))


def with_pattern(content: GGUFContent, entries: Sequence[int | bool]) -> GGUFContent:
    item = gguf.GGUFValueType.BOOL if isinstance(entries[0], bool) else gguf.GGUFValueType.INT32
    key = StoredKey(list(entries), gguf.GGUFValueType.ARRAY, item)
    return replace(content, keys=content.keys | {PATTERN: key})


def spec_of(path: Path) -> ModelSpec:
    return ModelFile.of(read_gguf(path)).spec


def config(path: Path, **settings: Any) -> Any:
    return engine_config(path, **{"n_ctx": 256, "n_threads": 1, "weights": "copied"} | settings)


def told(path: Path, parts: Sequence[Sequence[int]]) -> Array:
    with closing(Engine.open(config(path))) as engine:
        return np.concatenate([engine.read(part, len(part)).copy() for part in parts])


@pytest.mark.parametrize(
    ("pattern", "windowed"),
    [
        (None, (True, False, True)),
        (3, (True, True, False)),
        ([0, 1, 1], (False, True, True)),
        ([False, False, True], (False, False, True)),
    ],
    ids=str,
)
def test_layers_with_windows_are_llama_cpps(
    tmp_path: Path, content: GGUFContent, pattern: int | list[int] | None, windowed: tuple[bool, ...]
) -> None:
    """A prompt much longer than the window, in batches, and single tokens behind it, to the last bit."""
    changed = with_pattern(content, pattern) if isinstance(pattern, list) else content.with_keys({PATTERN: pattern})
    path = write_content(tmp_path / "m.gguf", changed)
    assert spec_of(path).windowed == windowed
    parts = [TOKENS[:70], *([token] for token in TOKENS[70:])]
    with closing(LlamaCpp(LlamaCppConfig(path, 256, 1, extra_buffers=False))) as baseline:
        expected = np.concatenate([baseline.score(part) for part in parts])
    np.testing.assert_array_equal(told(path, parts), expected)


def test_all_layers_or_none_have_windows(tmp_path: Path, content: GGUFContent) -> None:
    """Without any it is as with a window that nothing leaves; llama.cpp ends itself there."""
    plain = content.with_keys({"gpt-oss.rope.freq_base_swa": None})
    none = write_content(tmp_path / "none.gguf", plain.with_keys({PATTERN: 1}))
    wide = write_content(tmp_path / "wide.gguf", plain.with_keys({WINDOW: 512}))
    every = write_content(tmp_path / "every.gguf", plain.with_keys({PATTERN: 0}))
    assert (spec_of(none).windowed, spec_of(every).windowed) == ((False,) * 3, (True,) * 3)
    expected = told(wide, [TOKENS])
    np.testing.assert_array_equal(told(none, [TOKENS]), expected)
    found = told(every, [TOKENS])
    np.testing.assert_array_equal(found[:8], expected[:8])
    assert np.abs(found[8:] - expected[8:]).max() > 0.1


def test_what_is_written_of_windows_is_read(tmp_path: Path, content: GGUFContent) -> None:
    spec = spec_of(write_content(tmp_path / "m.gguf", with_pattern(content, [1, 1, 0])))
    assert (spec.n_window, spec.windowed, spec.rope.window_freq_base) == (8, (True, True, False), 5e5)
    written = spec.metadata()
    assert (written[PATTERN], written[WINDOW]) == ([1, 1, 0], 8)
    assert (context_notes(spec, 512), window_note(spec)) == ((), "")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ([1, 0], "sliding_window_pattern has 2 entries, but 3 belong to this model"),
        ([1, 0, 1, 0], "sliding_window_pattern has 4 entries, but 3 belong to this model"),
        ([1, 0, 2], "entry 2 of .*sliding_window_pattern is 2, which cannot be"),
        ([1, -1, 0], "entry 1 of .*sliding_window_pattern is -1, which cannot be"),
        (True, "sliding_window_pattern is True, which is no count"),
        ("odd", "sliding_window_pattern is 'odd', which is no count"),
    ],
    ids=str,
)
def test_a_pattern_that_does_not_fit_is_refused(
    tmp_path: Path, content: GGUFContent, pattern: int | str | list[int], message: str
) -> None:
    changed = with_pattern(content, pattern) if isinstance(pattern, list) else content.with_keys({PATTERN: pattern})
    with pytest.raises(ModelFileError, match=message):
        spec_of(write_content(tmp_path / "m.gguf", changed))


@pytest.mark.parametrize(("window", "message"), [(None, "sliding_window is missing"), (0, "is 0, which is no count")])
def test_windows_of_no_size_are_refused(tmp_path: Path, content: GGUFContent, window: int | None, message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        spec_of(write_content(tmp_path / "m.gguf", content.with_keys({WINDOW: window})))


def answer(engine: Engine, prompt: Sequence[int]) -> tuple[list[int], Timings]:
    engine.submit(GenerationRequest(tuple(prompt), 8, SamplingParams(temperature=0.0), ignore_eos=True))
    tokens: list[int] = []
    while not engine.is_idle:
        for _, event in engine.step():
            if isinstance(event, TokenStep):
                tokens.append(event.token)
            if isinstance(event, Finished):
                timings = event.timings
    return tokens, timings


def test_a_beginning_that_is_used_again_is_whole_in_layers_with_windows(tmp_path: Path, content: GGUFContent) -> None:
    """The second prompt leaves the first one where the windows of its tokens still reach into what was answered."""
    path = write_content(tmp_path / "m.gguf", content)
    first, second = TOKENS[:70], [*TOKENS[:66], 7, 8, 9]
    with closing(Engine.open(config(path, kv_type="f32"))) as engine:
        answer(engine, first)
        found, timings = answer(engine, second)
    assert timings.cached_n >= 64
    with closing(Engine.open(config(path, kv_type="f32"))) as alone:
        expected, _ = answer(alone, second)
    assert found == expected
