"""Small random checkpoints of the families with shared experts, dense layers and the like, saved by transformers."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.models.tiny_checkpoint import CHATML, byte_level

_DEEPSEEK: dict[str, Any] = {
    "moe_intermediate_size": 96,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}
_DELTA_NET: dict[str, Any] = {
    "num_hidden_layers": 3,
    "head_dim": 32,
    "moe_intermediate_size": 96,
    "shared_expert_intermediate_size": 160,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 24,
    "v_head_dim": 40,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "Phimoe": {"num_local_experts": 8, "attention_bias": True, "lm_head_bias": True},
    "Qwen2Moe": {
        "moe_intermediate_size": 96,
        "shared_expert_intermediate_size": 160,
        "num_experts": 8,
        "num_experts_per_tok": 3,
    },
    "GraniteMoe": {"num_local_experts": 8, "num_experts_per_tok": 3, "attention_multiplier": 0.2},
    "GraniteMoeShared": {
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "shared_intermediate_size": 160,
        "embedding_multiplier": 1.5,
        "residual_multiplier": 0.6,
        "attention_multiplier": 0.125,
        "logits_scaling": 0.75,
    },
    "Dots1": _DEEPSEEK | {"n_shared_experts": 2, "max_window_layers": 2, "num_key_value_heads": 4},
    "Ernie4_5_Moe": {"moe_num_experts": 8, "moe_k": 3, "moe_intermediate_size": 96},
    "HunYuanMoEV1": {
        "num_experts": 8,
        "moe_topk": 3,
        "head_dim": 16,
        "rope_parameters": {"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0, "rope_theta": 1e4},
    },
    "MiniMaxM2": {"num_local_experts": 8, "num_experts_per_tok": 3, "head_dim": 32, "rotary_dim": 16},
    "Glm4Moe": _DEEPSEEK | {"head_dim": 32, "use_qk_norm": True, "attention_bias": True, "n_shared_experts": 1},
    "DeepseekV2": _DEEPSEEK | _LATENT | {"n_shared_experts": 2, "norm_topk_prob": False},
    "DeepseekV3": _DEEPSEEK
    | _LATENT
    | {
        "n_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 0.7,
            "mscale_all_dim": 0.7,
        },
    },
    "Glm4MoeLite": _DEEPSEEK | _LATENT | {"n_shared_experts": 1},
    "Mistral4": _DEEPSEEK
    | _LATENT
    | {
        "n_shared_experts": 1,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.2,
        },
    },
    "GptOss": {
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "head_dim": 32,
        "sliding_window": 8,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
            "truncate": True,
        },
    },
    "Qwen3Next": _DELTA_NET,
    "Qwen3_5Moe": _DELTA_NET,
    "GraniteMoeHybrid": {
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "shared_intermediate_size": 160,
        "embedding_multiplier": 1.5,
        "residual_multiplier": 0.6,
        "attention_multiplier": 0.125,
        "logits_scaling": 0.75,
        "mamba_n_heads": 8,
        "mamba_d_state": 16,
    },
    "NemotronH": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "linear_attention", "moe"],
        "head_dim": 32,
        "moe_intermediate_size": 96,
        "moe_shared_expert_intermediate_size": 160,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "routed_scaling_factor": 2.5,
        "mamba_num_heads": 6,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "ssm_state_size": 16,
        "time_step_min": 1e-9,
    },
    "Lfm2Moe": {
        "num_hidden_layers": 3,
        "layer_types": ["conv", "full_attention", "conv"],
        "num_dense_layers": 1,
        "moe_intermediate_size": 96,
        "num_experts": 8,
        "num_experts_per_tok": 3,
    },
}
"""What the configuration of each class says beyond the sizes that all have."""


def config_class(name: str) -> str:
    """The name of a class's configuration, which may be that of its language model."""
    return "Qwen3_5MoeTextConfig" if name == "Qwen3_5Moe" else f"{name}Config"


def save_family(path: Path, name: str, **config: Any) -> Path:
    """Saves a model of the class `name`, two layers, with a tokenizer as Qwen's; `config` is for its configuration."""
    torch.manual_seed(1234)
    values = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 520,
        "max_position_embeddings": 512,
        "initializer_range": 0.25,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    settings = getattr(transformers, config_class(name))(**values | SETTINGS[name] | config)
    model = getattr(transformers, f"{name}ForCausalLM")(settings)
    for tensor_name, tensor in model.state_dict().items():
        if "norm" in tensor_name and tensor_name.endswith("weight"):
            torch.nn.init.uniform_(tensor, 0.5, 1.5)
        elif "bias" in tensor_name or tensor_name.endswith(("sinks", "A_log")):
            torch.nn.init.normal_(tensor, std=0.2)
    model.save_pretrained(path)
    byte_level("qwen").save(str(path / "tokenizer.json"))
    template = {"eos_token": "<|im_end|>", "chat_template": CHATML}
    (path / "tokenizer_config.json").write_text(json.dumps(template))
    return path
