"""OLMoE: settings, and names of tensors. Apart: as each family is, and a new one will be."""

from slimoe.converter.source.families.config import Count, Positive, RoutedConfig, SmallCount
from slimoe.converter.source.families.family import ATTENTION, EXPERTS, QK_NORMS, Family
from slimoe.offload.model.architecture import Architecture
from slimoe.offload.model.architectures import OLMOE


class OlmoeConfig(RoutedConfig, frozen=True, kw_only=True):
    """OlmoeForCausalLM."""

    vocab_size: Count = 50304
    hidden_size: Count = 2048
    intermediate_size: Count = 2048
    num_hidden_layers: SmallCount = 16
    num_attention_heads: SmallCount = 16
    num_key_value_heads: SmallCount | None = None
    max_position_embeddings: Count = 4096
    rms_norm_eps: Positive = 1e-5
    num_experts: SmallCount = 64
    clip_qkv: float | None = None

    def unsupported(self, architecture: Architecture) -> str | None:
        """A sentence about the first setting that a GGUF file of this architecture cannot express; None without any."""
        if self.clip_qkv is not None:
            return f"clip_qkv is {self.clip_qkv:g}; queries, keys and values that are clipped are not supported."
        return super().unsupported(architecture)


FAMILIES = {
    "OlmoeForCausalLM": Family("olmoe", OlmoeConfig, OLMOE, ATTENTION | QK_NORMS | EXPERTS, {"eos": 50279, "pad": 1})
}
"""The families by the name of their model class."""
