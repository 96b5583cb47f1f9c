"""What config.json says of a model, with the defaults of its architecture's own configuration class.

Each class below stands for the one of transformers that has its name, as of version 5: a field that the file lacks has
that class's default, null is taken where that class takes it, and further fields are not read by it either. What
decides about the tokenizer is in `tokenizer_settings`.
"""

from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, UnsetType

from slimoe.converter.source.checkpoint import Checkpoint
from slimoe.offload.errors import UnsupportedModelError

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


CLASSES: dict[str, tuple[str, type[ModelConfig]]] = {
    "LlamaForCausalLM": ("llama", LlamaConfig),
    "MistralForCausalLM": ("mistral", MistralConfig),
    "MixtralForCausalLM": ("mixtral", MixtralConfig),
}
"""The classes of Hugging Face that are read: their `model_type`, and what their configuration holds."""


class ConfigClass(msgspec.Struct, frozen=True, kw_only=True):
    """Which class a configuration is of."""

    architectures: list[str] | None = None
    model_type: str | None = None

    @property
    def name(self) -> str:
        """The class of Hugging Face, "unknown" where none is named."""
        return next(iter(self.architectures or ()), "unknown")


def read_model_config(checkpoint: Checkpoint) -> ModelConfig:
    """Raises ModelFileError for values of wrong types or sizes, UnsupportedModelError for a class that is not read."""
    kind = checkpoint.read_config(ConfigClass)
    if kind.name not in CLASSES:
        problem = f"the architecture {kind.name!r} is not supported, only {', '.join(CLASSES)}."
        raise UnsupportedModelError(checkpoint.path, problem)
    model_type, config_class = CLASSES[kind.name]
    if kind.model_type not in (None, model_type):
        problem = f"model_type is {kind.model_type!r}, but {kind.name} belongs to {model_type!r}."
        raise UnsupportedModelError(checkpoint.config_path, problem, "Correct the one that is wrong.")
    config = checkpoint.read_config(config_class)
    if config.hidden_act not in _SILU:
        raise UnsupportedModelError(checkpoint.config_path, f"the activation {config.hidden_act!r} is not supported.")
    return config
