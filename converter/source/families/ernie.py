"""ERNIE 4.5 MoE: settings, and names of tensors. Apart: as each family is, and a new one will be."""

from typing import Annotated

from msgspec import Meta

from slimoe.converter.source.families.config import Count, ModelConfig, Positive, SmallCount, dense_first
from slimoe.converter.source.families.family import ATTENTION, DENSE, EXPERTS, SHARED, Family
from slimoe.offload.model.architecture import Architecture
from slimoe.offload.model.architectures import ERNIE4_5_MOE
from slimoe.offload.model.expert_spec import ExpertSpec


class Ernie45MoeConfig(ModelConfig, frozen=True, kw_only=True):
    """Ernie4_5_MoeForCausalLM."""

    vocab_size: Count = 103424
    hidden_size: Count = 2560
    intermediate_size: Count = 12288
    num_hidden_layers: SmallCount = 28
    num_attention_heads: SmallCount = 20
    num_key_value_heads: SmallCount | None = 4
    rms_norm_eps: Positive = 1e-5
    tie_word_embeddings: bool = True
    rope_theta: Positive = 5e5
    use_bias: bool = False
    moe_intermediate_size: Count = 1536
    moe_k: SmallCount = 6
    moe_num_experts: SmallCount = 64
    moe_num_shared_experts: Annotated[int, Meta(ge=0, le=2**16)] = 2
    moe_layer_start_index: Annotated[int, Meta(ge=0, le=2**16)] = 1
    moe_layer_end_index: int = -1
    moe_layer_interval: SmallCount = 1

    @property
    def n_ff(self) -> int:
        """The width of one expert."""
        return self.moe_intermediate_size

    @property
    def n_expert(self) -> int:
        """Experts per layer."""
        return self.moe_num_experts

    @property
    def n_expert_used(self) -> int:
        """Experts per token."""
        return self.moe_k

    @property
    def experts(self) -> ExpertSpec:
        """The experts, the shared one, and the layers' shapes where some are dense."""
        return ExpertSpec(
            n_expert=self.n_expert,
            n_expert_used=self.n_expert_used,
            layers=dense_first(self, self.moe_layer_start_index),
            n_ff_shared=self.moe_num_shared_experts * self.moe_intermediate_size,
        )

    def unsupported(self, architecture: Architecture) -> str | None:
        """A sentence about the first setting that a GGUF file of this architecture cannot express; None without any."""
        if self.use_bias:
            return f"use_bias is true; biases are not read for {architecture.models}."
        if self.moe_layer_interval != 1:
            what = f"moe_layer_interval is {self.moe_layer_interval}, so that dense layers lie among the others"
            return f"{what}; only leading ones are supported."
        if self.moe_layer_start_index >= self.num_hidden_layers:
            what = f"moe_layer_start_index is {self.moe_layer_start_index}"
            return f"{what}, which leaves none of {self.num_hidden_layers} layers with experts."
        if -1 < self.moe_layer_end_index < self.num_hidden_layers - 1:
            what = f"moe_layer_end_index is {self.moe_layer_end_index}, so that the layers behind it have no experts"
            return f"{what}; only leading ones without are supported."
        return super().unsupported(architecture)


_NAMES = ATTENTION | DENSE | EXPERTS | SHARED | {"mlp.moe_statics.e_score_correction_bias": "exp_probs_b.bias"}
FAMILIES = {
    "Ernie4_5_MoeForCausalLM": Family(
        "ernie4_5_moe",
        Ernie45MoeConfig,
        ERNIE4_5_MOE,
        _NAMES | {"mlp.gate.moe_statics.e_score_correction_bias": "exp_probs_b.bias"},
        {"bos": 1, "eos": 2, "pad": 0},
        rotates_neighbours=True,
        skipped=("model.mtp_",),
    )
}
"""The families by the name of their model class."""
