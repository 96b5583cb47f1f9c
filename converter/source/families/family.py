"""A family of Hugging Face checkpoints as a table: how its config.json is read, and what its tensors are called.

Each family has a file beside this one, `checkpoint_source` lists them all, and `hf_tensors` reads the names.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from slimoe.converter.source.families.config import ModelConfig
from slimoe.offload.model.architecture import Architecture

ATTENTION = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
}
"""The names of attention and of both norms of a layer, which all families share."""
QK_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
"""The norms of queries and keys."""
EXPERTS = {
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.*.gate_proj": "ffn_gate_exps",
    "mlp.experts.*.up_proj": "ffn_up_exps",
    "mlp.experts.*.down_proj": "ffn_down_exps",
}
"""The router and the experts, as most families call them."""


@dataclass(frozen=True, slots=True)
class Family:
    """One model class of Hugging Face, such as `MixtralForCausalLM`.

    `model_type` is config.json's, `config` the class that its fields are read with, `architecture` the one of the GGUF
    file. `names` has llama.cpp's name for each tensor of a layer, by its name behind `model.layers.N.`, in which `*`
    stands for an expert's number. `token_ids` are the special tokens of a configuration that names none, by role.
    """

    model_type: str
    config: type[ModelConfig]
    architecture: Architecture
    names: Mapping[str, str]
    token_ids: Mapping[str, int] = field(default_factory=dict)
