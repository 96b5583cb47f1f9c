"""GLM-4.5, 4.6 and 4.7, and dots.llm1, which have DeepSeek-V3's experts behind plain attention: settings, and names."""

from typing import Annotated

from msgspec import Meta

from slimoe.converter.source.families.config import Count, DeepseekConfig, Positive, SmallCount
from slimoe.converter.source.families.family import (
    ATTENTION,
    CHOICE_BIAS,
    DENSE,
    EXPERTS,
    MTP,
    QK_NORMS,
    SHARED,
    Family,
)
from slimoe.offload.model.architecture import Architecture
from slimoe.offload.model.architectures import DOTS1, GLM4MOE


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
        """Blocks behind the layers that predict further tokens."""
        return self.num_nextn_predict_layers


class Dots1Config(DeepseekConfig, frozen=True, kw_only=True):
    """Dots1ForCausalLM."""

    vocab_size: Count = 152064
    hidden_size: Count = 4608
    intermediate_size: Count = 10944
    num_hidden_layers: SmallCount = 62
    num_key_value_heads: SmallCount | None = 32
    max_position_embeddings: Count = 2048
    sliding_window: Count | None = 4096
    max_window_layers: int | None = 62
    layer_types: list[str] | None = None

    @property
    def window(self) -> int | None:
        """Tokens that attention looks back at; None for all."""
        slides = self.num_hidden_layers > (self.max_window_layers or 0)
        if self.layer_types is not None:
            slides = "sliding_attention" in self.layer_types
        return self.sliding_window if slides else None

    def unsupported(self, architecture: Architecture) -> str | None:
        """A sentence about the first setting that a GGUF file of this architecture cannot express; None without any."""
        if self.attention_bias:
            return f"attention_bias is true, but {architecture.name} files have no biases of queries, keys and values."
        return super().unsupported(architecture)


_NAMES = ATTENTION | QK_NORMS | DENSE | EXPERTS | SHARED | CHOICE_BIAS
FAMILIES = {
    "Glm4MoeForCausalLM": Family(
        "glm4_moe", Glm4MoeConfig, GLM4MOE, _NAMES | MTP | {"post_attention_layernorm": "post_attention_norm"}
    ),
    "Dots1ForCausalLM": Family("dots1", Dots1Config, DOTS1, _NAMES),
}
"""The families by the name of their model class."""
