"""A family of Hugging Face checkpoints as a table: how its config.json is read, and what its tensors are called.

Each family has a file beside this one, `checkpoint_source` lists them all, and `hf_tensors` reads the names.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from slimoe.converter.source.families.config import ModelConfig, NestedConfig
from slimoe.converter.source.stored_rows import StoredMatrix
from slimoe.offload.model.architecture import Architecture
from slimoe.offload.model.recurrent_spec import RecurrentSpec

Change = Callable[[StoredMatrix, RecurrentSpec], StoredMatrix]
"""Makes a GGUF tensor of a stored one, in a model with recurrent layers of such sizes."""

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
DENSE = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
"""The feed-forward part of layers without experts."""
SHARED = {
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}
"""The shared expert, as most families call it."""
CHOICE_BIAS = {"mlp.gate.e_score_correction_bias": "exp_probs_b.bias"}
"""What is added to the router's scores to select experts."""
MTP = {
    "eh_proj": "nextn.eh_proj",
    "enorm": "nextn.enorm",
    "hnorm": "nextn.hnorm",
    "embed_tokens": "nextn.embed_tokens",
    "shared_head.head": "nextn.shared_head_head",
    "shared_head.norm": "nextn.shared_head_norm",
}
"""What a block that predicts a further token has that no layer has."""
STACKED = {
    "mlp.experts.gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"),
    "mlp.experts.down_proj": ("ffn_down_exps",),
}
"""All experts of a layer in one tensor [n_expert, n_rows, n_per_row], as transformers 5 has them in memory, gate above
up. What it saves of most families, and what older versions saved, are tensors of single experts."""


@dataclass(frozen=True, slots=True)
class Family:
    """One model class of Hugging Face, such as `MixtralForCausalLM`.

    `model_type` is config.json's, `config` the class that its fields are read with, `architecture` the one of the GGUF
    file. `names` has llama.cpp's name for each tensor of a layer, by its name behind `model.layers.N.`, in which `*`
    stands for an expert's number; a suffix that both have alike is left out. `token_ids` are the special tokens of a
    configuration that names none, by role. `joined` has those tensors that are several matrices below each other, or
    such a stack for each expert. If one `alternates`, their rows take turns, biases of all experts are joined likewise,
    and stacks that are not MXFP4 are transposed. `rotates_neighbours`: queries and keys have the values that rotate
    together next to each other, and not half a head apart. Tensors whose names begin with one of `skipped` predict
    further tokens, or have to do with images. `changes` makes a GGUF tensor, by its name in a layer or in the file,
    of the one that is stored, and `split` has the GGUF tensors that one of a layer makes, by its name. If the language
    model is a part of the whole, `nested` reads the configuration, and `prefix` stands before the names of its tensors
    in place of `model.`, which is read as well.
    """

    model_type: str
    config: type[ModelConfig]
    architecture: Architecture
    names: Mapping[str, str]
    token_ids: Mapping[str, int] = field(default_factory=dict)
    joined: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: STACKED)
    alternates: bool = False
    rotates_neighbours: bool = False
    skipped: tuple[str, ...] = ()
    changes: Mapping[str, Change] = field(default_factory=dict)
    split: Mapping[str, Mapping[str, Change]] = field(default_factory=dict)
    nested: type[NestedConfig] | None = None
    prefix: str = "model."
