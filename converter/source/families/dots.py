"""dots.llm1: settings, and names of tensors. Apart: as each family is, and a new one will be."""

from slimoe.converter.source.families.config import Count, DeepseekConfig, SmallCount
from slimoe.converter.source.families.family import ATTENTION, CHOICE_BIAS, DENSE, EXPERTS, QK_NORMS, SHARED, Family
from slimoe.offload.model.architecture import Architecture
from slimoe.offload.model.architectures import DOTS1


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
FAMILIES = {"Dots1ForCausalLM": Family("dots1", Dots1Config, DOTS1, _NAMES)}
"""The families by the name of their model class."""
