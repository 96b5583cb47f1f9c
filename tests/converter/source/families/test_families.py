"""A random checkpoint of each class with shared experts, dense layers and the like computes what transformers does."""

import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import UNSET
from safetensors.torch import load_file, save_file

from slimoe.converter.convert import ConvertOptions, plan
from slimoe.converter.source.checkpoint_source import FAMILIES
from slimoe.converter.source.inventory import take_inventory
from slimoe.converter.source.open_source import open_source
from slimoe.offload.engine import Engine
from slimoe.offload.errors import ModelFileError, UnsupportedModelError
from tests.converter.source.families.test_checkpoints import TOKENS, converted, engines, llama_cpps, torchs
from tests.converter.source.families.test_config import FIELDS, ours, theirs
from tests.converter.source.families.tiny_families import SETTINGS, save_family
from tests.models.configs import engine_config
from tests.models.tiny_checkpoint import logits

REQUIRED: dict[str, dict[str, Any]] = {
    "Phimoe": {"attention_bias": True, "lm_head_bias": True},
    "DeepseekV2": {"num_experts_per_tok": 6, "moe_intermediate_size": 1408},
    "Dots1": {"n_routed_experts": 9, "n_shared_experts": 2, "num_experts_per_tok": 3},
    "Lfm2Moe": {"layer_types": ["conv"] * 31 + ["full_attention"]},
    "GraniteMoeHybrid": {"layer_types": ["linear_attention"] * 31 + ["full_attention"]},
    "NemotronH": {"layers_block_type": ["linear_attention", "moe", "full_attention"]},
}
"""The fields for which the class has no default that a model could be made with."""


WITHOUT = {
    "Qwen3_5Moe": ("intermediate_size", "norm_topk_prob"),
    "Lfm2Moe": ("hidden_act",),
    "NemotronH": ("hidden_act",),
}
"""Fields that other classes have."""


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "Phimoe"])
def test_torch_the_engine_and_llama_cpp_compute_what_transformers_does(tmp_path: Path, name: str) -> None:
    source = save_family(tmp_path / name, name)
    expected = logits(source, TOKENS).numpy()
    assert expected.std() > 0.5, "logits that are all alike show nothing"
    np.testing.assert_allclose(torchs(source), expected, atol=1e-3)
    path = converted(source, tmp_path / "m.gguf")
    np.testing.assert_allclose(engines(path), expected, atol=1e-3)
    np.testing.assert_allclose(llama_cpps(path), expected, atol=1e-3)


@pytest.mark.parametrize("name", SETTINGS)
def test_absent_fields_have_the_defaults_of_the_class(name: str) -> None:
    settings = REQUIRED.get(name, {})
    found, expected = ours(f"{name}ForCausalLM", settings), theirs(f"{name}ForCausalLM", settings)
    eps = {"Lfm2Moe": "norm_eps", "NemotronH": "layer_norm_epsilon"}.get(name, "rms_norm_eps")
    fields = {field: eps if field == "rms_norm_eps" else field for field in FIELDS}
    for field, theirs_ in fields.items():
        if theirs_ not in WITHOUT.get(name, ()):
            assert getattr(found, field) == getattr(expected, theirs_), field
    assert found.n_head_kv == expected.num_key_value_heads
    if found.recurrent:
        kinds = ["conv" if name == "Lfm2Moe" else "linear_attention", "full_attention"]
        assert found.recurrent.layers == tuple(kind == kinds[0] for kind in expected.layer_types)
        assert set(expected.layer_types) == {*kinds, *(["moe"] if name == "NemotronH" else [])}
    if latent := found.attention.latent:
        rotation = "yarn" if name == "Mistral4" else UNSET
        assert (found.n_rot, found.rope.rope_type) == (expected.qk_rope_head_dim, rotation)
        assert (latent.n_lora_q, latent.n_lora_kv) == (expected.q_lora_rank, expected.kv_lora_rank)
        assert (latent.n_embd_head_k, latent.n_embd_head_v) == (expected.qk_head_dim, expected.v_head_dim)
    else:
        head_dim = getattr(expected, "head_dim", None)
        assert found.n_embd_head == (head_dim or expected.hidden_size // expected.num_attention_heads)
    if name != "NemotronH":  # Nothing rotates.
        assert found.rope_theta == expected.rope_parameters["rope_theta"]
    if name not in ("Mistral4", "NemotronH"):  # Mistral's class computes it.
        assert found.partial_rotary_factor == expected.rope_parameters.get("partial_rotary_factor")
    n_expert = next(
        getattr(expected, n) for n in ("n_routed_experts", "num_experts", "num_local_experts") if hasattr(expected, n)
    )
    assert (found.n_expert, found.n_expert_used) == (n_expert, expected.num_experts_per_tok)
    width = "moe_intermediate_size" if hasattr(expected, "moe_intermediate_size") else "intermediate_size"
    assert found.n_ff == getattr(expected, width)
    assert found.window == (expected.sliding_window if name == "GptOss" else None)
    own = set(FAMILIES[f"{name}ForCausalLM"].config.__struct_fields__)
    aliases = {"rope_scaling", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings", "head_dim"}
    aliases |= {"rotary_dim", "num_experts", "num_local_experts"}
    aliases |= {"scoring_func", "score_function", "topk_method"}  # Refused where they contradict the class.
    if name == "Qwen2Moe":
        aliases |= {"attention_bias"}  # Refused, and not passed over as by the class.
    if found.attention.latent:  # Not all of these classes read them.
        aliases |= {"num_nextn_predict_layers", "rope_interleave"}
    aliases |= {*WITHOUT.get(name, ()), "full_attention_interval"}  # The class makes layer_types of it.
    if name == "Lfm2Moe":
        aliases |= {"rms_norm_eps", "tie_embedding", "attention_bias"}  # It is norm_eps; an older name; refused.
    if name == "GraniteMoeHybrid":
        aliases |= {"layers_block_type"}  # The class makes layer_types of it.
    if name == "NemotronH":  # Older names, what is passed over, and what is refused.
        aliases |= {"rms_norm_eps", "layer_types", "hybrid_override_pattern", "hidden_act", "rope_parameters"}
        aliases |= {"num_hidden_layers", "first_k_dense_replace"}
        aliases |= {"mamba_n_groups", "mamba_d_conv", "mamba_conv_bias", "mamba_dt_min"}
    if name == "Glm4MoeLite":
        aliases |= {"first_k_dense_replace"}  # In files of before mlp_layer_types, and 1 there.
    assert own - aliases <= set(expected.to_dict())


@pytest.mark.parametrize("n_ctx", [32, 512])
def test_the_engine_computes_what_llama_cpp_does_of_a_phi(tmp_path: Path, n_ctx: int) -> None:
    """transformers computes something else, which convert tells: see the family's file."""
    pairs = {"short_factor": [1.0 + n / 8 for n in range(8)], "long_factor": [1.0 + n for n in range(8)]}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_mscale": 1.25, "long_mscale": 1.25}
    rope |= pairs | {"original_max_position_embeddings": n_ctx}
    source = save_family(tmp_path / "c", "Phimoe", rope_parameters=rope, original_max_position_embeddings=n_ctx)
    path = converted(source, tmp_path / "m.gguf")
    assert any("not as in transformers" in note for note in plan(ConvertOptions(source, path, "F32", force=True)).notes)
    spec = open_source(source).spec.rope
    assert (spec.scaling, spec.n_ctx_orig, spec.attn_multiplier) == ("longrope", n_ctx, 1.25)
    with closing(Engine.open(engine_config(path, n_ctx=64, n_threads=1, kv_type="f32"))) as engine:
        found = engine.read(TOKENS, len(TOKENS)).copy()
    np.testing.assert_allclose(found, llama_cpps(path), atol=1e-3)


@pytest.mark.parametrize("name", ["GraniteMoeShared", "HunYuanMoEV1", "DeepseekV3"])
def test_an_inventory_tells_the_parts_of_a_checkpoint(tmp_path: Path, name: str) -> None:
    source = save_family(tmp_path / "c", name)
    found, spec = take_inventory(source), open_source(source).spec
    assert (found.sizes["n_expert"], found.sizes["n_expert_used"], found.sizes["n_ff"]) == (8, 3, spec.n_ff)
    weights = {count.kind: count.n_weights for count in found.counts}
    n_routed = 1 if name == "DeepseekV3" else 2
    assert weights["experts"] == n_routed * 8 * 3 * 64 * spec.n_ff
    assert weights["shared experts"] == n_routed * 3 * 64 * spec.experts.n_ff_shared
    assert weights["router"] == n_routed * (8 * 64 + 8 * (name == "DeepseekV3"))


def test_queries_of_full_rank_with_latent_attention(tmp_path: Path) -> None:
    """llama.cpp loads such a model only if it has the number of layers of DeepSeek-V2-Lite."""
    source = save_family(tmp_path / "c", "DeepseekV2", q_lora_rank=None)
    path = converted(source, tmp_path / "m.gguf")
    np.testing.assert_allclose(engines(path), logits(source, TOKENS).numpy(), atol=1e-3)


@pytest.mark.parametrize(
    ("name", "settings", "runs_in_llama_cpp"),
    [
        ("GraniteMoeHybrid", {"shared_intermediate_size": 0}, True),
        ("DeepseekV3", {"n_shared_experts": 0}, False),
        ("Glm4Moe", {"n_shared_experts": 0}, False),
    ],
)
def test_shared_experts_without_neurons(
    tmp_path: Path, name: str, settings: dict[str, Any], runs_in_llama_cpp: bool
) -> None:
    """transformers saves matrices of no rows, and of rows of no elements."""
    source = save_family(tmp_path / "c", name, **settings)
    assert any(0 in tensor.shape for tensor in load_file(source / "model.safetensors").values())
    assert "shared experts" not in {count.kind for count in take_inventory(source).counts}
    expected = logits(source, TOKENS).numpy()
    np.testing.assert_allclose(torchs(source), expected, atol=1e-3)
    path = converted(source, tmp_path / "m.gguf")
    np.testing.assert_allclose(engines(path), expected, atol=1e-3)
    notes = plan(ConvertOptions(source, tmp_path / "n.gguf", "F16")).notes
    assert any("without shared experts" in note for note in notes) is not runs_in_llama_cpp
    if runs_in_llama_cpp:
        np.testing.assert_allclose(llama_cpps(path), expected, atol=1e-3)


INEXPRESSIBLE: list[tuple[str, dict[str, Any], str]] = [
    ("Qwen2Moe", {"norm_topk_prob": True}, "norm_topk_prob is true, but in qwen2moe files .* are never scaled"),
    ("Qwen2Moe", {"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size is 0, but layers of qwen2"),
    (
        "Qwen3Next",
        {"shared_expert_intermediate_size": 0},
        "shared_expert_intermediate_size is 0, but layers of qwen3",
    ),
    ("Qwen2Moe", {"mlp_only_layers": [1]}, r"mlp_only_layers is \[1\]"),
    ("GraniteMoe", {"attention_bias": True}, "attention_bias is true; biases of attention are not read for Granite"),
    ("GraniteMoe", {"logits_scaling": 0.0}, "logits_scaling: expected float > 0"),
    ("Dots1", REQUIRED["Dots1"] | {"attention_bias": True}, "attention_bias is true, but dots1 files"),
    (
        "Dots1",
        REQUIRED["Dots1"] | {"n_group": 2},
        "n_group is 2 and topk_group 1: 9 experts in such groups cannot give 3",
    ),
    (
        "Dots1",
        REQUIRED["Dots1"] | {"first_k_dense_replace": 62},
        "first_k_dense_replace is 62, which leaves none of 62",
    ),
    ("Dots1", {}, "n_routed_experts"),
    ("Ernie4_5_Moe", {"use_bias": True}, "use_bias is true"),
    ("Ernie4_5_Moe", {"moe_layer_interval": 2}, "moe_layer_interval is 2, so that dense layers lie among the others"),
    ("Ernie4_5_Moe", {"moe_layer_end_index": 3}, "moe_layer_end_index is 3, so that the layers behind it"),
    ("Ernie4_5_Moe", {"moe_layer_start_index": 28}, "moe_layer_start_index is 28, which leaves none of 28 layers"),
    ("HunYuanMoEV1", {"moe_topk": [8, 4]}, "moe_topk differs between layers"),
    ("HunYuanMoEV1", {"moe_topk": []}, "moe_topk differs between layers"),
    ("HunYuanMoEV1", {"moe_topk": [4, 4]}, "moe_topk has 2 entries for 32 layers"),
    (
        "DeepseekV3",
        {"scoring_func": "sqrtsoftplus"},
        "scoring_func is 'sqrtsoftplus', but the router of this class has 'si",
    ),
    (
        "DeepseekV3",
        {"scoring_func": "softmax"},
        "scoring_func is 'softmax', but the router of this class has 'sigmoid'",
    ),
    ("DeepseekV3", {"topk_method": "foo"}, "topk_method is 'foo', but only 'noaux_tc' is known with 'sigmoid'"),
    (
        "DeepseekV2",
        {"num_experts_per_tok": 6, "scoring_func": "sigmoid"},
        "scoring_func is 'sigmoid', but the router of",
    ),
    (
        "DeepseekV2",
        {"num_experts_per_tok": 6, "topk_method": "x"},
        "topk_method is 'x', but only 'greedy' or 'group_limited",
    ),
    ("MiniMaxM2", {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
    ("Glm4Moe", {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
    ("Dots1", REQUIRED["Dots1"] | {"scoring_func": "other"}, "scoring_func is 'other'"),
    (
        "Qwen3Moe",
        {"norm_topk_prob": True, "scoring_func": "sigmoid"},
        "scoring_func is 'sigmoid', but the router of this class has 'softmax'",
    ),
    ("HunYuanMoEV1", {"attention_bias": True}, "attention_bias is true"),
    ("DeepseekV2", {"num_experts_per_tok": 6, "topk_method": "group_limited_greedy", "n_group": 8}, "topk_method is"),
    ("Phimoe", {"lm_head_bias": True}, "attention_bias or lm_head_bias is false"),
    ("DeepseekV3", {"rope_interleave": False}, "rope_interleave is false"),
    ("DeepseekV3", {"num_key_value_heads": 8}, "num_key_value_heads is 8, and num_attention_heads 128"),
    ("DeepseekV3", {"attention_bias": True}, "attention_bias is true"),
    ("Glm4MoeLite", {"num_hidden_layers": 3, "mlp_layer_types": ["dense", "sparse", "dense"]}, "mlp_layer_types has"),
    ("Mistral4", {"rope_parameters": {"rope_type": "default"}}, "llama_4_scaling_beta or original_max_position_embedd"),
    (
        "Mistral4",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "llama_4_scaling_beta": 0.1,
                "original_max_position_embeddings": 64,
                "mscale_all_dim": 0.7,
            }
        },
        "mscale_all_dim is 0.7, but the magnitude of what rotates in mistral4 files is that of 1",
    ),
    ("GptOss", {"layer_types": ["full_attention"] * 36}, "layer_types has not sliding_attention or full_attention for"),
    ("GptOss", {"swiglu_limit": 5.0}, "swiglu_alpha is 1.702 and swiglu_limit 5"),
    ("GptOss", {"attention_bias": False}, "attention_bias is false, but gpt-oss files"),
    ("GptOss", {"sliding_window": None}, "sliding_window: expected int, got null"),
    ("Glm4Moe", {"n_group": 3, "topk_group": 4}, "n_group is 3 and topk_group 4"),
    ("Qwen3Next", {"layer_types": ["linear_attention"] * 48}, "no layer has full attention"),
    (
        "Qwen3Next",
        {"layer_types": ["full_attention"]},
        "layer_types has not one of linear_attention and full_attention",
    ),
    ("Qwen3Next", {"linear_num_key_heads": 5}, "32 value heads of linear attention do not divide into groups for 5"),
    ("Qwen3Next", {"linear_value_head_dim": 64}, "linear_key_head_dim is 128 and linear_value_head_dim 64"),
    ("Qwen3Next", {"linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim: expected int >= 2"),
    ("Qwen3Next", {"mlp_only_layers": [3]}, r"mlp_only_layers is \[3\] and decoder_sparse_step 1"),
    ("Qwen3Next", {"norm_topk_prob": False}, "norm_topk_prob is false, but in qwen3next files"),
    ("Qwen3_5Moe", {"attention_bias": True}, "attention_bias is true, but qwen35moe files"),
    ("Qwen3_5Moe", {"rope_parameters": {"mrope_section": [4, 24, 4]}}, r"mrope_section is \[4, 24, 4\], whose pairs"),
    ("Qwen3_5Moe", {"rope_parameters": {"mrope_section": [11]}}, "mrope_section: expected array of length >= 3"),
    ("Lfm2Moe", {}, "layer_types has not one of conv and full_attention for each of 32 layers"),
    ("Lfm2Moe", REQUIRED["Lfm2Moe"] | {"conv_bias": True}, "conv_bias is true, but lfm2moe files"),
    ("Lfm2Moe", REQUIRED["Lfm2Moe"] | {"use_expert_bias": False}, "use_expert_bias is false"),
    ("Lfm2Moe", REQUIRED["Lfm2Moe"] | {"routed_scaling_factor": 2.5}, "routed_scaling_factor is 2.5"),
    ("Lfm2Moe", REQUIRED["Lfm2Moe"] | {"num_dense_layers": 32}, "num_dense_layers is 32, which leaves none of 32"),
    ("Lfm2Moe", {"layer_types": ["conv"] * 32}, "no layer has full attention"),
]


@pytest.mark.parametrize(("name", "settings", "message"), INEXPRESSIBLE, ids=str)
def test_what_a_gguf_file_cannot_express_is_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ModelFileError, UnsupportedModelError), match=message):
        ours(f"{name}ForCausalLM", settings)


def test_settings_in_lists_for_all_layers_are_read_as_one() -> None:
    found = ours("HunYuanMoEV1ForCausalLM", {"num_experts": 64, "moe_topk": [8] * 32, "moe_intermediate_size": [3072]})
    assert (found.n_expert, found.n_expert_used) == (64, 8)


@pytest.mark.parametrize(("partial", "n_rot"), [(0.5, 16), (0.25, 8), (0.1, None), (1.5, None), (-1.0, None)])
def test_a_part_of_each_head_is_rotated(tmp_path: Path, partial: float, n_rot: int | None) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": partial}
    source = save_family(tmp_path / "c", "Glm4Moe", rope_parameters=rope | {"partial_rotary_factor": 0.5})
    config = (source / "config.json").read_text()
    (source / "config.json").write_text(
        config.replace('"partial_rotary_factor": 0.5', f'"partial_rotary_factor": {partial}')
    )
    if n_rot is None:
        with pytest.raises(UnsupportedModelError, match="of 32 values this is no number of pairs"):
            open_source(source)
    else:
        assert open_source(source).spec.rope.n_rot == n_rot


def test_blocks_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    source = save_family(tmp_path / "c", "Glm4Moe")
    expected = open_source(source).shapes
    tensors = load_file(source / "model.safetensors")
    ahead = {name.replace(".1.", ".2."): value.clone() for name, value in tensors.items() if ".layers.1." in name}
    ahead |= {"model.layers.2.eh_proj.weight": tensors["lm_head.weight"].clone()}
    save_file(tensors | ahead, source / "model.safetensors")
    assert open_source(source).shapes == expected
    further = shutil.copytree(source, tmp_path / "d")
    save_file(
        tensors | {name.replace(".2.", ".3."): value for name, value in ahead.items()}, further / "model.safetensors"
    )
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.3\..* has no place"):
        open_source(further)
