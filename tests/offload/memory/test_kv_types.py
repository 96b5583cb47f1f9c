"""Types of the KV cache: the quantised ones round as llama.cpp's do, in all tiers, and less where heads are small."""

import functools
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from bench.baselines.llama_cpp import LlamaCpp, LlamaCppConfig
from bench.baselines.stepping import random_tokens
from slimoe.offload.engine import Engine
from slimoe.offload.errors import UsageError
from slimoe.offload.memory.kv_cache import hadamard, hadamard_lengths
from slimoe.offload.model.attention_spec import AttentionSpec
from slimoe.offload.plan.engine_plan import plan_engine
from slimoe.offload.text.generation import GenerationRequest, SamplingParams
from tests.models.configs import engine_config
from tests.models.conversation import conversation
from tests.models.gguf_content import Array, read_content, write_content
from tests.models.tiered import device_engine, resident_engine, tiered_engine
from tests.models.tiny_gguf import FineShape, write_family
from tests.offload.devices import Devices

TOKENS = random_tokens(40, 300)
PARTS = [TOKENS[:9], TOKENS[9:26], *([token] for token in TOKENS[26:])]
SHAPES = {
    "qwen3moe": FineShape(n_expert=8),
    "olmoe": FineShape(n_head_kv=4, n_embd_head=64, n_expert=8),
    "deepseek2": FineShape(n_expert=16),
    "qwen3next": FineShape(n_layer=4, n_expert=8),
    "gemma4": FineShape(n_layer=4, n_head_kv=1, n_expert=8),
    "gpt-oss": FineShape(n_embd=96, n_ff=160, n_head_kv=1, n_embd_head=64, n_expert=8, n_expert_used=4),
}
"""Heads of 64 and 128, latent attention, recurrent layers, two sizes of heads in one model, and sinks."""
Written = Callable[[str], Path]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """The file of an architecture, which is written once."""
    folder = tmp_path_factory.mktemp("kv")
    return functools.cache(lambda name: write_family(folder / f"{name}.gguf", name, shape=SHAPES[name]))


def config(path: Path, kv_type: str, **changed: Any) -> Any:
    return engine_config(path, **{"n_ctx": 256, "n_threads": 1, "weights": "copied", "kv_type": kv_type} | changed)


def told(engine: Engine, parts: Sequence[Sequence[int]] = PARTS) -> Array:
    with closing(engine):
        return np.concatenate([engine.read(part, len(part)).copy() for part in parts])


def llama_cpps(path: Path, kind: Type) -> Array:
    with closing(LlamaCpp(LlamaCppConfig(path, 256, 1, extra_buffers=False, kv_type=kind))) as baseline:
        return np.concatenate([baseline.score(part) for part in PARTS])


@pytest.mark.parametrize("kind", [Type.Q8_0, Type.Q4_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", SHAPES)
def test_quantised_caches_are_llama_cpps_to_the_last_bit(written: Written, name: str, kind: Type) -> None:
    expected = llama_cpps(written(name), kind)
    found = told(Engine.open(config(written(name), kind.name.lower())))
    np.testing.assert_array_equal(found, expected)
    assert np.abs(found - told(Engine.open(config(written(name), "f16")))).max() > 0.01, "a cache that rounds nothing"


@pytest.mark.parametrize("name", ["qwen3moe", "gpt-oss"])
def test_tiers_change_no_bit(written: Written, name: str) -> None:
    expected = told(resident_engine(config(written(name), "q4_0")))
    np.testing.assert_array_equal(told(tiered_engine(config(written(name), "q4_0"), 0.5)), expected)


@pytest.mark.parametrize("on_device", [0.5, 2.0], ids=["cut", "whole"])
def test_on_devices_that_share_the_layers(written: Written, two_devices: Devices, on_device: float) -> None:
    options: dict[str, Any] = {"n_ctx": 300, "n_batch": 48, "n_parallel": 2, "weights": "auto"}
    with closing(resident_engine(config(written("gemma4"), "q4_0", **options))) as engine:
        expected = conversation(engine)
    on_devices = config(written("gemma4"), "q4_0", **options, **two_devices.settings)
    with closing(device_engine(on_devices, on_device)) as engine:
        two_devices.check(conversation(engine), expected, written("gemma4"), Type.Q4_0)


def test_heads_of_32_round_less_than_llama_cpps(tmp_path: Path) -> None:
    """Which leaves them unrotated: keys and values in which some channels are much larger than the others."""
    shape = FineShape(n_layer=1, n_head=8, n_embd_head=32, n_expert=8)
    content = read_content(write_family(tmp_path / "plain.gguf", "qwen2moe", shape=shape))
    large = np.where(np.arange(32) % 16 == 3, 16, 1).astype(np.float32)
    scaled: dict[str, Array | None] = {}
    for layer in range(shape.n_layer):
        for part, factors, n in (("q", 1 / large, shape.n_head), ("k", large, 2), ("v", large, 2)):
            weight, bias = (f"blk.{layer}.attn_{part}.{end}" for end in ("weight", "bias"))
            scaled[weight] = content.values(weight) * np.tile(factors, n)[:, None]
            scaled[bias] = content.values(bias) * np.tile(factors, n)
        output = f"blk.{layer}.attn_output.weight"
        scaled[output] = content.values(output) / np.tile(large, shape.n_head)
    path = write_content(tmp_path / "m.gguf", content.with_values(scaled))
    exact = told(Engine.open(config(path, "f32")))
    for kind in (Type.Q8_0, Type.Q4_0):
        found = told(Engine.open(config(path, kind.name.lower())))
        theirs = llama_cpps(path, kind)
        assert np.square(found - exact).mean() < np.square(theirs - exact).mean() / 2


def test_a_hadamard_matrix_is_its_own_inverse() -> None:
    for n in (32, 128):
        np.testing.assert_allclose(hadamard(n) @ hadamard(n), np.eye(n), atol=1e-6)
    assert set(np.abs(hadamard(64)).ravel()) == {0.125}


@pytest.mark.parametrize(
    ("n_embd_head", "expected"),
    [(32, (32, 32)), (64, (64, 64)), (96, (32, 32)), (128, (128, 64)), (192, (64, 64)), (512, (512, 64))],
)
def test_pieces_that_are_rotated_divide_the_heads(n_embd_head: int, expected: tuple[int, int]) -> None:
    attention = AttentionSpec(4, 2, n_embd_head)
    assert hadamard_lengths(attention, Type.Q4_0) == hadamard_lengths(attention, Type.Q8_0) == expected
    assert hadamard_lengths(attention, Type.F16) == (0, 0)


def test_the_plan_counts_the_type(written: Written) -> None:
    """Keys and values of 3 layers, 2 heads of 128 values, in blocks of 32 values, and the matrices that rotate them."""
    blocks = 256 * 3 * 2 * 2 * 128 // 32
    sizes = {"f16": 64 * blocks, "q8_0": 34 * blocks + 4 * (128**2 + 64**2), "q4_0": 18 * blocks + 4 * (128**2 + 64**2)}
    for kind, n_bytes in sizes.items():
        plan = plan_engine(config(written("qwen3moe"), kind))
        assert plan.host_bytes["kv"] == n_bytes
        with closing(Engine.open(config(written("qwen3moe"), kind))) as engine:
            assert engine.memory()["kv"] == n_bytes


def test_heads_that_are_no_whole_blocks_are_refused_in_one_line(tmp_path: Path) -> None:
    path = write_family(tmp_path / "m.gguf", "qwen2moe", shape=FineShape(n_embd_head=80, n_expert=8))
    for kind in ("q8_0", "q4_0"):
        with pytest.raises(UsageError, match=rf"^Heads of 80 do not divide into {kind.upper()} blocks. Use --kv-type"):
            plan_engine(config(path, kind))


def test_slots_of_a_cache_of_another_type_are_refused(written: Written, tmp_path: Path) -> None:
    with closing(Engine.open(config(written("olmoe"), "q4_0"))) as engine:
        engine.submit(GenerationRequest(tuple(TOKENS), 2, SamplingParams(temperature=0.0)))
        while not engine.is_idle:
            engine.step()
        engine.slots.save(0, tmp_path / "slot")
        assert engine.slots.restore(0, tmp_path / "slot").n_tokens
    with (
        closing(Engine.open(config(written("olmoe"), "q8_0"))) as engine,
        pytest.raises(UsageError, match=r"another form .Q4_0 rotated, 6 tensors., but this one is Q8_0 rotated"),
    ):
        engine.slots.restore(0, tmp_path / "slot")
