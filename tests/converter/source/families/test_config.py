"""config.json is read as transformers' own configuration classes read it, or refused with the field's name."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import transformers

from slimoe.converter.convert import ConvertOptions, convert
from slimoe.converter.source.checkpoint import Checkpoint
from slimoe.converter.source.checkpoint_source import FAMILIES, read_model_config
from slimoe.converter.source.families.config import ModelConfig
from slimoe.offload.errors import ModelFileError, UnsupportedModelError
from slimoe.offload.model.architectures import ARCHITECTURES
from tests.converter.source.families.tiny_families import config_class
from tests.converter.source.test_rotation import TOKENS
from tests.models.tiny_checkpoint import TinyConfig, llama_logits, logits, save_checkpoint

NAMES = ["LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM", "Qwen3MoeForCausalLM", "OlmoeForCausalLM"]
FINE = ["Qwen3MoeForCausalLM", "OlmoeForCausalLM"]
RENORMALISED = {"norm_topk_prob": True}
"""What a Qwen3-MoE has to say, since its class means the other."""
FIELDS = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act"]
FIELDS += ["max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"]


def theirs(name: str, settings: dict[str, Any]) -> transformers.PretrainedConfig:
    return getattr(transformers, config_class(name.removesuffix("ForCausalLM")))(**settings)


def ours(name: str, settings: dict[str, Any]) -> ModelConfig:
    content = {"architectures": [name], "model_type": FAMILIES[name].model_type} | settings
    return read_model_config(Checkpoint(Path("c"), json.dumps(content).encode(), {}, ""))[1]


SETTINGS: list[dict[str, Any]] = [
    {},
    {"head_dim": None, "hidden_size": 640, "num_attention_heads": 10},
    {"head_dim": 48, "num_attention_heads": 16},
    {"sliding_window": None},
    {"sliding_window": 17},
    {"mlp_bias": True, "rms_norm_eps": 0.5},
    {"num_experts": 5},
    {"num_experts": 5, "num_local_experts": 6, "num_experts_per_tok": 3},
    {"tie_word_embeddings": True, "rope_theta": 33},
    {"use_sliding_window": True, "sliding_window": 17},
    {"moe_intermediate_size": 33, "intermediate_size": 44},
    {"num_local_experts": 9},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_absent_fields_have_the_defaults_of_the_class(name: str, settings: dict[str, Any]) -> None:
    settings = settings | (RENORMALISED if name == "Qwen3MoeForCausalLM" else {})
    expected, found = theirs(name, settings), ours(name, settings)
    for field in FIELDS:
        assert getattr(found, field) == getattr(expected, field), field
    assert found.n_head_kv == expected.num_key_value_heads
    head_dim = getattr(expected, "head_dim", None)
    assert found.n_embd_head == (head_dim or expected.hidden_size // expected.num_attention_heads)
    assert found.rope_theta == expected.rope_parameters["rope_theta"]
    biases = {"self_attn": "attention_bias", "mlp": "mlp_bias"}
    is_llama = name == "LlamaForCausalLM"
    assert found.biased == tuple(m for m, field in biases.items() if is_llama and getattr(expected, field))
    has_window = name not in ("LlamaForCausalLM", "OlmoeForCausalLM")
    assert found.window == (expected.sliding_window if has_window else None)
    is_moe = name in ("MixtralForCausalLM", *FINE)
    experts = (expected.num_local_experts, expected.num_experts_per_tok) if is_moe else (0, 0)
    assert (found.n_expert, found.n_expert_used) == experts
    assert found.n_ff == (expected.moe_intermediate_size if name == FINE[0] else expected.intermediate_size)


def test_biases_of_a_llama() -> None:
    assert ours("LlamaForCausalLM", {"attention_bias": True}).biased == ("self_attn",)


def test_every_field_is_one_of_the_class() -> None:
    aliases = {"rope_scaling", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}
    aliases |= {"num_experts", "num_local_experts", "head_dim"}
    aliases |= {"scoring_func", "score_function"}  # Refused where they contradict the class.
    aliases |= {"mamba_n_groups", "mamba_d_conv", "mamba_conv_bias", "mamba_dt_min"}
    for name in NAMES:
        fields = set(FAMILIES[name].config.__struct_fields__) - aliases
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


INEXPRESSIBLE: list[tuple[str, dict[str, Any], str]] = [
    ("Qwen3MoeForCausalLM", {}, "norm_topk_prob is false, but in qwen3moe files .* are always scaled to a sum of 1"),
    ("OlmoeForCausalLM", RENORMALISED, "norm_topk_prob is true, but in olmoe files .* are never scaled"),
    ("Qwen3MoeForCausalLM", RENORMALISED | {"attention_bias": True}, "attention_bias is true, but qwen3moe files"),
    ("OlmoeForCausalLM", {"attention_bias": True}, "attention_bias is true, but olmoe files"),
    ("Qwen3MoeForCausalLM", RENORMALISED | {"decoder_sparse_step": 2}, "decoder_sparse_step is 2, so that some layers"),
    ("Qwen3MoeForCausalLM", RENORMALISED | {"decoder_sparse_step": 0}, "decoder_sparse_step: expected int >= 1"),
    ("Qwen3MoeForCausalLM", RENORMALISED | {"mlp_only_layers": [3, 1]}, r"mlp_only_layers is \[1, 3\]"),
    ("Qwen3MoeForCausalLM", RENORMALISED | {"hidden_act": "gelu"}, "the activation 'gelu' is not supported"),
    ("OlmoeForCausalLM", {"clip_qkv": 8.0}, "clip_qkv is 8; queries, keys and values that are clipped"),
]


@pytest.mark.parametrize(("name", "settings", "message"), INEXPRESSIBLE, ids=str)
def test_what_a_gguf_file_cannot_express_is_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ModelFileError, UnsupportedModelError), match=message):
        ours(name, settings)


def test_layers_without_experts_beyond_the_last_are_none() -> None:
    assert (
        ours("Qwen3MoeForCausalLM", RENORMALISED | {"mlp_only_layers": [24], "num_hidden_layers": 24}).n_expert == 128
    )


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            {"architectures": ["RwkvForCausalLM"], "model_type": "rwkv"},
            r"'RwkvForCausalLM' of model_type 'rwkv' is not supported\. Those that are: LlamaForCausalLM, Mis",
        ),
        (
            {"architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5"},
            "'qwen3_5' is not supported: it is like qwen35moe, but without experts. Those",
        ),
        ({"architectures": ["Qwen3ForCausalLM"]}, r"'Qwen3ForCausalLM' is not supported\. Those that are: .*, Olmoe"),
        ({"model_type": "rwkv"}, "'unknown' of model_type 'rwkv' is not supported"),
        ({"architectures": ["OlmoeForCausalLM"], "model_type": "qwen3_moe"}, "but OlmoeForCausalLM belongs to 'olmoe'"),
    ],
    ids=str,
)
def test_an_unknown_architecture_is_refused_with_those_that_are_known(kind: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        read_model_config(Checkpoint(Path("c"), json.dumps(kind).encode(), {}, ""))


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

    np.testing.assert_allclose(llama_logits(path, TOKENS), expected, atol=2e-3 * expected.std())


def test_the_page_names_every_architecture_and_its_classes() -> None:
    expected = [
        (row.name, row.models, sorted(name for name, family in FAMILIES.items() if family.architecture is row))
        for row in ARCHITECTURES.values()
    ]
    page = (Path(__file__).parents[4] / "docs/converting.md").read_text(encoding="utf-8")
    found = [
        (name, models, sorted(classes.split(", ")) if classes != "none" else [])
        for name, models, classes in re.findall(
            r"^\| `([\w-]+)` \| (.+) \| (none|(?:\w+, )*\w+) \|$", page, re.MULTILINE
        )
    ]
    assert found == expected
