"""Qwen3-MoE: settings, and names of tensors. Apart: as each family is, and a new one will be."""

from slimoe.converter.source.families.config import Count, RoutedConfig, SmallCount
from slimoe.converter.source.families.family import ATTENTION, EXPERTS, QK_NORMS, Family
from slimoe.offload.model.architecture import Architecture
from slimoe.offload.model.architectures import QWEN3MOE


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


FAMILIES = {"Qwen3MoeForCausalLM": Family("qwen3_moe", Qwen3MoeConfig, QWEN3MOE, ATTENTION | QK_NORMS | EXPERTS)}
"""The families by the name of their model class."""
