"""Ling 2 and Ring 2: settings, and names of tensors. Apart: as each family is, and a new one will be."""

from typing import Annotated

from msgspec import Meta, field

from slimoe.converter.source.families.config import Count, DeepseekConfig, Positive, SmallCount
from slimoe.converter.source.families.family import DENSE, EXPERTS, SHARED, STACKED, Family
from slimoe.offload.model.architecture import Architecture
from slimoe.offload.model.architectures import BAILINGMOE2


class BailingMoeV2Config(DeepseekConfig, frozen=True, kw_only=True):
    """BailingMoeV2ForCausalLM."""

    vocab_size: Count = 157184
    hidden_size: Count = 2048
    intermediate_size: Count = 5120
    num_hidden_layers: SmallCount = 20
    num_attention_heads: SmallCount = 16
    num_key_value_heads: SmallCount | None = 4
    max_position_embeddings: Count = 32768
    rope_theta: Positive = 6e5
    partial_rotary_factor: float | None = 0.5
    moe_intermediate_size: Count = 512
    n_routed_experts: SmallCount = field(name="num_experts", default=256)
    n_shared_experts: Annotated[int, Meta(ge=0, le=2**16)] = field(name="num_shared_experts", default=1)
    num_experts_per_tok: SmallCount = 8
    n_group: SmallCount | None = 8
    topk_group: SmallCount | None = 4
    first_k_dense_replace: Annotated[int, Meta(ge=0, le=2**16)] = 1
    norm_topk_prob: bool = True
    num_nextn_predict_layers: Annotated[int, Meta(ge=0, le=16)] = 0
    score_function: str = "sigmoid"
    use_qk_norm: bool = True
    use_qkv_bias: bool = False
    use_bias: bool = False

    @property
    def n_layer_nextn(self) -> int:
        """Blocks behind the layers that predict further tokens; they are not converted."""
        return self.num_nextn_predict_layers

    def unsupported(self, architecture: Architecture) -> str | None:
        """A sentence about the first setting that a GGUF file of this architecture cannot express; None without any."""
        if self.score_function != "sigmoid":
            return f"score_function is {self.score_function!r:.100}, but only 'sigmoid' is supported."
        if not self.use_qk_norm or self.use_qkv_bias or self.use_bias:
            return f"{architecture.name} files have norms of queries and keys, and no biases of attention."
        return super().unsupported(architecture)


_NAMES = (
    DENSE
    | EXPERTS
    | SHARED
    | {
        "input_layernorm": "attn_norm",
        "attention.query_layernorm": "attn_q_norm",
        "attention.key_layernorm": "attn_k_norm",
        "attention.dense": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate.expert_bias": "exp_probs_b.bias",
    }
)
_JOINED = STACKED | {"attention.query_key_value.weight": ("attn_q", "attn_k", "attn_v")}
FAMILIES = {"BailingMoeV2ForCausalLM": Family("bailing_moe", BailingMoeV2Config, BAILINGMOE2, _NAMES, joined=_JOINED)}
"""The families by the name of their model class."""
