"""Biases and scales of experts, and gate and up in one tensor: as llama.cpp reads them, and the same in any tier."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from bench.baselines.llama_cpp import LlamaCpp, LlamaCppConfig
from bench.baselines.stepping import random_tokens
from slimoe.offload.engine import Engine
from slimoe.offload.errors import ModelFileError, SlimoeError
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.model.model_file import ModelFile
from tests.models.configs import engine_config
from tests.models.gguf_content import Array, GGUFContent, StoredTensor, read_content, write_content
from tests.models.native_files import NativeFfn, StoredExpert, plain_ffn, write_native
from tests.models.tiered import device_engine, tiered_engine
from tests.models.tiny_gguf import FineShape, write_family
from tests.offload.devices import Devices

TOKENS = random_tokens(40, 300)
PARTS = [TOKENS[:30], *([token] for token in TOKENS[30:])]
SHAPE = FineShape(n_layer=2, n_expert=16, n_expert_used=4)


def told(engine: Engine, parts: Sequence[Sequence[int]] = PARTS) -> Array:
    with closing(engine):
        return np.concatenate([engine.read(part, len(part)).copy() for part in parts])


def config(path: Path, **settings: Any) -> Any:
    return engine_config(path, **{"n_ctx": 256, "n_threads": 1, "weights": "copied"} | settings)


def llama_cpps(path: Path) -> Array:
    with closing(LlamaCpp(LlamaCppConfig(path, 256, 1, extra_buffers=False))) as baseline:
        return np.concatenate([baseline.score(part) for part in PARTS])


def scaled(content: GGUFContent, projections: Sequence[str]) -> GGUFContent:
    """The same with a factor on each expert's products."""
    draw = np.random.default_rng(3)
    scales = draw.uniform(0.5, 2.0, (SHAPE.n_layer, len(projections), SHAPE.n_expert)).astype(np.float32)
    named = [(layer, part, projection) for layer in range(SHAPE.n_layer) for part, projection in enumerate(projections)]
    return content.with_values({f"blk.{n}.ffn_{name}_exps.scale": scales[n, part] for n, part, name in named})


def merged(content: GGUFContent) -> GGUFContent:
    """The same with gate and up of the experts in one tensor, gate's rows first."""
    changed: dict[str, Array | None] = {}
    for name in content.tensors:
        if name.endswith("ffn_gate_exps.weight"):
            up = name.replace("gate", "up")
            both = np.concatenate([content.values(name), content.values(up)], axis=1)
            changed |= {name: None, up: None, name.replace("gate", "gate_up"): both}
    return content.with_values(changed)


@pytest.mark.parametrize("projections", [("gate", "up", "down"), ("up",)], ids=len)
def test_scales_are_llama_cpps_to_the_last_bit(tmp_path: Path, projections: tuple[str, ...]) -> None:
    plain = write_family(tmp_path / "plain.gguf", "qwen3moe", shape=SHAPE)
    path = write_content(tmp_path / "m.gguf", scaled(read_content(plain), projections))
    expected = llama_cpps(path)
    for weights in ("copied", "mapped", "repacked"):
        np.testing.assert_array_equal(told(Engine.open(config(path, weights=weights))), expected)
    np.testing.assert_array_equal(told(tiered_engine(config(path), 0.3)), expected)
    assert not np.array_equal(told(Engine.open(config(plain))), expected)


@pytest.mark.parametrize("kind", [Type.F32, Type.Q8_0])
def test_merged_gate_and_up_are_llama_cpps_to_the_last_bit(tmp_path: Path, kind: Type) -> None:
    content = merged(read_content(write_family(tmp_path / "plain.gguf", "deepseek2", shape=SHAPE)))
    path = write_content(tmp_path / "m.gguf", content.quantised(kind, lambda name: "_exps" in name))
    expected = llama_cpps(path)
    for weights in ("copied", "mapped"):
        np.testing.assert_array_equal(told(Engine.open(config(path, weights=weights))), expected)
    np.testing.assert_array_equal(told(tiered_engine(config(path), 0.3)), expected)


def test_merged_matrices_and_scales_that_belong_to_both_halves_are_refused(tmp_path: Path) -> None:
    content = merged(read_content(write_family(tmp_path / "plain.gguf", "qwen3moe", shape=SHAPE)))
    ModelFile.of(read_gguf(write_content(tmp_path / "down.gguf", scaled(content, ["down"]))))
    with pytest.raises(SlimoeError, match=r"tensor blk.0.ffn_up_exps.scale has no place in this architecture"):
        ModelFile.of(read_gguf(write_content(tmp_path / "up.gguf", scaled(content, ["up"]))))


@pytest.mark.parametrize(
    ("tensor", "value", "message"),
    [
        ("blk.1.ffn_up_exps.bias", None, "tensor blk.1.ffn_up_exps.bias is missing"),
        ("blk.0.ffn_down_exps.bias", np.ones((16, 96), np.float32), "blk.0.ffn_down_exps.bias has the shape"),
        ("blk.1.ffn_gate_inp.bias", None, "tensor blk.1.ffn_gate_inp.bias is missing"),
        ("blk.1.attn_sinks.weight", None, "tensor blk.1.attn_sinks.weight is missing"),
        (
            "blk.1.ffn_up_exps.scale",
            np.ones(15, np.float32),
            r"blk.1.ffn_up_exps.scale is F32 \(15,\), but F32 \(16,\)",
        ),
    ],
)
def test_vectors_that_are_missing_or_of_other_shapes_are_refused(
    tmp_path: Path, tensor: str, value: Array | None, message: str
) -> None:
    content = read_content(write_family(tmp_path / "whole.gguf", "gpt-oss", shape=SHAPE))
    with pytest.raises(ModelFileError, match=message):
        ModelFile.of(read_gguf(write_content(tmp_path / "m.gguf", content.with_values({tensor: value}))))


def test_biases_of_another_type_are_refused(tmp_path: Path) -> None:
    content = read_content(write_family(tmp_path / "whole.gguf", "gpt-oss", shape=SHAPE))
    name = "blk.0.ffn_up_exps.bias"
    halved = StoredTensor(content.values(name).astype(np.float16), Type.F16)
    path = write_content(tmp_path / "m.gguf", replace(content, tensors=content.tensors | {name: halved}))
    with pytest.raises(ModelFileError, match=r"blk.0.ffn_up_exps.bias is F16 \(256, 16\), but F32 \(256, 16\)"):
        ModelFile.of(read_gguf(path))


def test_native_files_have_the_biases_of_the_experts_that_are_left(tmp_path: Path) -> None:
    """Also of experts that lost neurons, which use the first of each bias."""
    stock_path = write_family(tmp_path / "stock.gguf", "gpt-oss", shape=SHAPE)
    stock = read_content(stock_path)
    path = write_native(tmp_path / "native.gguf", stock, [plain_ffn(SHAPE.n_expert)] * 2)
    assert read_gguf(path).metadata["slimoe.base_architecture"] == "gpt-oss"
    expected = told(Engine.open(config(stock_path)))
    np.testing.assert_array_equal(told(Engine.open(config(path))), expected)
    np.testing.assert_array_equal(told(tiered_engine(config(path), 0.3)), expected)
    kept = range(3, 12)
    rows = tuple(range(len(kept)))
    fewer = NativeFfn(tuple(StoredExpert(e, width=64 if e % 2 else None) for e in kept), rows)
    # The same in a stock file: what is gone of an expert is nothing, and the others are never selected.
    path = write_native(tmp_path / "fewer.gguf", stock, [fewer, plain_ffn(SHAPE.n_expert)])
    gone = {}
    for part in ("gate", "up", "down"):
        name = f"blk.0.ffn_{part}_exps.weight"
        values = stock.values(name).copy()
        for expert in (e for e in kept if e % 2):
            values[expert][(..., slice(64, None)) if part == "down" else slice(64, None)] = 0.0
        gone[name] = values
    bias = np.full(SHAPE.n_expert, -1e30, np.float32)
    bias[list(kept)] = stock.values("blk.0.ffn_gate_inp.bias")[list(kept)]
    whole = write_content(tmp_path / "m.gguf", stock.with_values(gone | {"blk.0.ffn_gate_inp.bias": bias}))
    expected = told(Engine.open(config(whole, kv_type="f32")))
    found = told(tiered_engine(config(path, kv_type="f32"), 0.3))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_array_equal(told(tiered_engine(config(path, kv_type="f32"), 1)), found)


def test_biases_and_scales_on_devices(tmp_path: Path, two_devices: Devices) -> None:
    stock = write_family(tmp_path / "plain.gguf", "gpt-oss", shape=SHAPE)
    content = scaled(read_content(stock), ["gate", "down"])
    path = write_content(tmp_path / "m.gguf", content)
    expected = told(Engine.open(config(path, device="none")))
    for share in (0.5, 2.0):
        found = told(device_engine(config(path, n_batch=32, **two_devices.settings), share, 0.3))
        if two_devices.is_exact:  # but for products in another order
            np.testing.assert_allclose(found, expected, atol=1e-3)
        else:
            two_devices.check(found, expected, stock)
