"""GLM-4.5, 4.6 and 4.7: settings, and names of tensors. Apart: as each family is, and a new one will be."""

from typing import Annotated

from msgspec import Meta

from slimoe.converter.source.families.config import Count, DeepseekConfig, Positive, SmallCount
from slimoe.converter.source.families.family import ATTENTION, CHOICE_BIAS, DENSE, EXPERTS, QK_NORMS, SHARED, Family
from slimoe.offload.model.architectures import GLM4MOE


class Glm4MoeConfig(DeepseekConfig, frozen=True, kw_only=True):
    """Glm4MoeForCausalLM."""

    vocab_size: Count = 151552
    intermediate_size: Count = 10944
    num_hidden_layers: SmallCount = 46
    num_attention_heads: SmallCount = 96
    rms_norm_eps: Positive = 1e-5
    partial_rotary_factor: float | None = 0.5
    n_routed_experts: SmallCount = 128
    n_shared_experts: Annotated[int, Meta(ge=0, le=2**16)] = 1
    num_experts_per_tok: SmallCount = 8
    first_k_dense_replace: Annotated[int, Meta(ge=0, le=2**16)] = 1
    norm_topk_prob: bool = True
    num_nextn_predict_layers: Annotated[int, Meta(ge=0, le=16)] = 1

    @property
    def biased(self) -> tuple[str, ...]:
        """The modules of a layer whose matrices have biases."""
        return ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj") if self.attention_bias else ()

    @property
    def n_layer_nextn(self) -> int:
        """Blocks behind the layers that predict further tokens; they are not converted."""
        return self.num_nextn_predict_layers


_NAMES = ATTENTION | QK_NORMS | DENSE | EXPERTS | SHARED | CHOICE_BIAS
_NAMES["post_attention_layernorm"] = "post_attention_norm"
FAMILIES = {"Glm4MoeForCausalLM": Family("glm4_moe", Glm4MoeConfig, GLM4MOE, _NAMES)}
"""The families by the name of their model class."""
