"""A random checkpoint of each family with many small experts: the file made of it computes what transformers does."""

import json
import shutil
from contextlib import closing
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
import transformers
from safetensors.torch import load_file, save_file

from slimoe.converter.budget.compress import plan_compression
from slimoe.converter.convert import ConvertOptions, plan
from slimoe.converter.forward.stream import Sequences, final_logits, run
from slimoe.converter.recipe.recipe import Recipe
from slimoe.converter.source.inventory import take_inventory
from slimoe.converter.source.open_source import open_source
from slimoe.converter.source.tokenizer.check import HARD_TEXTS
from slimoe.offload.engine import Engine
from slimoe.offload.errors import ModelFileError, UnsupportedModelError
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.model.spec import ModelSpec
from slimoe.offload.text.tokenizer import Tokenizer
from slimoe.server.cli import run as slimoe
from tests.models.configs import engine_config
from tests.models.gguf_content import Array, read_content, write_content
from tests.models.tiny_checkpoint import FINE, TinyConfig, logits, save_fine, stack_experts

TOKENS = [(37 * n) % 500 for n in range(48)]
SIZES = TinyConfig(n_layer=3, n_embd=256, n_ff=128, n_expert=16, n_expert_used=4)
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.fixture(scope="module", params=FINE)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_fine(tmp_path_factory.mktemp(request.param) / request.param, request.param, SIZES)


def converted(source: Path, target: Path) -> Path:
    assert slimoe(["convert", str(source), str(target), "--type", "F32", "--threads", "1"]) == 0
    return target


def torchs(path: Path) -> Array:
    source = open_source(path)
    found: Array = final_logits(source, run(source, Sequences((tuple(TOKENS),)))).numpy()
    return found


def engines(path: Path) -> Array:
    with closing(Engine.open(engine_config(path, n_ctx=256, n_threads=1, kv_type="f32"))) as engine:
        return engine.read(TOKENS, len(TOKENS)).copy()


def llama_cpps(path: Path) -> Array:
    model = llama_cpp.Llama(str(path), logits_all=True, verbose=False, n_threads=1, n_ctx=64, type_k=0, type_v=0)
    with closing(model):
        model.eval(TOKENS)
        return np.array(model.scores[: len(TOKENS)])


def assert_all_alike(source: Path, target: Path) -> None:
    expected = logits(source, TOKENS).numpy()
    assert expected.std() > 0.5, "logits that are all alike show nothing"
    np.testing.assert_allclose(torchs(source), expected, atol=1e-3)
    path = converted(source, target)
    np.testing.assert_allclose(engines(path), expected, atol=1e-3)
    np.testing.assert_allclose(llama_cpps(path), expected, atol=1e-3)


def test_torch_the_engine_and_llama_cpp_compute_what_transformers_does(checkpoint: Path, tmp_path: Path) -> None:
    assert_all_alike(checkpoint, tmp_path / "m.gguf")
    file = read_gguf(tmp_path / "m.gguf")
    spec = ModelSpec.from_gguf(file)
    assert file.metadata["general.architecture"] == checkpoint.name
    assert (spec.n_expert, spec.n_expert_used, spec.n_ff, spec.n_vocab, spec.n_ctx_train) == (16, 4, 128, 520, 512)
    assert spec.n_embd_head == (128 if checkpoint.name == "qwen3moe" else 64)


def test_stacked_experts_make_the_same_tensors(checkpoint: Path, tmp_path: Path) -> None:
    """The layout that transformers 5 has in memory, in place of the one that it saves."""
    source = shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    stack_experts(source)
    names = load_file(source / "model.safetensors").keys()
    assert "model.layers.1.mlp.experts.gate_up_proj" in names
    assert not any(".experts.0." in name for name in names)
    stacked, separate = open_source(source), open_source(checkpoint)
    assert list(stacked.shapes) == list(separate.shapes)
    for key in separate.shapes:
        np.testing.assert_array_equal(stacked.read(key), separate.read(key))


def test_a_table_that_is_the_output_too(tmp_path: Path) -> None:
    """llama.cpp's olmoe has no such models, so that its file gets the table twice."""
    for name in FINE:
        source = save_fine(tmp_path / name, name, SIZES, tie_word_embeddings=True)
        assert_all_alike(source, tmp_path / f"{name}.gguf")
        assert ("output.weight" in read_gguf(tmp_path / f"{name}.gguf").tensors) == (name == "olmoe")


@pytest.mark.parametrize("name", FINE)
def test_a_scaled_rotation(tmp_path: Path, name: str) -> None:
    assert_all_alike(save_fine(tmp_path / "yarn", name, SIZES, rope_parameters=YARN), tmp_path / "m.gguf")
    source = save_fine(tmp_path / "llama3", name, SIZES, rope_parameters=LLAMA3)
    with pytest.raises(UnsupportedModelError, match=f"scaled in a way that a GGUF file of {name} cannot express"):
        open_source(source)


def test_grouped_keys_of_an_olmoe(tmp_path: Path) -> None:
    """llama.cpp takes as many keys as queries for granted; the engine does not."""
    source = save_fine(tmp_path / "c", "olmoe", SIZES, num_key_value_heads=2)
    expected = logits(source, TOKENS).numpy()
    np.testing.assert_allclose(torchs(source), expected, atol=1e-3)
    np.testing.assert_allclose(engines(converted(source, tmp_path / "m.gguf")), expected, atol=1e-3)
    problem = "llama.cpp loads no OLMoE model with fewer heads of keys than of queries"
    assert any(problem in note for note in plan(ConvertOptions(source, tmp_path / "n.gguf", "F16")).notes)
    with pytest.raises(UnsupportedModelError, match=problem):
        plan_compression(open_source(source), None, Recipe(format="stock"))


def test_text_is_read_as_transformers_reads_it(checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.open(read_gguf(converted(checkpoint, tmp_path / "m.gguf")))
    theirs = transformers.AutoTokenizer.from_pretrained(checkpoint)
    texts = (
        *HARD_TEXTS,
        "e\u0301 <|im_start|>user\nÅ\u0323 a\u030a        four  two<|im_end|>",
        "K \u212b<think>\uac00\u11a8",
    )
    for text in texts:
        assert tokenizer.encode(text, parse_special=True) == theirs.encode(text, add_special_tokens=False), text
        assert tokenizer.longest is not None
        assert len(text.encode()) <= tokenizer.longest * len(tokenizer.encode(text))
    assert tokenizer.encode("e\u0301") == tokenizer.encode("é")
    messages = [{"role": "user", "content": "hello"}]
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    written = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.encode(written, parse_special=True) == ids
    assert tokenizer.eos == theirs.eos_token_id in tokenizer.eog
    assert not tokenizer.add_bos
    tokenizer.close()


def test_an_olmoe_whose_files_name_no_end_has_that_of_its_class(tmp_path: Path) -> None:
    source = save_fine(tmp_path / "c", "olmoe", TinyConfig(n_layer=1, n_vocab=50304))
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps({"chat_template": settings["chat_template"]}))
    config = json.loads((source / "config.json").read_text())
    kept = {name: value for name, value in config.items() if not name.endswith("_token_id")}
    (source / "config.json").write_text(json.dumps(kept))
    (source / "generation_config.json").unlink()
    assert open_source(source).metadata["tokenizer.ggml.eos_token_id"] == 50279
    assert "tokenizer.ggml.bos_token_id" not in open_source(source).metadata


@pytest.mark.parametrize(
    ("tensor", "problem"),
    [
        ("model.layers.1.mlp.shared_expert.gate_proj.weight", "has no place in this architecture"),
        ("model.layers.1.mlp.experts.0.w1.weight", "has no place in this architecture"),
        ("model.layers.1.self_attn.q_proj.bias", "is a bias, but config.json has no biases for self_attn"),
        ("model.layers.1.input_layernorm.bias", "is a bias, but config.json has no biases for input_layernorm"),
    ],
)
def test_tensors_that_the_family_does_not_have_are_refused(
    checkpoint: Path, tmp_path: Path, tensor: str, problem: str
) -> None:
    source = shutil.copytree(checkpoint, tmp_path / "c")
    tensors = load_file(source / "model.safetensors")
    save_file(tensors | {tensor: tensors["model.norm.weight"].clone()}, source / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match=f"tensor {tensor} {problem}"):
        open_source(source)


@pytest.mark.parametrize(
    ("tensor", "problem"),
    [
        ("model.layers.1.mlp.experts.3.up_proj.weight", r"expert 3 of blk\.1\.ffn_up_exps\.weight is missing"),
        ("model.layers.2.self_attn.k_norm.weight", r"tensor blk\.2\.attn_k_norm\.weight is missing"),
        ("lm_head.weight", r"tensor (lm_head|output)\.weight is missing"),
    ],
)
def test_tensors_that_are_missing(checkpoint: Path, tmp_path: Path, tensor: str, problem: str) -> None:
    source = shutil.copytree(checkpoint, tmp_path / "c")
    tensors = load_file(source / "model.safetensors")
    save_file({name: value for name, value in tensors.items() if name != tensor}, source / "model.safetensors")
    with pytest.raises(ModelFileError, match=problem):
        open_source(source)


def test_an_inventory_has_the_sizes_of_experts(checkpoint: Path, tmp_path: Path) -> None:
    found = take_inventory(checkpoint).sizes
    assert (found["n_expert"], found["n_expert_used"], found["n_ff"], found["n_embd"]) == (16, 4, 128, 256)
    content = read_content(converted(checkpoint, tmp_path / "m.gguf"))
    stock = content.with_keys({"qwen3moe.feed_forward_length": 6144}) if checkpoint.name == "qwen3moe" else content
    path = write_content(tmp_path / "stock.gguf", stock)
    assert take_inventory(path).sizes["n_ff"] == ModelSpec.from_gguf(read_gguf(path)).n_ff == 128
