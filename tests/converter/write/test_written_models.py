"""The engine runs whatever the writer writes, under any budget, and llama.cpp what is stock."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from bench.baselines.llama_cpp import LlamaCpp, LlamaCppConfig
from bench.baselines.stepping import random_tokens
from slimoe.converter.forward.head import read_head
from slimoe.converter.forward.stream import Sequences, run
from slimoe.converter.layout.plan import CompressPlan, LayerPlan
from slimoe.converter.source.checkpoint_source import checkpoint_source
from slimoe.converter.source.gguf_source import gguf_source
from slimoe.converter.source.model_source import ModelSource
from slimoe.converter.write.writer import write_planned
from slimoe.offload.engine import Engine
from slimoe.offload.errors import ModelFileError
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.memory.kv_cache import kv_bytes
from slimoe.offload.model.spec import ModelSpec
from slimoe.offload.plan.engine_config import EngineConfig
from slimoe.offload.plan.engine_plan import plan_engine
from tests.models.compress_plans import RandomPlans, same_plan, with_layers
from tests.models.configs import engine_config
from tests.models.conversation import answers, apart, conversation
from tests.models.gguf_content import Array, read_content, write_content
from tests.models.held_model import hold, random_mixtral
from tests.models.native_files import set_array
from tests.models.tiered import device_engine, resident_engine, tiered_engine
from tests.models.tiny_checkpoint import TinyConfig, save_checkpoint
from tests.offload.devices import Devices

TOKENS = random_tokens(24, 500)
FOUR_LAYERS = TinyConfig(n_layer=4, n_embd=128, n_ff=96, n_head=2, n_head_kv=1, n_expert=5, n_expert_used=2)
"""Heads of 64, since GPUs attend with heads of some sizes only."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, sentencepiece_path: Path) -> ModelSource:
    directory = tmp_path_factory.mktemp("engine") / "four"
    return checkpoint_source(save_checkpoint(directory, sentencepiece_path, FOUR_LAYERS, initializer_range=0.06))


def config(path: Path, **changed: Any) -> EngineConfig:
    values: dict[str, Any] = {"n_ctx": 256, "n_batch": 32, "n_threads": 1, "kv_type": "f32"}
    return engine_config(path, **values | changed)


def scores(engine: Engine, n_batch: int = 24) -> Array:
    """Logits of every token, read in batches from the beginning."""
    engine.truncate(0)
    batches = [TOKENS[begin : begin + n_batch] for begin in range(0, len(TOKENS), n_batch)]
    return np.concatenate([engine.read(batch, len(batch)).copy() for batch in batches])


def reference(path: Path) -> Array:
    """The file's logits in torch, from weights that ggml decoded."""
    source = gguf_source(path)
    logits: Array = read_head(source)(run(source, Sequences((tuple(TOKENS),)))).numpy()
    return logits


def without_attention(layer: LayerPlan) -> LayerPlan:
    return replace(layer, has_attention=False)


def without_ffn(layer: LayerPlan) -> LayerPlan:
    return replace(layer, experts=(), rows=(), target=())


# --- native ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_any_native_file_runs_under_any_budget(tmp_path: Path, source: ModelSource, seed: int) -> None:
    path = write_planned(source, RandomPlans(source, seed).draw(), tmp_path / "m.gguf").path
    with closing(resident_engine(config(path))) as engine:
        whole, told = scores(engine), answers(engine)
    with closing(tiered_engine(config(path), 1.0)) as engine:
        in_memory, spoken = scores(engine), conversation(engine)
    with closing(tiered_engine(config(path), 0.0)) as engine:
        assert engine.plan.tiers is not None
        np.testing.assert_array_equal(scores(engine), in_memory)
        np.testing.assert_array_equal(conversation(engine), spoken)
    with closing(tiered_engine(config(path), 0.0)) as engine:
        assert {n: [t for t, _ in row] for n, row in answers(engine).items()} == {
            n: [t for t, _ in row] for n, row in told.items()
        }
    expected = reference(path)
    assert apart(whole, expected) < 1e-4
    assert apart(in_memory, expected) < 1e-4


@pytest.mark.parametrize("seed", range(3))
def test_tokens_one_by_one_are_tokens_in_a_batch(tmp_path: Path, sentencepiece_path: Path, seed: int) -> None:
    """Kernels of single tokens and of batches read the same blocks, of any mix of types."""
    sizes = TinyConfig(n_layer=2, n_embd=256, n_ff=512, n_head=4, n_head_kv=2, n_expert=4, n_expert_used=2)
    directory = save_checkpoint(tmp_path / "c", sentencepiece_path, sizes, initializer_range=0.06)
    types = (Type.Q6_K, Type.Q8_0, Type.Q5_K, Type.Q4_K, Type.Q4_0, Type.Q2_K)
    many = checkpoint_source(directory)
    path = write_planned(many, RandomPlans(many, seed, types, multiple=256).draw(), tmp_path / "m.gguf").path
    expected = reference(path)
    for n_batch in (1, 24):
        with closing(tiered_engine(config(path), 0.0)) as engine:
            assert apart(scores(engine, n_batch), expected) < 5e-3


# --- layers without attention ------------------------------------------------------------------------------

CUTS = {
    "first": {0: without_attention},
    "last": {3: without_attention},
    "only one has it": {0: without_attention, 1: without_attention, 3: without_attention},
    "halves": {1: without_attention, 2: without_ffn, 3: without_attention},
    "neither": {0: lambda layer: without_ffn(without_attention(layer)), 2: without_attention},
    "nothing before the end": {2: lambda layer: without_ffn(without_attention(layer)), 3: without_attention},
    "nothing at the end": {3: lambda layer: without_ffn(without_attention(layer))},
}


def cut_plan(source: ModelSource, which: str, type_name: str = "F32") -> CompressPlan:
    plan = same_plan(source, type_name, "native")
    return with_layers(plan, {n: cut(plan.layers[n]) for n, cut in CUTS[which].items()})


@pytest.mark.parametrize("which", CUTS)
def test_layers_without_attention(tmp_path: Path, source: ModelSource, which: str) -> None:
    path = write_planned(source, cut_plan(source, which), tmp_path / "m.gguf").path
    expected = reference(path)
    with closing(resident_engine(config(path))) as engine:
        whole = scores(engine)
        np.testing.assert_allclose(whole, expected, atol=2e-3 * expected.std())
        np.testing.assert_allclose(scores(engine, 1), expected, atol=2e-3 * expected.std())
        engine.truncate(0)
        spoken = conversation(engine)
    for share in (0.0, 1.0):
        with closing(tiered_engine(config(path), share)) as engine:
            np.testing.assert_array_equal(scores(engine), whole)
    with closing(tiered_engine(config(path), 0.0)) as engine:
        np.testing.assert_array_equal(conversation(engine), spoken)


@pytest.mark.parametrize("which", CUTS)
@pytest.mark.parametrize("on_device", [0.0, 2.0])
def test_layers_without_attention_on_two_devices(
    tmp_path: Path, source: ModelSource, moe_gguf: Path, two_devices: Devices, which: str, on_device: float
) -> None:
    """Each device begins, and the last one ends, with a layer of either kind."""
    path = write_planned(source, cut_plan(source, which), tmp_path / "m.gguf").path
    with closing(resident_engine(config(path, kv_type="f16"))) as engine:
        expected = conversation(engine), engine.read(TOKENS[:9], 7).copy()
    case = config(path, kv_type="f16", **two_devices.settings)
    with closing(device_engine(case, on_device)) as engine:
        assert [device.layers for device in engine.plan.devices] == [(0, 1), (2, 3)]
        two_devices.check(conversation(engine), expected[0], moe_gguf)
        # Most rows of a batch, which overlap with where they are handed out.
        two_devices.check(engine.read(TOKENS[:9], 7), expected[1], moe_gguf)


def test_layers_without_attention_need_no_cache(tmp_path: Path, source: ModelSource) -> None:
    paths = [write_planned(source, same_plan(source, "F32", "native"), tmp_path / "all.gguf").path]
    paths.append(write_planned(source, cut_plan(source, "only one has it"), tmp_path / "one.gguf").path)
    every, one = (plan_engine(config(path)).host_bytes["kv"] for path in paths)
    assert every == 4 * one > 0
    spec = ModelSpec.from_gguf(read_gguf(paths[1]))
    assert spec.attention_layers == (2,)
    assert kv_bytes(spec, 256, Type.F16, (0, 1)) == 0


def test_files_that_say_wrong_things_about_attention(tmp_path: Path, source: ModelSource) -> None:
    path = write_planned(source, cut_plan(source, "first"), tmp_path / "m.gguf").path
    content = read_content(path).with_keys({"general.alignment": None})
    for values, message in (
        ([1, 1, 1, 1], "blk.0.attn_norm.weight is missing"),
        ([0, 0, 1, 1], "blk.1.attn_.* has no place"),
        ([0, 0, 0, 0], "no layer has attention"),
        ([0, 2, 1, 1], "entry 1 of slimoe.attention.present is 2"),
        ([0, 1, 1], "3 entries, but 4 belong"),
    ):
        wrong = write_content(tmp_path / "wrong.gguf", set_array(content, "attention.present", values))
        with pytest.raises(ModelFileError, match=message):
            Engine.open(config(wrong))


# --- stock -------------------------------------------------------------------------------------------------


def test_llama_cpp_runs_stock_files_as_we_do(tmp_path: Path, source: ModelSource) -> None:
    """Blocks dropped, experts fewer and narrower, types by layer and projection, other experts in each layer."""
    plan = same_plan(source, "F16")
    layers = [
        replace(
            plan.layers[block],
            experts=tuple(
                replace(plan.layers[block].experts[e], types=types, kept=np.arange(64) + e) for e in range(3)
            ),
            rows=rows,
            target=(0, 1, 2),
            types=dict.fromkeys(plan.layers[block].types, types[0]),
        )
        for block, rows, types in (
            (3, (0, 2, 4), (Type.Q8_0, Type.F16, Type.Q8_0)),
            (1, (1, 2, 3), (Type.F16, Type.Q4_0, Type.F32)),
        )
    ]
    path = write_planned(source, replace(plan, layers=tuple(layers)), tmp_path / "m.gguf").path
    with closing(LlamaCpp(LlamaCppConfig(path, 256, 1))) as baseline:
        theirs = baseline.score(TOKENS)
    with closing(Engine.open(config(path, kv_type="f16"))) as engine:
        ours = scores(engine)
    assert apart(ours, theirs) < 1e-4
    assert apart(ours, reference(path)) < 1e-3


def test_scaled_shares_stay_scaled(tmp_path: Path) -> None:
    held = hold(random_mixtral(FOUR_LAYERS))
    scaled = replace(held, spec=replace(held.spec, experts=replace(held.spec.experts, weights_scale=1.75)))
    path = write_planned(scaled, same_plan(scaled, "F32"), tmp_path / "m.gguf").path
    assert ModelSpec.from_gguf(read_gguf(path)).expert_weights_scale == 1.75
