"""Gemma 4's checkpoints: what is made of them computes what transformers does, and what else there is is refused."""

import json
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from slimoe.converter.budget.compress import plan_removal
from slimoe.converter.convert import ConvertOptions, plan
from slimoe.converter.hf.export import lay_out_checkpoint
from slimoe.converter.recipe.recipe import Recipe
from slimoe.converter.source.families.gemma import Gemma4TextConfig
from slimoe.converter.source.inventory import take_inventory
from slimoe.converter.source.open_source import open_source
from slimoe.converter.source.tokenizer.check import HARD_TEXTS
from slimoe.offload.errors import SlimoeError
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.model.spec import ModelSpec
from slimoe.offload.text.tokenizer import Tokenizer
from tests.converter.source.families.test_checkpoints import TOKENS, converted, engines, llama_cpps, torchs
from tests.models.gguf_content import Array
from tests.models.tiny_checkpoint import CHATML, logits
from tests.models.tokenizer_files import gemma

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "sliding_window": 8,
    "hidden_size_per_layer_input": 0,
    "enable_moe_block": True,
    "num_experts": 8,
    "top_k_experts": 3,
    "moe_intermediate_size": 96,
    "final_logit_softcapping": 5.0,
    "vocab_size": 520,
    "max_position_embeddings": 512,
    "initializer_range": 0.25,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}


def save_gemma(path: Path, tokenizer: Path, **config: Any) -> Path:
    """A random Gemma4ForCausalLM with a tokenizer of its kind."""
    torch.manual_seed(1234)
    model = transformers.Gemma4ForCausalLM(transformers.Gemma4TextConfig(**SIZES | config))
    for name, tensor in model.state_dict().items():
        if name.endswith(("norm.weight", "norm_1.weight", "norm_2.weight", "scalar", ".scale", "per_expert_scale")):
            # Where nothing divides the products of queries and keys, norms keep them small.
            high = 0.5 if "q_norm" in name else 1.5
            torch.nn.init.uniform_(tensor, high / 3, high)
    model.save_pretrained(path)
    with_tokenizer(path, tokenizer)
    return path


def with_tokenizer(path: Path, tokenizer: Path) -> None:
    reference = gemma(tokenizer)
    reference.chat_template = CHATML
    reference.save_pretrained(path)


@pytest.fixture(scope="module")
def checkpoint(sentencepiece_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_gemma(tmp_path_factory.mktemp("gemma") / "gemma", sentencepiece_path)


def assert_alike(source: Path, target: Path, expected: Array) -> None:
    """But for GELU, which ggml looks up in a table of F16."""
    assert expected.std() > 0.5, "logits that are all alike show nothing"
    np.testing.assert_allclose(torchs(source), expected, atol=1e-3)
    path = converted(source, target)
    np.testing.assert_allclose(engines(path), expected, atol=1e-2)
    np.testing.assert_allclose(llama_cpps(path), expected, atol=1e-2)


VARIANTS: dict[str, dict[str, Any]] = {
    "as 26B-A4B": {},
    "values of their own everywhere": {"attention_k_eq_v": False},
    "no bound of the logits": {"final_logit_softcapping": None},
    "layers as most have them": {"layer_types": None, "num_hidden_layers": 7},
    "other rotations": {
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 2e4},
        }
    },
}


@pytest.mark.parametrize("case", VARIANTS)
def test_torch_the_engine_and_llama_cpp_compute_what_transformers_does(
    tmp_path: Path, sentencepiece_path: Path, case: str
) -> None:
    source = save_gemma(tmp_path / "c", sentencepiece_path, **VARIANTS[case])
    assert_alike(source, tmp_path / "m.gguf", logits(source, TOKENS).numpy())
    file = read_gguf(tmp_path / "m.gguf")
    spec = ModelSpec.from_gguf(file)
    assert spec.window_attention is not None
    assert (spec.n_embd_head, spec.window_attention.n_embd_head) == (32, 16)
    assert (spec.n_ff, spec.experts.n_ff_shared, spec.n_window) == (96, 160, 8)
    assert "output.weight" not in file.tensors
    last = spec.n_layer - 1
    assert (f"blk.{last}.attn_v.weight" in file.tensors) == (case == "values of their own everywhere")


@pytest.mark.parametrize("n_head_kv", [1, 2])
def test_heads_as_large_in_all_layers(tmp_path: Path, sentencepiece_path: Path, n_head_kv: int) -> None:
    """Then transformers saves nothing of single layers, or only their heads of keys."""
    settings = {"global_head_dim": 16, "num_global_key_value_heads": n_head_kv}
    source = save_gemma(tmp_path / "c", sentencepiece_path, **settings)
    config = json.loads((source / "config.json").read_text())
    assert "head_dim" not in config["per_layer_config"].get("2", {})
    assert_alike(source, tmp_path / "m.gguf", logits(source, TOKENS).numpy())
    of_layers = open_source(source).spec
    older = {name: value for name, value in config.items() if name != "per_layer_config"}
    (source / "config.json").write_text(json.dumps(older | settings))
    assert open_source(source).spec == of_layers


def test_a_file_without_windows_is_none_for_llama_cpp(tmp_path: Path, sentencepiece_path: Path) -> None:
    """It ends with a failed assertion of llama.cpp, so that only the engine is asked."""
    source = save_gemma(tmp_path / "c", sentencepiece_path, layer_types=["full_attention"] * 3)
    expected = logits(source, TOKENS).numpy()
    np.testing.assert_allclose(engines(converted(source, tmp_path / "m.gguf")), expected, atol=1e-2)
    notes = plan(ConvertOptions(source, tmp_path / "n.gguf", "F16")).notes
    assert any("without layers with a sliding window" in note for note in notes)


def test_the_language_model_of_one_that_sees(checkpoint: Path, tmp_path: Path, sentencepiece_path: Path) -> None:
    language = json.loads((checkpoint / "config.json").read_text())
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"num_key_value_heads": 2, "head_dim": 16, "position_embedding_size": 16}
    settings = transformers.Gemma4Config(text_config=language, vision_config=vision, audio_config=None)
    whole = transformers.Gemma4ForConditionalGeneration(settings)
    theirs = transformers.Gemma4ForCausalLM.from_pretrained(checkpoint)
    whole.model.language_model.load_state_dict(theirs.model.state_dict())
    whole.save_pretrained(tmp_path / "c")
    with_tokenizer(tmp_path / "c", sentencepiece_path)
    names = load_file(tmp_path / "c" / "model.safetensors").keys()
    assert any(name.startswith("model.vision_tower.") for name in names)
    assert "model.language_model.layers.0.layer_scalar" in names
    assert_alike(tmp_path / "c", tmp_path / "m.gguf", logits(checkpoint, TOKENS).numpy())
    inventory = take_inventory(tmp_path / "c")
    weights = {count.kind: count.n_weights for count in inventory.counts}
    assert inventory.sizes["n_expert"] == 8
    assert weights["router"] == 3 * (8 * 64 + 64 + 8)
    assert weights["image encoder"] > 0
    notes = plan(ConvertOptions(tmp_path / "c", tmp_path / "n.gguf", "Q8_0")).notes
    assert [note for note in notes if "left out" in note] == [
        "What reads images is left out: the language model is what is converted."
    ]


@pytest.mark.parametrize(("every", "kind"), [(1, "llama"), (2, "gemma4")])
def test_text_is_read_as_transformers_reads_it(
    checkpoint: Path, tmp_path: Path, sentencepiece_path: Path, every: int, kind: str
) -> None:
    """Merges that are not sentencepiece's are listed, as Gemma 4's own files have them."""
    source = shutil.copytree(checkpoint, tmp_path / "c")
    gemma(sentencepiece_path, every=every).save_pretrained(source)
    theirs = transformers.AutoTokenizer.from_pretrained(source)
    path = converted(source, tmp_path / "m.gguf")
    assert read_gguf(path).metadata["tokenizer.ggml.model"] == kind
    llama = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    with closing(Tokenizer.open(read_gguf(path))) as tokenizer, closing(llama):
        for text in HARD_TEXTS:
            expected = theirs.encode(text, add_special_tokens=False)
            assert tokenizer.encode(text, parse_special=True) == expected, text
            if "\0" not in text and text:
                assert llama.tokenize(text.encode(), add_bos=False, special=True) == expected, text


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"hidden_size_per_layer_input": 256}, "embeddings of tokens for each layer, as E2B and E4B have, are not"),
        ({"hidden_size_per_layer_input": None}, None),
        ({"num_kv_shared_layers": 1}, "layers that read the keys and values of others, as E2B and E4B have, are not"),
        ({"enable_moe_block": False}, "it has no experts"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention 'all' are not supported"),
        ({"use_bidirectional_attention": "vision"}, None),
        ({"hidden_activation": "relu"}, "the activation 'relu' is not supported, only gelu_pytorch_tanh"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries for 3 layers"),
        ({"per_layer_config": {"0": {"head_dim": 8}}}, "per_layer_config makes layers of the same kind differ"),
        ({"per_layer_config": {"0": {"sliding_window": 4}}}, "per_layer_config has 'sliding_window'; of single layers"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "only rope_type 'proportional'"),
        ({"rope_parameters": {"sliding_attention": {"rope_type": "linear"}}}, "only rope_type 'default' of whole"),
    ],
)
def test_settings_that_no_file_can_say_are_refused(
    checkpoint: Path, tmp_path: Path, settings: dict[str, Any], problem: str | None
) -> None:
    source = shutil.copytree(checkpoint, tmp_path / "c")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | settings))
    if problem is None:
        assert open_source(source).spec == open_source(checkpoint).spec
        return
    with pytest.raises(SlimoeError, match=problem) as error:
        open_source(source)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("model.layers.1.self_attn.v_proj.weight", r"tensor blk\.1\.attn_v\.weight is missing"),
        ("model.layers.0.router.per_expert_scale", r"tensor blk\.0\.ffn_down_exps\.scale is missing"),
        ("model.layers.0.router.scale", r"tensor blk\.0\.ffn_gate_inp\.scale is missing"),
    ],
)
def test_tensors_that_are_missing(checkpoint: Path, tmp_path: Path, name: str, problem: str) -> None:
    source = shutil.copytree(checkpoint, tmp_path / "c")
    tensors = load_file(source / "model.safetensors")
    save_file({one: tensor for one, tensor in tensors.items() if one != name}, source / "model.safetensors")
    with pytest.raises(SlimoeError, match=problem):
        open_source(source)


def test_absent_fields_have_the_defaults_of_the_class() -> None:
    found, expected = Gemma4TextConfig(), transformers.Gemma4TextConfig()
    values = expected.to_dict()
    others = {"rope_parameters", "layer_types", "per_layer_config", "global_head_dim", "num_global_key_value_heads"}
    own = {name for name in found.__struct_fields__ if name in values} - others
    assert len(own) > 20
    assert {name: getattr(found, name) for name in own} == {name: values[name] for name in own}
    kinds = ["sliding_attention" if windowed else "full_attention" for windowed in found.windowed]
    assert kinds == expected.layer_types
    full = expected.per_layer_config[kinds.index("full_attention")]
    assert (found.n_embd_head, found.n_head_kv) == (full.head_dim, full.num_key_value_heads)
    assert found.window_attention.n_embd_head == expected.per_layer_config[0].head_dim
    both = expected.rope_parameters
    assert found.window_base == both["sliding_attention"]["rope_theta"]
    assert found.rope.rope_theta == both["full_attention"]["rope_theta"]
    assert found.rope.partial_rotary_factor == both["full_attention"]["partial_rotary_factor"]


def test_no_checkpoint_is_written_of_it(checkpoint: Path, tmp_path: Path) -> None:
    source = open_source(checkpoint)
    removal = plan_removal(source, None, Recipe())
    with pytest.raises(SlimoeError, match=r"no checkpoint of a Gemma4ForCausalLM is written\. Write a GGUF file"):
        lay_out_checkpoint(source, removal)


def test_values_that_transformers_would_not_read_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    source = shutil.copytree(checkpoint, tmp_path / "c")
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.2.self_attn.{}_proj.weight"
    save_file(tensors | {name.format("v"): tensors[name.format("k")].clone()}, source / "model.safetensors")
    with pytest.raises(SlimoeError, match=r"v_proj\.weight has no place in this architecture"):
        open_source(source)
