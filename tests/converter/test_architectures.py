"""Each architecture's row means the same to torch, to the converter and to the engine."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from bench.baselines.llama_cpp import LlamaCpp, LlamaCppConfig
from bench.baselines.stepping import random_tokens
from slimoe.converter.budget.compress import plan_removal
from slimoe.converter.convert import ConvertOptions, convert, plan
from slimoe.converter.forward.stream import Sequences, final_logits, run
from slimoe.converter.recipe.recipe import Recipe
from slimoe.converter.source.gguf_source import gguf_source
from slimoe.converter.source.inventory import take_inventory
from slimoe.converter.write.writer import write_planned
from slimoe.offload.engine import Engine
from slimoe.offload.errors import UnsupportedModelError
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.model.architectures import ARCHITECTURES, LLAMA
from slimoe.offload.model.spec import ModelSpec
from tests.models.configs import engine_config
from tests.models.gguf_content import Array, file_tensors, read_content, with_prediction_block, write_content
from tests.models.tiny_gguf import FAMILIES, FineShape, write_family

TOKENS = random_tokens(40, 300)
SHAPE = FineShape(n_expert=16)
RECURRENT = [name for name, family in FAMILIES.items() if family.recurrent]
CONVERTED = [name for name, family in FAMILIES.items() if family.latent is None and name not in RECURRENT]
LATENT = ["deepseek2", "deepseek2-old", "mistral4"]


DEEPER = FineShape(n_layer=4, n_embd_head=64, n_expert=8, n_expert_used=2)
STOCK_SHAPES = {
    "gemma4": FineShape(n_layer=4, n_head_kv=1, n_expert=8, n_expert_used=2),
    "gpt-oss": FineShape(n_layer=4, n_embd=96, n_ff=160, n_head_kv=1, n_embd_head=64, n_expert=8, n_expert_used=2),
    "nemotron_h_moe": FineShape(n_layer=5, n_embd_head=64, n_expert=8, n_expert_used=2),
}


def logits(path: Path, kv_type: str = "f32") -> Array:
    with closing(Engine.open(engine_config(path, n_ctx=64, n_threads=1, kv_type=kv_type, weights="copied"))) as engine:
        return engine.read(TOKENS, len(TOKENS)).copy()


@pytest.mark.usefixtures("gelu_of_ggml")
@pytest.mark.parametrize("name", [*CONVERTED, *LATENT, *RECURRENT])
def test_torch_computes_what_the_engine_does(tmp_path: Path, name: str) -> None:
    path = write_family(tmp_path / "m.gguf", name, shape=SHAPE)
    source = gguf_source(path)
    ours = final_logits(source, run(source, Sequences((tuple(TOKENS),)))).numpy()
    np.testing.assert_allclose(ours, logits(path), atol=1e-3)


@pytest.mark.parametrize("name", [*CONVERTED, *LATENT, *RECURRENT])
def test_a_converted_file_is_of_the_same_architecture(tmp_path: Path, name: str) -> None:
    path = write_family(tmp_path / "m.gguf", name, shape=FineShape(n_head_kv=4, n_embd_head=64, n_expert=16))
    result = convert(ConvertOptions(path, tmp_path / "q8.gguf", "Q8_0", n_threads=1)).path
    assert read_gguf(result).metadata["general.architecture"] == (FAMILIES[name].arch or name)
    with closing(Engine.open(engine_config(result, n_ctx=256, n_threads=1, weights="copied"))) as engine:
        np.testing.assert_array_equal(engine.read(TOKENS, len(TOKENS)), llama_cpps(result))
    direct = write_family(tmp_path / "d.gguf", name, Type.Q8_0, FineShape(n_head_kv=4, n_embd_head=64, n_expert=16))
    np.testing.assert_array_equal(logits(result), logits(direct))


def llama_cpps(path: Path) -> Array:
    with closing(LlamaCpp(LlamaCppConfig(path, 256, 1, extra_buffers=False))) as baseline:
        return baseline.score(TOKENS)


LEFT = [("gemma4", (0, 1, 3)), ("gpt-oss", (0, 1, 3)), ("gpt-oss", (1, 2)), ("qwen3next", (1, 2)), ("lfm2moe", (0, 3))]
LEFT += [("qwen35moe", (1, 3)), ("granitehybrid", (0, 1)), ("nemotron_h_moe", (0, 2, 4))]


@pytest.mark.parametrize(("name", "blocks"), LEFT)
def test_stock_files_say_of_each_layer_left_what_it_was(tmp_path: Path, name: str, blocks: tuple[int, ...]) -> None:
    """Windows, numbers of heads and recurrences are listed, in whatever order they are after blocks were left out."""
    source = gguf_source(write_family(tmp_path / "m.gguf", name, shape=STOCK_SHAPES.get(name, DEEPER)))
    whole = plan_removal(source, None, Recipe(format="stock"))
    write_planned(source, replace(whole, layers=tuple(whole.layers[n] for n in blocks)), tmp_path / "fewer.gguf")
    left = read_gguf(tmp_path / "fewer.gguf")
    assert ModelSpec.from_gguf(left).windowed == tuple(source.spec.windowed[n] for n in blocks if source.spec.windowed)
    np.testing.assert_array_equal(logits(tmp_path / "fewer.gguf", "f16"), llama_cpps(tmp_path / "fewer.gguf"))


@pytest.mark.parametrize(
    ("name", "blocks", "problem"),
    [
        ("gemma4", (0, 2), "all layers with a sliding window would be left out, or all without one"),
        ("gpt-oss", (1, 3), "all layers with a sliding window would be left out, or all without one"),
        ("qwen3next", (1, 3), "no layer would keep its recurrence"),
    ],
)
def test_stock_files_that_llama_cpp_would_not_run_are_not_written(
    tmp_path: Path, name: str, blocks: tuple[int, ...], problem: str
) -> None:
    source = gguf_source(write_family(tmp_path / "m.gguf", name, shape=STOCK_SHAPES.get(name, DEEPER)))
    whole = plan_removal(source, None, Recipe(format="stock"))
    with pytest.raises(UnsupportedModelError, match=problem):
        write_planned(source, replace(whole, layers=tuple(whole.layers[n] for n in blocks)), tmp_path / "fewer.gguf")


@pytest.mark.parametrize("kind", [Type.Q8_0, Type.Q4_K])
def test_the_joint_matrix_of_older_files_becomes_two_of_the_same_rows(tmp_path: Path, kind: Type) -> None:
    path = write_family(tmp_path / "m.gguf", "qwen3next-old", kind, SHAPE)
    planned = plan(ConvertOptions(path, tmp_path / "new.gguf", kind.name, n_threads=1))
    types = {one.name: one.type for one in planned.layout.tensors}
    assert types["blk.0.attn_qkv.weight"] is types["blk.0.attn_gate.weight"] is kind
    result = convert(ConvertOptions(path, tmp_path / "new.gguf", kind.name, n_threads=1)).path
    assert "blk.0.ssm_in.weight" not in read_gguf(result).tensors
    stored = file_tensors(path)["blk.0.ssm_in.weight"].data
    heads = stored.reshape(2, 384, -1)
    found = {name: file_tensors(result)[f"blk.0.attn_{name}.weight"].data for name in ("qkv", "gate")}
    parts = [heads[:, begin:end].reshape(-1, heads.shape[-1]) for begin, end in ((0, 64), (64, 128), (128, 256))]
    np.testing.assert_array_equal(found["qkv"], np.concatenate(parts))
    np.testing.assert_array_equal(found["gate"], heads[:, 256:].reshape(256, -1))
    if kind is Type.Q8_0:  # Of Q4_K the output gets more bits.
        np.testing.assert_array_equal(llama_cpps(result), llama_cpps(path))


@pytest.mark.parametrize("name", ["glm4moe", "qwen3next"])
def test_what_predicts_further_tokens_is_left_out_and_said(tmp_path: Path, name: str) -> None:
    content = read_content(write_family(tmp_path / "whole.gguf", name, shape=SHAPE))
    path = write_content(tmp_path / "m.gguf", with_prediction_block(content, SHAPE.n_layer))
    planned = plan(ConvertOptions(path, tmp_path / "q8.gguf", "Q8_0", n_threads=1))
    assert "What predicts further tokens (MTP, 1 of the blocks) is left out: --mtp keeps it." in planned.notes
    without = plan(ConvertOptions(tmp_path / "whole.gguf", tmp_path / "q8.gguf", "Q8_0", n_threads=1))
    assert planned.layout.tensors == without.layout.tensors
    assert planned.layout.spec.metadata() == without.layout.spec.metadata()


def test_experts_whose_rows_no_block_divides_are_halves_and_that_is_said(tmp_path: Path) -> None:
    path = write_family(tmp_path / "m.gguf", "qwen3moe", shape=replace(SHAPE, n_ff=48, n_layer=1))
    planned = plan(ConvertOptions(path, tmp_path / "q.gguf", "Q4_K_M", n_threads=1))
    assert any("ffn_down_exps.weight, have rows of 48" in note and "F16 in its place" in note for note in planned.notes)
    assert {one.name: one.type for one in planned.layout.tensors}["blk.0.ffn_down_exps.weight"] is Type.F16


@pytest.mark.parametrize("name", ["glm4moe", "bailingmoe2", "gemma4", *RECURRENT])
def test_two_copies_of_experts_beside_dense_layers_and_shared_experts(tmp_path: Path, name: str) -> None:
    path = write_family(tmp_path / "m.gguf", name, shape=SHAPE)
    whole = convert(ConvertOptions(path, tmp_path / "q8.gguf", "Q8_0", n_threads=1)).path
    twice = convert(ConvertOptions(path, tmp_path / "two.gguf", n_threads=1, pair="Q8_0,Q4_0")).path
    assert read_gguf(twice).metadata["slimoe.base_architecture"] == (FAMILIES[name].arch or name)
    np.testing.assert_array_equal(logits(twice), logits(whole))


@pytest.mark.parametrize("name", [name for name in RECURRENT if not FAMILIES[name].arch])
def test_what_recurrent_layers_forget_and_take_in_keeps_more_bits(tmp_path: Path, name: str) -> None:
    """Their convolutions' taps stay as they are, and their matrices have more bits than experts."""
    path = write_family(tmp_path / "m.gguf", name, shape=SHAPE)
    result = convert(ConvertOptions(path, tmp_path / "q.gguf", "Q4_K_M", n_threads=1)).path
    stored, found = file_tensors(path), file_tensors(result)
    assert stored.keys() == found.keys()
    wanted = {"ssm_conv1d": Type.F32, "shortconv.conv": Type.F32, "shortconv.in_proj": Type.Q6_K, "ssm_out": Type.Q6_K}
    wanted |= {"attn_qkv": Type.Q6_K, "ssm_in": Type.Q6_K, "ffn_up_exps": Type.Q4_K}
    wanted |= dict.fromkeys(("ssm_a", "ssm_d", "ssm_norm"), Type.F32)
    wanted |= dict.fromkeys(("ssm_alpha", "ssm_beta", "ssm_ba", "attn_k"), Type.Q8_0)
    roles = {tensor: tensor.removesuffix(".weight").split(".", 2)[-1] for tensor in found}
    assert {found[tensor].tensor_type is wanted[role] for tensor, role in roles.items() if role in wanted} == {True}
    assert {"ssm_conv1d", "shortconv.conv"} & set(roles.values())
    for tensor in found:
        if found[tensor].tensor_type is Type.F32:
            np.testing.assert_array_equal(found[tensor].data, stored[tensor].data)

    inventory = take_inventory(result)
    assert "other" not in {one.kind for one in inventory.counts}
    assert inventory.routing["recurrent_layers"] == len(set(range(SHAPE.n_layer)) & set(FAMILIES[name].recurrent))


def test_queries_keys_and_values_are_one_tensor_where_llama_cpp_reads_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the type of the part that would have the most bits; llama.cpp reads Llama's in either way."""
    path = write_family(tmp_path / "m.gguf", "llama", shape=SHAPE)
    apart = convert(ConvertOptions(path, tmp_path / "apart.gguf", "Q4_K_M", n_threads=1)).path
    monkeypatch.setitem(ARCHITECTURES, "llama", replace(LLAMA, joins_qkv=True))
    planned = plan(ConvertOptions(path, tmp_path / "joined.gguf", "Q4_K_M", n_threads=1))
    assert planned.notes == ()
    joined = convert(ConvertOptions(path, tmp_path / "joined.gguf", "Q4_K_M", n_threads=1)).path
    before, after = file_tensors(apart), file_tensors(joined)
    assert before.keys() - after.keys() == {f"blk.{n}.attn_{part}.weight" for n in range(3) for part in "qkv"}
    assert {before[f"blk.0.attn_{part}.weight"].tensor_type for part in "qkv"} == {Type.Q4_K, Type.Q8_0}
    assert after["blk.0.attn_qkv.weight"].tensor_type is Type.Q8_0
    v = before["blk.0.attn_v.weight"].data
    np.testing.assert_array_equal(after["blk.0.attn_qkv.weight"].data[-len(v) :], v)
    with closing(LlamaCpp(LlamaCppConfig(joined, 256, 1, extra_buffers=False))) as baseline:
        expected = baseline.score(TOKENS)
    with closing(Engine.open(engine_config(joined, n_ctx=256, n_threads=1, weights="copied"))) as engine:
        np.testing.assert_array_equal(engine.read(TOKENS, len(TOKENS)), expected)


def test_experts_that_are_mxfp4_already_stay_as_they_are(tmp_path: Path) -> None:
    path = write_family(tmp_path / "m.gguf", "gpt-oss", Type.MXFP4, SHAPE)
    result = convert(ConvertOptions(path, tmp_path / "again.gguf", "MXFP4_MOE", n_threads=1)).path
    stored, found = file_tensors(path), file_tensors(result)
    names = [name for name in stored if "_exps." in name]
    assert len(names) == 6 * SHAPE.n_layer
    for name in names:
        assert found[name].tensor_type == stored[name].tensor_type
        np.testing.assert_array_equal(found[name].data, stored[name].data)
    assert found["blk.0.attn_q.weight"].tensor_type == Type.Q8_0
