"""Llama, Mistral and Mixtral: what their config.json holds, and what their tensors are called."""

from msgspec import UNSET, UnsetType

from slimoe.converter.source.families.config import Count, ModelConfig, Positive, SmallCount
from slimoe.converter.source.families.family import ATTENTION, DENSE, Family
from slimoe.converter.source.tokenizer.settings import LLAMA_IDS
from slimoe.offload.model.architectures import LLAMA


class LlamaConfig(ModelConfig, frozen=True, kw_only=True):
    """LlamaForCausalLM, a dense model."""

    intermediate_size: Count = 11008
    num_key_value_heads: SmallCount | None = None
    max_position_embeddings: Count = 2048
    attention_bias: bool = False
    mlp_bias: bool = False

    @property
    def biased(self) -> tuple[str, ...]:
        """The modules of a layer whose matrices have biases."""
        return ("self_attn",) * self.attention_bias + ("mlp",) * self.mlp_bias


class MistralConfig(ModelConfig, frozen=True, kw_only=True):
    """MistralForCausalLM, a dense model with sliding attention."""

    sliding_window: Count | None = 4096

    @property
    def window(self) -> int | None:
        """Tokens that attention looks back at; None for all."""
        return self.sliding_window


class MixtralConfig(ModelConfig, frozen=True, kw_only=True):
    """MixtralForCausalLM; `num_experts` is another name of `num_local_experts`, and counts where both are there."""

    rms_norm_eps: Positive = 1e-5
    rope_theta: Positive = 1e6
    num_local_experts: SmallCount = 8
    num_experts: SmallCount | UnsetType = UNSET
    num_experts_per_tok: SmallCount = 2
    sliding_window: Count | None = None

    @property
    def window(self) -> int | None:
        """Tokens that attention looks back at; None for all."""
        return self.sliding_window

    @property
    def n_expert(self) -> int:
        """Experts per layer."""
        return self.num_local_experts if isinstance(self.num_experts, UnsetType) else self.num_experts

    @property
    def n_expert_used(self) -> int:
        """Experts per token."""
        return self.num_experts_per_tok


_EXPERTS = {
    "gate": "ffn_gate_inp",
    "experts.*.w1": "ffn_gate_exps",
    "experts.*.w2": "ffn_down_exps",
    "experts.*.w3": "ffn_up_exps",
}
# transformers 5 calls the part `mlp` in memory, and `block_sparse_moe` on disk as its predecessors did.
_MIXTRAL = ATTENTION | {f"{part}.{name}": _EXPERTS[name] for part in ("mlp", "block_sparse_moe") for name in _EXPERTS}

FAMILIES = {
    "LlamaForCausalLM": Family("llama", LlamaConfig, LLAMA, ATTENTION | DENSE, LLAMA_IDS, joined={}),
    "MistralForCausalLM": Family("mistral", MistralConfig, LLAMA, ATTENTION | DENSE, LLAMA_IDS, joined={}),
    "MixtralForCausalLM": Family("mixtral", MixtralConfig, LLAMA, _MIXTRAL, LLAMA_IDS),
}
"""The families by the name of their model class."""
