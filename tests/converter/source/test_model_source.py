"""A source says what a model holds, whatever its files look like; transformers and gguf's decoder are the judges."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file

from slimoe.converter.forward.stream import Sequences, final_logits, run
from slimoe.converter.source.model_source import MatrixKey, ModelSource, SourceLayer, block_key, expert_key
from slimoe.converter.source.open_source import open_source
from slimoe.offload.errors import ModelFileError, UnsupportedModelError
from tests.models.gguf_content import (
    Array,
    GGUFContent,
    StoredTensor,
    quantise,
    read_content,
    write_content,
    write_shards,
)
from tests.models.native_files import NativeFfn, StoredExpert, native_logits, plain_ffn, write_native
from tests.models.tiny_checkpoint import TinyConfig, logits, save_checkpoint, stack_experts

TOKENS = (1, 300, 301, 302, 17, 305, 306, 307, 400, 401)
WEIGHTS = "model.safetensors"
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def streamed(source: ModelSource) -> Array:
    """The logits that the source's matrices make."""
    with torch.no_grad():
        return np.asarray(final_logits(source, run(source, Sequences((TOKENS,)))))


def assert_same_logits(ours: Array, expected: Array) -> None:
    assert expected.std() > 0.1, "logits that are all alike show nothing"
    np.testing.assert_allclose(ours, expected, atol=2e-4 * expected.std())


@pytest.fixture(scope="module")
def content(moe_gguf: Path) -> GGUFContent:
    return read_content(moe_gguf)


# --- checkpoints -------------------------------------------------------------------------------------------


def stacked(path: Path, moe: Path, _tokenizer: Path) -> Path:
    source = shutil.copytree(moe, path)
    stack_experts(source)
    return source


def half_precision(path: Path, _moe: Path, tokenizer: Path) -> Path:
    return save_checkpoint(path, tokenizer, TinyConfig(n_layer=1, n_expert=3, n_expert_used=2), torch.float16)


def dense(path: Path, _moe: Path, tokenizer: Path) -> Path:
    return save_checkpoint(path, tokenizer, TinyConfig(n_expert=0), torch.bfloat16)


def tied(path: Path, _moe: Path, tokenizer: Path) -> Path:
    return save_checkpoint(path, tokenizer, TinyConfig(n_layer=1), tie_word_embeddings=True)


def llama3_with_biases(path: Path, _moe: Path, tokenizer: Path) -> Path:
    settings = {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3}
    source = save_checkpoint(path, tokenizer, TinyConfig(n_layer=1, n_expert=0), **settings)
    tensors = load_file(source / WEIGHTS)
    for name in (name for name in tensors if name.endswith(".bias")):
        tensors[name] = torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(len(name)))
    save_file(tensors, source / WEIGHTS)
    return source


@pytest.mark.parametrize("make", [stacked, half_precision, dense, tied, llama3_with_biases])
def test_a_checkpoints_matrices_compute_what_transformers_does(
    tmp_path: Path, moe_checkpoint: Path, sentencepiece_path: Path, make: Any
) -> None:
    path = make(tmp_path / "c", moe_checkpoint, sentencepiece_path)
    assert_same_logits(streamed(open_source(path)), logits(path, list(TOKENS)).numpy())


def test_experts_stored_one_by_one_or_stacked_are_the_same_matrices(tmp_path: Path, moe_checkpoint: Path) -> None:
    ours, theirs = open_source(moe_checkpoint), open_source(stacked(tmp_path / "c", moe_checkpoint, tmp_path))
    assert list(ours.shapes.items()) == list(theirs.shapes.items())
    for key in ours.shapes:
        np.testing.assert_array_equal(ours.read(key), theirs.read(key))
    assert ours.source_hash != theirs.source_hash


def test_what_a_checkpoint_says_of_itself(moe_checkpoint: Path) -> None:
    source = open_source(moe_checkpoint)
    assert source.path == moe_checkpoint
    assert (source.spec.n_expert, source.spec.n_ff, source.spec.architecture.name) == (6, 96, "llama")
    assert tuple(source.layers) == (SourceLayer(6, tuple(range(6))),) * 2
    assert source.shapes[expert_key(1, "down", 5)] == (64, 96)
    assert source.shapes[block_key(1, "attn_norm")] == (64,)
    assert source.blocks(expert_key(0, "up", 0)) is None
    assert source.metadata["general.name"] == "tiny-moe"
    assert len(source.metadata["tokenizer.ggml.tokens"]) == 520
    assert not [key for key in source.metadata if key.startswith("llama.")]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path: Path, moe_checkpoint: Path, bad: float) -> None:
    path = shutil.copytree(moe_checkpoint, tmp_path / "c")
    tensors = load_file(path / WEIGHTS)
    tensors["model.layers.1.block_sparse_moe.experts.4.w3.weight"][95, 63] = bad
    save_file(tensors, path / WEIGHTS)
    source = open_source(path)
    assert np.isfinite(source.read(expert_key(1, "up", 3))).all()
    with pytest.raises(ModelFileError, match=r"experts\.4\.w3\.weight holds NaN or infinity"):
        source.read(expert_key(1, "up", 4))


# --- digests -----------------------------------------------------------------------------------------------


def test_a_fine_tuned_model_of_the_same_sizes_is_another_source(tmp_path: Path, moe_checkpoint: Path) -> None:
    original = open_source(moe_checkpoint).source_hash
    path = shutil.copytree(moe_checkpoint, tmp_path / "c")
    assert open_source(path).source_hash == original
    tensors = load_file(path / WEIGHTS)
    tensors["model.layers.1.self_attn.v_proj.weight"] *= 1.001
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    assert open_source(path).source_hash != original


def test_files_of_other_weights_or_names_are_other_sources(tmp_path: Path, content: GGUFContent) -> None:
    other = content.with_values({"output_norm.weight": content.values("output_norm.weight") * 2})
    versions = [content, other, content.with_keys({"general.name": "b"})]
    paths = [write_content(tmp_path / f"{n}.gguf", version) for n, version in enumerate(versions)]
    digests = [open_source(path).source_hash for path in paths]
    assert len(set(digests)) == 3
    assert open_source(paths[0].rename(tmp_path / "renamed.gguf")).source_hash == digests[0]


# --- stock files -------------------------------------------------------------------------------------------


def assert_same_model(ours: ModelSource, theirs: ModelSource) -> None:
    assert list(ours.shapes.items()) == list(theirs.shapes.items())
    assert ours.layers == theirs.layers
    for key in ours.shapes:
        np.testing.assert_array_equal(ours.read(key), theirs.read(key), err_msg=str(key))


def test_a_file_is_what_it_was_made_of(moe_checkpoint: Path, moe_gguf: Path) -> None:
    ours, theirs = open_source(moe_gguf), open_source(moe_checkpoint)
    assert_same_model(ours, theirs)
    assert ours.metadata == theirs.metadata
    assert replace(ours.spec, rms_eps=0.0) == replace(theirs.spec, rms_eps=0.0)


@pytest.mark.parametrize("name", ["F16", "BF16", "Q8_0", "Q5_1", "Q4_0", "IQ4_NL", "MXFP4"])
def test_matrices_of_any_type_are_what_gguf_decodes(tmp_path: Path, content: GGUFContent, name: str) -> None:
    kind = Type[name]
    quantised = content.quantised(kind)
    source = open_source(write_content(tmp_path / "m.gguf", quantised))
    for key in (expert_key(1, "down", 4), expert_key(0, "gate", 5), block_key(1, "attn_k"), MatrixKey("output.weight")):
        stored = quantised.tensors[key.name].data
        data = stored[key.expert] if key.expert >= 0 else stored
        np.testing.assert_array_equal(source.read(key), gguf.quants.dequantize(data, kind))
        blocks = source.blocks(key)
        assert blocks is not None
        assert (blocks.type, blocks.n_bytes) == (kind, data.nbytes)
        assert blocks.path.read_bytes()[blocks.offset : blocks.offset + blocks.n_bytes] == data.tobytes()


def test_shards_are_one_model(tmp_path: Path, moe_gguf: Path, content: GGUFContent) -> None:
    assert_same_model(open_source(write_shards(tmp_path, content, 3)), open_source(moe_gguf))


def test_fused_queries_keys_and_values_are_told_apart(tmp_path: Path, content: GGUFContent) -> None:
    biased = content.with_values(
        {
            f"blk.1.attn_{name}.bias": np.arange(size, dtype=np.float32)
            for name, size in {"q": 64, "k": 32, "v": 32}.items()
        }
    )
    tensors = dict(biased.tensors)
    for layer, kind in ((0, "weight"), (1, "weight"), (1, "bias")):
        parts = [tensors.pop(f"blk.{layer}.attn_{name}.{kind}").data for name in "qkv"]
        tensors[f"blk.{layer}.attn_qkv.{kind}"] = StoredTensor(np.concatenate(parts), Type.F32)
    fused = open_source(write_content(tmp_path / "fused.gguf", GGUFContent(content.keys, tensors)))
    assert_same_model(fused, open_source(write_content(tmp_path / "apart.gguf", biased)))


def test_experts_one_by_one_in_old_files(tmp_path: Path, moe_gguf: Path, content: GGUFContent) -> None:
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in content.tensors.items():
        parts = {name.replace("_exps", f".{e}"): StoredTensor(data, tensor.type) for e, data in enumerate(tensor.data)}
        tensors |= parts if "_exps" in name else {name: tensor}
    path = write_content(tmp_path / "m.gguf", GGUFContent(content.keys, tensors))
    assert_same_model(open_source(path), open_source(moe_gguf))


def test_metadata_carries_over_what_is_the_models(tmp_path: Path, content: GGUFContent) -> None:
    keys: dict[str, int | str] = {
        "general.quantized_by": "someone",
        "general.file_type": 7,
        "slimoe.calibration.sha256": "c0ffee",
    }
    metadata = open_source(write_content(tmp_path / "m.gguf", content.with_keys(keys))).metadata
    assert metadata["general.quantized_by"] == "someone"
    assert metadata["slimoe.calibration.sha256"] == "c0ffee"
    assert metadata["tokenizer.ggml.scores"][:3] == content.keys["tokenizer.ggml.scores"].value[:3]
    gone = {"general.architecture", "general.file_type", "general.alignment", "slimoe.recipe", "slimoe.source.sha256"}
    assert gone.isdisjoint(metadata)


# --- native files ------------------------------------------------------------------------------------------

_RNG = np.random.default_rng(5)
F32S = tuple(StoredExpert(e) for e in (4, 1, 3, 0))
ALIASES = NativeFfn(F32S, (1, 3, 0, 2, 0, 1))
CONSTANTS = NativeFfn(F32S[:3], (1, -1, 0, 2, -2, -1), _RNG.standard_normal((2, 64), np.float32))
ONLY_CONSTANTS = NativeFfn((), (-1, -2, -3, -1), _RNG.standard_normal((3, 64), np.float32))
WIDTHS = NativeFfn(tuple(replace(e, width=32 * n) for n, e in enumerate(F32S[:3], 1)), (2, 1, 0))
TWO_TYPES = ((Type.F32, Type.Q8_0), (Type.F16,), (Type.F32,), (Type.F16, Type.Q4_0))
COPIES = NativeFfn(tuple(StoredExpert(e, kinds) for e, kinds in enumerate(TWO_TYPES)), (3, 0, 1, 2, 3))


@pytest.mark.parametrize(
    "layers",
    [[ALIASES, plain_ffn(4)], [CONSTANTS, COPIES], [ONLY_CONSTANTS, WIDTHS], [None, COPIES], [WIDTHS, None]],
    ids=["aliases", "constants", "only-constants", "first-without", "last-without"],
)
def test_native_files_compute_what_they_mean(
    tmp_path: Path, moe_checkpoint: Path, content: GGUFContent, layers: Sequence[NativeFfn | None]
) -> None:
    source = open_source(write_native(tmp_path / "n.gguf", content, layers))
    assert_same_logits(streamed(source), native_logits(moe_checkpoint, content, layers, list(TOKENS)))
    for found, ffn in zip(source.layers, layers, strict=True):
        expected = SourceLayer(len(ffn.experts), ffn.target) if ffn else SourceLayer(has_ffn=False)
        assert found == expected


def test_the_best_copy_counts(tmp_path: Path, content: GGUFContent) -> None:
    source = open_source(write_native(tmp_path / "n.gguf", content, [COPIES, COPIES]))
    stack = content.values("blk.1.ffn_gate_exps.weight")
    for expert, (kind, *_) in enumerate(TWO_TYPES):
        stored = stack[expert] if kind is Type.F32 else quantise(stack[expert], kind).data
        expected = gguf.quants.dequantize(stored, kind)
        np.testing.assert_array_equal(source.read(expert_key(1, "gate", expert)), expected)
        blocks = source.blocks(expert_key(1, "gate", expert))
        assert blocks is not None
        assert blocks.type is kind


# --- what is none ------------------------------------------------------------------------------------------


def test_what_is_no_model_is_refused(tmp_path: Path, moe_checkpoint: Path, content: GGUFContent) -> None:
    (tmp_path / "text.gguf").write_text("no model")
    strange = content.with_values({"blk.0.ffn_gate_shexp.weight": np.zeros((4, 64), np.float32)})
    short = write_content(tmp_path / "short.gguf", content)
    short.write_bytes(short.read_bytes()[:-4000])
    cases = {
        tmp_path / "absent": "no such directory or file",
        tmp_path / "text.gguf": "not a GGUF file",
        moe_checkpoint / WEIGHTS: "a safetensors file, a part of a Hugging Face checkpoint. Convert the directory",
        tmp_path: "no config.json",
        short: "truncated",
        write_content(tmp_path / "strange.gguf", strange): "ffn_gate_shexp.weight has no place",
    }
    for path, message in cases.items():
        with pytest.raises(ModelFileError, match=message):
            open_source(path)


def test_other_quantisations_are_refused_by_name(tmp_path: Path, moe_checkpoint: Path) -> None:
    path = shutil.copytree(moe_checkpoint, tmp_path / "c")
    config = json.loads((path / "config.json").read_text())
    for method in ("gptq", "awq"):
        (path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
        with pytest.raises(UnsupportedModelError, match=f"quantised by {method}; only bitsandbytes and mxfp4 are read"):
            open_source(path)
