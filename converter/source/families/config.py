"""What config.json says of a model: the fields that the configuration classes of all families have.

A family's own class stands for the one of transformers that has its name, as of version 5: a field that the file lacks
has that class's default, null is taken where that class takes it, and further fields are not read by it either. What
decides about the tokenizer is in `tokenizer.settings`.
"""

from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, UnsetType

from slimoe.offload.model.architecture import Architecture, Score
from slimoe.offload.model.attention_spec import AttentionSpec
from slimoe.offload.model.expert_spec import ExpertSpec, LayerShape
from slimoe.offload.model.recurrent_spec import RecurrentSpec
from slimoe.offload.model.spec import NO_MULTIPLIERS, Multipliers

_MOST = 2**31 - 1
Count = Annotated[int, Meta(ge=1, le=_MOST)]
SmallCount = Annotated[int, Meta(ge=1, le=2**16)]
"""Of things that are few in any model, so that nothing of a damaged file's size is built before it is refused."""
CountOrZero = Annotated[int, Meta(ge=0, le=_MOST)]
"""Of what is absent where it is 0."""
Positive = Annotated[float, Meta(gt=0, le=3e38)]

_SILU = ("silu", "swish")
_SCORES: dict[str, Score] = {"softmax": "softmax", "sigmoid": "sigmoid", "noaux_tc": "sigmoid"}
"""Words for a router's score; dots.llm1 has the name of the choice with a bias for it."""
_CHOICES: dict[Score, tuple[str, ...]] = {
    "sigmoid": ("noaux_tc",),
    "softmax": ("greedy", "group_limited_greedy"),
}
"""Words for how experts are selected by such a score."""


class RopeFields(msgspec.Struct, frozen=True, kw_only=True):
    """`rope_parameters`, or `rope_scaling` as it was called before; what each type needs is for its reader to say.

    Where layers of different kinds rotate otherwise, each kind has fields of its own.
    """

    rope_type: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
    rope_theta: Positive | UnsetType = UNSET
    partial_rotary_factor: float | UnsetType | None = UNSET
    factor: Positive | UnsetType | None = UNSET
    alpha: Positive | None = None
    original_max_position_embeddings: Count | UnsetType = UNSET
    attention_factor: Positive | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = True
    short_factor: list[Positive] | None = None
    long_factor: list[Positive] | None = None
    short_mscale: Positive | None = None
    long_mscale: Positive | None = None
    low_freq_factor: Positive | UnsetType = UNSET
    high_freq_factor: Positive | UnsetType = UNSET
    mrope_section: Annotated[list[Annotated[int, Meta(ge=0, le=2**16)]], Meta(min_length=3, max_length=3)] | None = None
    llama_4_scaling_beta: Annotated[float, Meta(ge=0, le=3e38)] | None = None
    full_attention: "RopeFields | None" = None
    sliding_attention: "RopeFields | None" = None


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
    scoring_func: str | None = None
    score_function: str | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on what transformers computes otherwise than GGUF files of these settings mean."""
        return ()

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
    def experts(self) -> ExpertSpec:
        """The experts, their router, and the layers' shapes where some are dense."""
        return ExpertSpec(self.n_expert, self.n_expert_used)

    @property
    def attention(self) -> AttentionSpec:
        """The sizes of attention."""
        return AttentionSpec(self.num_attention_heads, self.n_head_kv, self.n_embd_head)

    @property
    def window_attention(self) -> AttentionSpec | None:
        """The sizes of attention in layers with a window, where they are not those of the others."""
        return None

    @property
    def window_base(self) -> float:
        """The base of the rotation's frequencies in layers with a window; 0 where it is that of the others."""
        return 0.0

    @property
    def without_values(self) -> tuple[int, ...]:
        """The layers whose keys, before norms and rotation, are their values."""
        return ()

    @property
    def n_rot(self) -> int | None:
        """The values of a head that rotate; None leaves it to partial_rotary_factor."""
        return None

    @property
    def multipliers(self) -> Multipliers:
        """The constant factors of the model."""
        return NO_MULTIPLIERS

    @property
    def n_layer_nextn(self) -> int:
        """Blocks behind the layers that predict further tokens; they are not converted."""
        return 0

    @property
    def rope(self) -> RopeFields:
        """The rotation's fields; the older name counts where both are there."""
        return self.rope_scaling or self.rope_parameters or RopeFields()

    @property
    def kinds(self) -> Sequence[str]:
        """What mixes tokens in each layer, in the words of `layer_types`; empty where all layers have attention."""
        return ()

    @property
    def rope_sections(self) -> tuple[int, ...]:
        """How many pairs rotate by each of a token's places, where a file says so; empty otherwise."""
        return ()

    @property
    def recurrent(self) -> RecurrentSpec | None:
        """The sizes of what some layers have in place of attention; None without such layers."""
        return None

    @property
    def biased(self) -> tuple[str, ...]:
        """The modules of a layer whose matrices have biases."""
        return ()

    @property
    def window(self) -> int | None:
        """Tokens that attention looks back at; None for all."""
        return None

    @property
    def windowed(self) -> tuple[bool, ...]:
        """Which layers look back no further than the window; empty where a file has no word for that."""
        return ()

    def unsupported(self, architecture: Architecture) -> str | None:
        """A sentence about the first setting that a GGUF file of this architecture cannot express; None without any."""
        if self.hidden_act not in _SILU:
            return f"the activation {self.hidden_act!r} is not supported, only {_SILU[0]}."
        score = self.experts.score or architecture.router.score
        for name, value in (("scoring_func", self.scoring_func), ("score_function", self.score_function)):
            if value is not None and (value not in _SCORES or (_SCORES[value] == "sigmoid") != (score == "sigmoid")):
                return f"{name} is {value!r:.100}, but the router of this class has {score!r}."
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
        if architecture.router.renormalise not in (None, self.norm_topk_prob):
            how = "are always" if architecture.router.renormalise else "are never"
            what = f"the weights of the selected experts {how} scaled to a sum of 1"
            return f"norm_topk_prob is {str(self.norm_topk_prob).lower()}, but in {architecture.name} files {what}."
        if self.attention_bias:
            return f"attention_bias is true, but {architecture.name} files have no biases of queries, keys and values."
        return super().unsupported(architecture)


class DeepseekConfig(ModelConfig, frozen=True, kw_only=True):
    """The fields that DeepSeek-V3's class brought, and that others have too: a router whose scores are sigmoids with a
    bias for the choice, groups of experts, shared experts as wide as several, and dense layers before the others.
    """

    moe_intermediate_size: Count = 1408
    n_routed_experts: SmallCount
    n_shared_experts: Annotated[int, Meta(ge=0, le=2**16)]
    num_experts_per_tok: SmallCount
    n_group: SmallCount | None = 1
    topk_group: SmallCount | None = 1
    first_k_dense_replace: Annotated[int, Meta(ge=0, le=2**16)] = 0
    norm_topk_prob: bool = False
    routed_scaling_factor: Positive = 1.0
    topk_method: str | None = None
    attention_bias: bool = False

    @property
    def n_ff(self) -> int:
        """The width of one expert."""
        return self.moe_intermediate_size

    @property
    def n_expert(self) -> int:
        """Experts per layer."""
        return self.n_routed_experts

    @property
    def n_expert_used(self) -> int:
        """Experts per token."""
        return self.num_experts_per_tok

    @property
    def n_dense(self) -> int:
        """The layers without experts, which come first."""
        return self.first_k_dense_replace

    @property
    def score(self) -> Score:
        """What a router's logits become."""
        return "sigmoid"

    @property
    def experts(self) -> ExpertSpec:
        """The experts, their router, and the layers' shapes where some are dense."""
        n_group, n_group_used = self.n_group or 1, self.topk_group or 1
        return ExpertSpec(
            n_expert=self.n_expert,
            n_expert_used=self.n_expert_used,
            weights_scale=self.routed_scaling_factor,
            layers=dense_first(self, self.n_dense),
            score=self.score,
            renormalise=self.norm_topk_prob,
            # All groups are no choice among them.
            n_group=n_group if n_group_used < n_group else 1,
            n_group_used=n_group_used if n_group_used < n_group else 1,
            n_ff_shared=self.n_shared_experts * self.moe_intermediate_size,
        )

    def unsupported(self, architecture: Architecture) -> str | None:
        """A sentence about the first setting that a GGUF file of this architecture cannot express; None without any."""
        n_group, n_group_used = self.n_group or 1, self.topk_group or 1
        n_each = self.n_expert // n_group
        if n_group_used > n_group or self.n_expert % n_group or self.n_expert_used > n_group_used * n_each:
            what = f"n_group is {n_group} and topk_group {n_group_used}: {self.n_expert} experts in such groups"
            return f"{what} cannot give {self.n_expert_used}."
        if self.topk_method not in (None, *_CHOICES[self.score]):
            known = " or ".join(map(repr, _CHOICES[self.score]))
            return f"topk_method is {self.topk_method!r:.100}, but only {known} is known with {self.score!r}."
        if self.n_dense >= self.num_hidden_layers:
            what = f"first_k_dense_replace is {self.n_dense}"
            return f"{what}, which leaves none of {self.num_hidden_layers} layers with experts."
        return super().unsupported(architecture)


def dense_first(config: ModelConfig, n_dense: int) -> tuple[LayerShape, ...]:
    """The shapes of all layers, of which the first `n_dense` have no experts; empty where none is dense."""
    dense = LayerShape(0, config.intermediate_size)
    routed = LayerShape(config.n_expert, config.n_ff)
    return (dense,) * n_dense + (routed,) * (config.num_hidden_layers - n_dense) if n_dense else ()


class NestedConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A configuration of which that of the language model is a part."""

    tie_word_embeddings: bool = False

    @property
    def language(self) -> ModelConfig:
        """The language model's."""
        raise NotImplementedError


class ConfigClass(msgspec.Struct, frozen=True, kw_only=True):
    """Which class a configuration is of."""

    architectures: list[str] | None = None
    model_type: str | None = None

    @property
    def name(self) -> str:
        """The class of Hugging Face, "unknown" where none is named."""
        return next(iter(self.architectures or ()), "unknown")
