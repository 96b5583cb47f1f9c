"""Granite MoE, with and without a shared expert. Apart: as each family is, and a new one will be."""

from typing import Annotated

from msgspec import Meta

from slimoe.converter.source.families.config import Count, ModelConfig, Positive, SmallCount
from slimoe.converter.source.families.family import ATTENTION, STACKED, Family
from slimoe.offload.model.architecture import Architecture
from slimoe.offload.model.architectures import GRANITEMOE
from slimoe.offload.model.expert_spec import ExpertSpec
from slimoe.offload.model.spec import Multipliers


class GraniteMoeConfig(ModelConfig, frozen=True, kw_only=True):
    """GraniteMoeForCausalLM."""

    intermediate_size: Count = 11008
    num_key_value_heads: SmallCount | None = None
    max_position_embeddings: Count = 2048
    attention_bias: bool = False
    embedding_multiplier: Positive = 1.0
    logits_scaling: Positive = 1.0
    residual_multiplier: Positive = 1.0
    attention_multiplier: Positive = 1.0
    num_local_experts: SmallCount = 8
    num_experts_per_tok: SmallCount = 2

    @property
    def n_expert(self) -> int:
        """Experts per layer."""
        return self.num_local_experts

    @property
    def n_expert_used(self) -> int:
        """Experts per token."""
        return self.num_experts_per_tok

    @property
    def multipliers(self) -> Multipliers:
        """The constant factors of the model; logits are divided by theirs."""
        logits = 1.0 / self.logits_scaling
        return Multipliers(self.embedding_multiplier, self.residual_multiplier, self.attention_multiplier, logits)

    def unsupported(self, architecture: Architecture) -> str | None:
        """A sentence about the first setting that a GGUF file of this architecture cannot express; None without any."""
        if self.attention_bias:
            return f"attention_bias is true; biases of attention are not read for {architecture.models}."
        return super().unsupported(architecture)


class GraniteMoeSharedConfig(GraniteMoeConfig, frozen=True, kw_only=True):
    """GraniteMoeSharedForCausalLM, which has a shared expert unless its width is 0."""

    shared_intermediate_size: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0

    @property
    def experts(self) -> ExpertSpec:
        """The experts, and the shared one."""
        return ExpertSpec(self.n_expert, self.n_expert_used, n_ff_shared=self.shared_intermediate_size)


_NAMES = ATTENTION | {
    "block_sparse_moe.router.layer": "ffn_gate_inp",
    "shared_mlp.output_linear": "ffn_down_shexp",
}
_JOINED = STACKED | {
    "block_sparse_moe.input_linear.weight": ("ffn_gate_exps", "ffn_up_exps"),
    "block_sparse_moe.output_linear.weight": ("ffn_down_exps",),
    "shared_mlp.input_linear.weight": ("ffn_gate_shexp", "ffn_up_shexp"),
}
_IDS = {"bos": 1, "eos": 2}

FAMILIES = {
    "GraniteMoeForCausalLM": Family("granitemoe", GraniteMoeConfig, GRANITEMOE, _NAMES, _IDS, _JOINED),
    "GraniteMoeSharedForCausalLM": Family(
        "granitemoeshared", GraniteMoeSharedConfig, GRANITEMOE, _NAMES, _IDS, _JOINED
    ),
}
"""The families by the name of their model class."""
