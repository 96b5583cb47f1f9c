"""Qwen1.5-MoE, Qwen2-MoE and Qwen3-MoE: settings, and names of tensors."""

from slimoe.converter.source.families.config import Count, CountOrZero, RoutedConfig, SmallCount
from slimoe.converter.source.families.family import ATTENTION, EXPERTS, QK_NORMS, Family
from slimoe.offload.model.architecture import Architecture
from slimoe.offload.model.architectures import QWEN2MOE, QWEN3MOE
from slimoe.offload.model.expert_spec import ExpertSpec


class Qwen3MoeConfig(RoutedConfig, frozen=True, kw_only=True):
    """Qwen3MoeForCausalLM."""

    vocab_size: Count = 151936
    hidden_size: Count = 2048
    intermediate_size: Count = 6144
    num_hidden_layers: SmallCount = 24
    num_key_value_heads: SmallCount | None = 4
    max_position_embeddings: Count = 32768
    moe_intermediate_size: Count = 768
    num_experts: SmallCount = 128
    decoder_sparse_step: SmallCount = 1
    mlp_only_layers: list[int] | None = None
    use_sliding_window: bool = False
    sliding_window: Count | None = 4096

    @property
    def n_ff(self) -> int:
        """The width of one expert."""
        return self.moe_intermediate_size

    @property
    def window(self) -> int | None:
        """Tokens that attention looks back at; None for all."""
        return self.sliding_window if self.use_sliding_window else None

    def unsupported(self, architecture: Architecture) -> str | None:
        """A sentence about the first setting that a GGUF file of this architecture cannot express; None without any."""
        dense = sorted({layer for layer in self.mlp_only_layers or () if 0 <= layer < self.num_hidden_layers})
        if dense:
            return f"mlp_only_layers is {dense}: layers without experts among layers with experts are not supported."
        if self.decoder_sparse_step != 1:
            what = f"decoder_sparse_step is {self.decoder_sparse_step}, so that some layers have no experts"
            return f"{what}; only models with experts in every layer (1) are supported."
        return super().unsupported(architecture)


class Qwen2MoeConfig(Qwen3MoeConfig, frozen=True, kw_only=True):
    """Qwen2MoeForCausalLM, whose class Qwen3's was made from."""

    intermediate_size: Count = 5632
    num_attention_heads: SmallCount = 16
    num_key_value_heads: SmallCount | None = 16
    moe_intermediate_size: Count = 1408
    shared_expert_intermediate_size: CountOrZero = 5632
    num_experts: SmallCount = 60
    num_experts_per_tok: SmallCount = 4
    qkv_bias: bool = True
    sliding_window: CountOrZero | None = 4096

    @property
    def biased(self) -> tuple[str, ...]:
        """The modules of a layer whose matrices have biases."""
        return ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj") if self.qkv_bias else ()

    @property
    def experts(self) -> ExpertSpec:
        """The experts, and the shared one."""
        return ExpertSpec(self.n_expert, self.n_expert_used, n_ff_shared=self.shared_expert_intermediate_size)

    def unsupported(self, architecture: Architecture) -> str | None:
        """A sentence about the first setting that a GGUF file of this architecture cannot express; None without any."""
        return shared_problem(self.shared_expert_intermediate_size, architecture) or super().unsupported(architecture)


def shared_problem(width: int, architecture: Architecture) -> str | None:
    """What is wrong with the width of a shared expert in files that have one even where they do not say so."""
    what = f"shared_expert_intermediate_size is 0, but layers of {architecture.name} files have a shared expert."
    return None if width else what


SHARED = {
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
}
"""The shared expert and its gate."""
FAMILIES = {
    "Qwen2MoeForCausalLM": Family("qwen2_moe", Qwen2MoeConfig, QWEN2MOE, ATTENTION | EXPERTS | SHARED),
    "Qwen3MoeForCausalLM": Family("qwen3_moe", Qwen3MoeConfig, QWEN3MOE, ATTENTION | QK_NORMS | EXPERTS),
}
"""The families by the name of their model class."""
