"""config.json is read as transformers' own configuration classes read it, or refused with the field's name."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from slimoe.converter.plain.convert import ConvertOptions, convert
from slimoe.converter.source.checkpoint import Checkpoint
from slimoe.converter.source.model_config import CLASSES, ModelConfig, read_model_config
from slimoe.offload.errors import ModelFileError, UnsupportedModelError
from tests.converter.source.test_rotation import TOKENS, llama_logits
from tests.models.tiny_checkpoint import TinyConfig, logits, save_checkpoint

NAMES = ["LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM"]
FIELDS = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act"]
FIELDS += ["max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"]


def theirs(name: str, settings: dict[str, Any]) -> transformers.PretrainedConfig:
    return getattr(transformers, name.replace("ForCausalLM", "Config"))(**settings)


def ours(name: str, settings: dict[str, Any]) -> ModelConfig:
    content = {"architectures": [name], "model_type": CLASSES[name][0]} | settings
    return read_model_config(Checkpoint(Path("c"), json.dumps(content).encode(), {}, ""))


SETTINGS: list[dict[str, Any]] = [
    {},
    {"head_dim": None, "hidden_size": 640, "num_attention_heads": 10},
    {"head_dim": 48, "num_attention_heads": 16},
    {"sliding_window": None},
    {"sliding_window": 17},
    {"attention_bias": True},
    {"mlp_bias": True, "rms_norm_eps": 0.5},
    {"num_experts": 5},
    {"num_experts": 5, "num_local_experts": 6, "num_experts_per_tok": 3},
    {"tie_word_embeddings": True, "rope_theta": 33},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_absent_fields_have_the_defaults_of_the_class(name: str, settings: dict[str, Any]) -> None:
    expected, found = theirs(name, settings), ours(name, settings)
    for field in FIELDS:
        assert getattr(found, field) == getattr(expected, field), field
    assert found.n_head_kv == expected.num_key_value_heads
    assert found.n_embd_head == (expected.head_dim or expected.hidden_size // expected.num_attention_heads)
    assert found.rope_theta == expected.rope_parameters["rope_theta"]
    biases = {"self_attn": "attention_bias", "mlp": "mlp_bias"}
    is_llama = name == "LlamaForCausalLM"
    assert found.biased == tuple(m for m, field in biases.items() if is_llama and getattr(expected, field))
    assert found.window == (None if is_llama else expected.sliding_window)
    is_moe = name == "MixtralForCausalLM"
    experts = (expected.num_local_experts, expected.num_experts_per_tok) if is_moe else (0, 0)
    assert (found.n_expert, found.n_expert_used) == experts


def test_every_field_is_one_of_the_class() -> None:
    aliases = {"rope_scaling", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings", "num_experts"}
    for name in NAMES:
        fields = set(CLASSES[name][1].__struct_fields__) - aliases
        assert fields <= set(theirs(name, {}).to_dict()), name


BAD: list[tuple[dict[str, Any], str]] = [
    ({"rms_norm_eps": []}, "rms_norm_eps: expected float, got array"),
    ({"rms_norm_eps": None}, "rms_norm_eps: expected float, got null"),
    ({"rms_norm_eps": -1e-5}, "rms_norm_eps: expected float > 0"),
    ({"architectures": 1}, "architectures: expected"),
    ({"architectures": [None]}, "architectures.*: expected str, got null"),
    ({"model_type": "mistral"}, "model_type is 'mistral', but MixtralForCausalLM belongs to 'mixtral'"),
    ({"hidden_act": "gelu"}, "the activation 'gelu' is not supported"),
    ({"num_local_experts": True}, "num_local_experts: expected int, got bool"),
    ({"num_local_experts": 10**30}, "num_local_experts: "),
    ({"num_experts_per_tok": 0}, "num_experts_per_tok: expected int >= 1"),
    ({"hidden_size": 64.0}, "hidden_size: expected int, got float"),
    ({"head_dim": 1 << 40}, "head_dim: expected"),
    ({"rope_theta": None}, "rope_theta: expected float, got null"),
    ({"rope_theta": {"a": 1}}, "rope_theta: expected float, got object"),
    ({"rope_scaling": [1]}, "rope_scaling: expected object"),
    ({"rope_parameters": {"rope_type": 3}}, "rope_parameters.rope_type: expected str, got int"),
    ({"rope_parameters": {"rope_type": None}}, "rope_parameters.rope_type: expected str, got null"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": "4"}}, "rope_parameters.factor: expected"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4, "attention_factor": 0}}, "attention_factor: expected"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings: expected bool, got str"),
    ({"sliding_window": -1}, "sliding_window: expected"),
]


@pytest.mark.parametrize(("settings", "message"), BAD, ids=str)
def test_values_of_wrong_types_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ModelFileError, UnsupportedModelError), match=message):
        ours("MixtralForCausalLM", settings)


def test_a_long_value_is_not_quoted_whole() -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        ours("MixtralForCausalLM", {"hidden_act": "x" * 100_000})
    assert len(str(caught.value)) < 1000


DEFAULTS_OF_MIXTRAL = ["rope_theta", "rms_norm_eps", "num_experts_per_tok", "num_local_experts", "num_key_value_heads"]


def test_logits_of_a_checkpoint_that_leaves_defaults_out(tmp_path: Path, sentencepiece_path: Path) -> None:
    sizes = TinyConfig(n_layer=1, n_embd=128, n_head=32, n_head_kv=8, n_expert=8, n_expert_used=2)
    source = save_checkpoint(tmp_path / "c", sentencepiece_path, sizes, rms_norm_eps=1e-5, head_dim=4)
    config = json.loads((source / "config.json").read_text())
    kept = {name: value for name, value in config.items() if name not in (*DEFAULTS_OF_MIXTRAL, "rope_parameters")}
    (source / "config.json").write_text(json.dumps(kept))
    expected = logits(source, TOKENS).numpy()
    path = convert(ConvertOptions(source, tmp_path / "m.gguf", "F32", n_threads=1)).path
    import numpy as np

    np.testing.assert_allclose(llama_logits(path), expected, atol=2e-3 * expected.std())
