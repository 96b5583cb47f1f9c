"""What config.json says of a model: the fields that the configuration classes of all families have.

A family's own class stands for the one of transformers that has its name, as of version 5: a field that the file lacks
has that class's default, null is taken where that class takes it, and further fields are not read by it either. What
decides about the tokenizer is in `tokenizer.settings`.
"""

from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, UnsetType

from slimoe.offload.model.architecture import Architecture

_MOST = 2**31 - 1
Count = Annotated[int, Meta(ge=1, le=_MOST)]
SmallCount = Annotated[int, Meta(ge=1, le=2**16)]
"""Of things that are few in any model, so that nothing of a damaged file's size is built before it is refused."""
Positive = Annotated[float, Meta(gt=0, le=3e38)]

_SILU = ("silu", "swish")


class RopeFields(msgspec.Struct, frozen=True, kw_only=True):
    """`rope_parameters`, or `rope_scaling` as it was called before; what each type needs is for its reader to say."""

    rope_type: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
    rope_theta: Positive | UnsetType = UNSET
    partial_rotary_factor: float | UnsetType | None = UNSET
    factor: Positive | UnsetType | None = UNSET
    original_max_position_embeddings: Count | UnsetType = UNSET
    attention_factor: Positive | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = True
    low_freq_factor: Positive | UnsetType = UNSET
    high_freq_factor: Positive | UnsetType = UNSET


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that all classes have, with the defaults that most of them share."""

    vocab_size: Count = 32000
    hidden_size: Count = 4096
    intermediate_size: Count = 14336
    num_hidden_layers: SmallCount = 32
    num_attention_heads: SmallCount = 32
    num_key_value_heads: SmallCount | None = 8
    head_dim: SmallCount | None = None
    hidden_act: str = "silu"
    max_position_embeddings: Count = 131072
    rms_norm_eps: Positive = 1e-6
    tie_word_embeddings: bool = False
    rope_theta: Positive = 1e4
    rope_parameters: RopeFields | None = None
    rope_scaling: RopeFields | None = None
    original_max_position_embeddings: Count | UnsetType = UNSET
    partial_rotary_factor: float | None = None

    @property
    def n_head_kv(self) -> int:
        """Key and value heads."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def n_embd_head(self) -> int:
        """Values per head."""
        return self.head_dim or max(1, self.hidden_size // self.num_attention_heads)

    @property
    def n_ff(self) -> int:
        """The width of one expert, or of a dense feed-forward part."""
        return self.intermediate_size

    @property
    def n_expert(self) -> int:
        """Experts per layer; 0 for a dense model."""
        return 0

    @property
    def n_expert_used(self) -> int:
        """Experts per token."""
        return 0

    @property
    def rope(self) -> RopeFields:
        """The rotation's fields; the older name counts where both are there."""
        return self.rope_scaling or self.rope_parameters or RopeFields()

    @property
    def biased(self) -> tuple[str, ...]:
        """The modules of a layer whose matrices have biases."""
        return ()

    @property
    def window(self) -> int | None:
        """Tokens that attention looks back at; None for all."""
        return None

    def unsupported(self, architecture: Architecture) -> str | None:
        """A sentence about the first setting that a GGUF file of this architecture cannot express; None without any."""
        if self.hidden_act not in _SILU:
            return f"the activation {self.hidden_act!r} is not supported, only {_SILU[0]}."
        return None


class RoutedConfig(ModelConfig, frozen=True, kw_only=True):
    """The fields of classes with a router that may or may not renormalise its weights, and norms of queries and keys.

    `num_local_experts` is another name of `num_experts`, and counts where both are there.
    """

    num_experts: SmallCount = 128
    num_local_experts: SmallCount | UnsetType = UNSET
    num_experts_per_tok: SmallCount = 8
    norm_topk_prob: bool = False
    attention_bias: bool = False

    @property
    def n_expert(self) -> int:
        """Experts per layer."""
        return self.num_experts if isinstance(self.num_local_experts, UnsetType) else self.num_local_experts

    @property
    def n_expert_used(self) -> int:
        """Experts per token."""
        return self.num_experts_per_tok

    def unsupported(self, architecture: Architecture) -> str | None:
        """A sentence about the first setting that a GGUF file of this architecture cannot express; None without any."""
        if self.norm_topk_prob is not architecture.router.renormalise:
            how = "are always" if architecture.router.renormalise else "are never"
            what = f"the weights of the selected experts {how} scaled to a sum of 1"
            return f"norm_topk_prob is {str(self.norm_topk_prob).lower()}, but in {architecture.name} files {what}."
        if self.attention_bias:
            return f"attention_bias is true, but {architecture.name} files have no biases of queries, keys and values."
        return super().unsupported(architecture)


class ConfigClass(msgspec.Struct, frozen=True, kw_only=True):
    """Which class a configuration is of."""

    architectures: list[str] | None = None
    model_type: str | None = None

    @property
    def name(self) -> str:
        """The class of Hugging Face, "unknown" where none is named."""
        return next(iter(self.architectures or ()), "unknown")
