"""Layers with a window whose heads are not those of the others: on devices, in slots, planned, and what is refused."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from bench.baselines.llama_cpp import LlamaCpp, LlamaCppConfig
from bench.baselines.stepping import random_tokens
from slimoe.offload.engine import Engine
from slimoe.offload.errors import SlimoeError
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.machine.measure import kernel_needs
from slimoe.offload.memory.kv_cache import kv_bytes
from slimoe.offload.model.experts import expert_layers
from slimoe.offload.model.model_file import ModelFile
from slimoe.offload.text.generation import GenerationRequest, SamplingParams, TokenStep
from tests.models.configs import engine_config
from tests.models.conversation import conversation
from tests.models.gguf_content import Array, GGUFContent, StoredKey, read_content, write_content
from tests.models.tiered import device_engine, resident_engine
from tests.models.tiny_gguf import FineShape, write_family
from tests.offload.devices import Devices

SHAPE = FineShape(n_layer=4, n_head_kv=1, n_expert=8, n_expert_used=2)
TOKENS = random_tokens(40, 300)
OPTIONS: dict[str, Any] = {"n_ctx": 300, "n_batch": 48, "n_parallel": 2, "n_threads": 1, "kv_type": "f16"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("gemma") / "m.gguf", "gemma4", Type.Q8_0, SHAPE)


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> GGUFContent:
    return read_content(write_family(tmp_path_factory.mktemp("gemma") / "m.gguf", "gemma4", shape=SHAPE))


def answer(engine: Engine, prompt: tuple[int, ...]) -> list[int]:
    engine.submit(GenerationRequest(prompt, 8, SamplingParams(temperature=0.0), ignore_eos=True))
    told = list[int]()
    while not engine.is_idle:
        told += [event.token for _, event in engine.step() if isinstance(event, TokenStep)]
    return told


@pytest.mark.parametrize("on_device", [0.5, 2.0], ids=["cut", "whole"])
def test_on_devices_that_share_the_layers(model: Path, two_devices: Devices, on_device: float) -> None:
    with closing(resident_engine(engine_config(model, **OPTIONS))) as engine:
        expected = conversation(engine)
    with closing(device_engine(engine_config(model, **OPTIONS, **two_devices.settings), on_device)) as engine:
        two_devices.check(conversation(engine), expected, model)


def test_a_slot_goes_on_after_a_restart(model: Path, tmp_path: Path) -> None:
    prompt = tuple(TOKENS)
    with closing(Engine.open(engine_config(model, **OPTIONS))) as engine:
        told = answer(engine, prompt)
        saved = engine.slots.save(0, tmp_path / "slot")
        following = (*prompt, *told, 7, 8, 9)
        expected = answer(engine, following)
    assert saved.n_tokens == len(prompt) + len(told) - 1
    with closing(Engine.open(engine_config(model, **OPTIONS))) as engine:
        restored = engine.slots.restore(0, tmp_path / "slot")
        assert (restored.n_tokens, restored.n_bytes) == (saved.n_tokens, saved.n_bytes)
        assert answer(engine, following) == expected


def test_the_plan_counts_both_kinds_of_heads(model: Path) -> None:
    file = ModelFile.of(read_gguf(model))
    spec = file.spec
    # Two layers of 4 key heads of 64 values with a window, two of one head of 128, keys and values in two bytes each.
    assert kv_bytes(spec, 256, Type.F16) == 256 * 2 * 2 * (2 * 4 * 64 + 2 * 128)
    assert kv_bytes(spec, 256, Type.F16, [0]) == 256 * 2 * 2 * 4 * 64
    assert kv_bytes(spec, 256, Type.F16, [1]) == 256 * 2 * 2 * 128
    assert [spec.attention_of(layer).n_embd_head for layer in range(4)] == [64, 128, 64, 128]
    shapes = kernel_needs(spec, file.sources, expert_layers(file.sources, spec)).attentions
    assert {(shape.n_head_kv, shape.n_embd_head): n for shape, n in shapes.items()} == {(4, 64): 2, (1, 128): 2}


def changed(content: GGUFContent, name: str, value: Any) -> GGUFContent:
    """The content with another key, or without it; a list is an array."""
    if not isinstance(value, list):
        return content.with_keys({f"gemma4.{name}": value})
    item = gguf.GGUFValueType.BOOL if isinstance(value[0], bool) else gguf.GGUFValueType.INT32
    key = StoredKey(value, gguf.GGUFValueType.ARRAY, item)
    return replace(content, keys=content.keys | {f"gemma4.{name}": key})


def logits(path: Path) -> Array:
    with closing(Engine.open(engine_config(path, n_ctx=256, n_threads=1, weights="copied"))) as engine:
        return engine.read(TOKENS, len(TOKENS)).copy()


NO_VALUES = dict.fromkeys(f"blk.{layer}.attn_v.weight" for layer in (0, 3))
NO_SCALES = dict.fromkeys(f"blk.{layer}.layer_output_scale.weight" for layer in (1, 2))
OWN_OUTPUT: dict[str, Array | None] = {
    "output.weight": np.random.default_rng(5).standard_normal((300, 256), dtype=np.float32) / 8
}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Array | None]]] = {
    "values are keys in a window too": ({}, NO_VALUES),
    "no scales of what leaves a layer": ({}, NO_SCALES),
    "an output matrix of its own": ({}, OWN_OUTPUT),
    "no bound of the logits": ({"final_logit_softcapping": 0.0}, {}),
    "the bound that is no key": ({"final_logit_softcapping": None}, {}),
    "the base that is no key": ({"rope.freq_base_swa": None}, {}),
    "part of a head rotates in windows": ({"rope.dimension_count_swa": 32}, {}),
    "a wider window": ({"attention.sliding_window": 30}, {}),
}


@pytest.mark.parametrize("case", VARIANTS)
def test_what_files_may_have_or_lack_is_computed_as_llama_cpp_does(
    tmp_path: Path, content: GGUFContent, case: str
) -> None:
    keys, tensors = VARIANTS[case]
    varied = content.with_values(tensors)
    for name, value in keys.items():
        varied = changed(varied, name, value)
    path = write_content(tmp_path / "m.gguf", varied)
    with closing(LlamaCpp(LlamaCppConfig(path, 256, 1, extra_buffers=False))) as baseline:
        expected = baseline.score(TOKENS)
    assert expected.std() > 0.5, "logits that are all alike show nothing"
    np.testing.assert_array_equal(logits(path), expected)


def test_one_fused_matrix_of_queries_keys_and_values(tmp_path: Path, content: GGUFContent) -> None:
    fused: dict[str, Array | None] = {}
    for layer in (0, 2, 3):
        parts = [f"blk.{layer}.attn_{one}.weight" for one in "qkv"]
        fused |= dict.fromkeys(parts)
        fused[f"blk.{layer}.attn_qkv.weight"] = np.concatenate([content.values(name) for name in parts])
    whole = write_content(tmp_path / "whole.gguf", content)
    joined = write_content(tmp_path / "joined.gguf", content.with_values(fused))
    np.testing.assert_array_equal(logits(joined), logits(whole))


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("embedding_length_per_layer_input", 256, "embeddings of tokens for each layer, as E2B and E4B have, are not"),
        ("attention.shared_kv_layers", 2, "layers that read the keys and values of others, as E2B and E4B have, are"),
        ("attention.head_count_kv", [4, 1, 1, 1], "head_count_kv differs between layers with a window"),
        ("attention.head_count_kv", [4, 1, 4, 2], "head_count_kv differs between layers without a window"),
        ("attention.head_count_kv", [3, 1, 3, 1], "4 attention heads do not divide into groups for 3 key heads"),
        ("attention.head_count_kv", [4, 1, 0, 1], "entry 2 of gemma4.attention.head_count_kv is 0"),
        ("attention.value_length_swa", 128, "keys and values of different length"),
        ("rope.dimension_count_swa", 96, "rotate 96 of 64 values per head"),
        ("rope.scaling.type", "yarn", "rope scaling is not supported where layers with a window have heads of their"),
        ("attention.sliding_window", None, "sliding_window is missing"),
        ("final_logit_softcapping", -1.0, "is no positive number"),
    ],
)
def test_what_is_not_run_is_refused_in_one_line(
    tmp_path: Path, content: GGUFContent, name: str, value: Any, problem: str
) -> None:
    path = write_content(tmp_path / "m.gguf", changed(content, name, value))
    with pytest.raises(SlimoeError, match=problem) as error:
        ModelFile.of(read_gguf(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name",
    ["blk.0.ffn_down_exps.scale", "blk.1.ffn_gate_inp.scale", "blk.2.post_ffw_norm.weight", "rope_freqs.weight"],
)
def test_a_tensor_that_no_answer_is_right_without_must_be_there(
    tmp_path: Path, content: GGUFContent, name: str
) -> None:
    path = write_content(tmp_path / "m.gguf", content.with_values({name: None}))
    with pytest.raises(SlimoeError, match=f"tensor {name} is missing"):
        ModelFile.of(read_gguf(path))
