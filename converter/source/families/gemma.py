"""Gemma 4 26B-A4B: settings, and names of tensors.

Of a checkpoint with parts for images and sounds the language model is read. E2B and E4B, which have embeddings for each
layer and layers without keys of their own, and models without experts, are refused.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import msgspec
import numpy as np
from msgspec import UNSET, UnsetType

from slimoe.converter.source.families.config import (
    Count,
    CountOrZero,
    ModelConfig,
    NestedConfig,
    Positive,
    RopeFields,
    SmallCount,
)
from slimoe.converter.source.families.family import ATTENTION, DENSE, QK_NORMS, Family
from slimoe.offload.model.architecture import Architecture
from slimoe.offload.model.architectures import GEMMA4
from slimoe.offload.model.attention_spec import AttentionSpec
from slimoe.offload.model.expert_spec import ExpertSpec
from slimoe.offload.model.spec import Multipliers

_WINDOWED, _FULL = "sliding_attention", "full_attention"
_PERIOD = 6
"""Of so many layers all but the last have a window, where a checkpoint does not say."""
_ROPE = {
    _WINDOWED: RopeFields(rope_type="default", rope_theta=1e4),
    _FULL: RopeFields(rope_type="proportional", partial_rotary_factor=0.25, rope_theta=1e6),
}
_LAYER_FIELDS = ("head_dim", "num_key_value_heads")
"""What layers without a window may have other than the model says."""


class Gemma4TextConfig(ModelConfig, frozen=True, kw_only=True):
    """Gemma4ForCausalLM."""

    vocab_size: Count = 262144
    hidden_size: Count = 2304
    intermediate_size: Count = 9216
    num_hidden_layers: SmallCount = 30
    num_attention_heads: SmallCount = 8
    num_key_value_heads: SmallCount | None = 4
    head_dim: SmallCount | None = 256
    hidden_activation: str = "gelu_pytorch_tanh"
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    sliding_window: Count = 512
    layer_types: list[Literal["sliding_attention", "full_attention"]] | None = None
    final_logit_softcapping: Positive | None = None
    use_bidirectional_attention: Literal["all", "vision"] | None = None
    hidden_size_per_layer_input: CountOrZero | None = 256
    attention_k_eq_v: bool = False
    num_kv_shared_layers: CountOrZero = 0
    enable_moe_block: bool = False
    use_double_wide_mlp: bool = False
    num_experts: SmallCount | None = None
    top_k_experts: SmallCount | None = None
    moe_intermediate_size: Count | None = None
    global_head_dim: SmallCount | None = 512
    num_global_key_value_heads: SmallCount | None = None
    per_layer_config: Mapping[str, Mapping[str, SmallCount]] | UnsetType | None = UNSET

    @property
    def n_ff(self) -> int:
        """The width of one expert."""
        return self.moe_intermediate_size or self.intermediate_size

    @property
    def n_expert(self) -> int:
        """Experts per layer; 0 for a dense model."""
        return (self.num_experts or 0) if self.enable_moe_block else 0

    @property
    def n_expert_used(self) -> int:
        """Experts per token."""
        return self.top_k_experts or 0

    @property
    def experts(self) -> ExpertSpec:
        """The experts, and the dense part beside them."""
        return ExpertSpec(self.n_expert, self.n_expert_used, n_ff_shared=self.intermediate_size)

    @property
    def windowed(self) -> tuple[bool, ...]:
        """Which layers look back no further than the window; the last one never does."""
        n_layer = self.num_hidden_layers
        if self.layer_types is None:
            kinds = [n % _PERIOD < _PERIOD - 1 for n in range(n_layer)]
        else:
            kinds = [kind == _WINDOWED for kind in self.layer_types]
        return (*kinds[:-1], False)

    @property
    def window(self) -> int | None:
        """Tokens that attention looks back at in the layers that are `windowed`."""
        return self.sliding_window

    @property
    def n_embd_head(self) -> int:
        """Values per head in layers without a window."""
        return self._own.get("head_dim") or super().n_embd_head

    @property
    def n_head_kv(self) -> int:
        """Key and value heads in layers without a window."""
        return self._own.get("num_key_value_heads") or super().n_head_kv

    @property
    def _own(self) -> Mapping[str, int]:
        """What layers without a window have other than the model says: of each, as transformers saves it, or of all."""
        if not isinstance(self.per_layer_config, UnsetType):
            own = self.per_layer_config or {}
            return next((own[str(n)] for n, windowed in enumerate(self.windowed) if not windowed and str(n) in own), {})
        n_head_kv = self.num_global_key_value_heads if self.attention_k_eq_v else None
        return {"head_dim": self.global_head_dim or 0, "num_key_value_heads": n_head_kv or 0}

    @property
    def window_attention(self) -> AttentionSpec:
        """The sizes of attention in layers with a window."""
        return AttentionSpec(self.num_attention_heads, super().n_head_kv, super().n_embd_head)

    @property
    def n_rot(self) -> int:
        """The values of a head that rotate in layers without a window: all, some of them by nothing."""
        return self.n_embd_head

    @property
    def rope(self) -> RopeFields:
        """The rotation's fields of layers without a window."""
        return self._rope_of(_FULL)

    @property
    def window_base(self) -> float:
        """The base of the rotation's frequencies in layers with a window."""
        theta = self._rope_of(_WINDOWED).rope_theta
        return theta if isinstance(theta, float) else 1e4

    def _rope_of(self, kind: str) -> RopeFields:
        both = self.rope_parameters
        return _ROPE[kind] if both is None else getattr(both, kind) or _ROPE[kind]

    @property
    def without_values(self) -> tuple[int, ...]:
        """The layers whose keys, before norms and rotation, are their values."""
        return tuple(n for n, windowed in enumerate(self.windowed) if self.attention_k_eq_v and not windowed)

    @property
    def multipliers(self) -> Multipliers:
        """The constant factors of the model."""
        scale = float(np.sqrt(np.float32(self.hidden_size)))
        return Multipliers(embedding=scale, attention=1.0, softcap=self.final_logit_softcapping or 0.0)

    def unsupported(self, architecture: Architecture) -> str | None:
        """A sentence about the first setting that a GGUF file of this architecture cannot express; None without any."""
        n_layer = self.num_hidden_layers
        if self.layer_types is not None and len(self.layer_types) != n_layer:
            return f"layer_types has {len(self.layer_types)} entries for {n_layer} layers."
        if self.hidden_size_per_layer_input:
            what = f"hidden_size_per_layer_input is {self.hidden_size_per_layer_input}"
            return f"{what}: embeddings of tokens for each layer, as E2B and E4B have, are not supported."
        if self.num_kv_shared_layers:
            what = f"num_kv_shared_layers is {self.num_kv_shared_layers}"
            return f"{what}: layers that read the keys and values of others, as E2B and E4B have, are not supported."
        if not (self.enable_moe_block and self.num_experts and self.top_k_experts and self.moe_intermediate_size):
            return "it has no experts; of Gemma 4 only models with experts (26B-A4B) are supported."
        if self.use_double_wide_mlp or self.attention_bias or self.use_bidirectional_attention == "all":
            return "use_double_wide_mlp, attention_bias and use_bidirectional_attention 'all' are not supported."
        if self.hidden_activation != "gelu_pytorch_tanh":
            return f"the activation {self.hidden_activation!r:.100} is not supported, only gelu_pytorch_tanh."
        own = self.per_layer_config or {}
        if others := sorted({name for fields in own.values() for name in fields} - {*_LAYER_FIELDS}):
            known = " and ".join(_LAYER_FIELDS)
            return f"per_layer_config has {others[0]!r:.100}; of single layers only {known} are read."
        every = [own.get(str(n), {}) for n in range(n_layer)] if own else []
        if any(one != ({} if windowed else self._own) for one, windowed in zip(every, self.windowed, strict=False)):
            return "per_layer_config makes layers of the same kind differ."
        window = self._rope_of(_WINDOWED)
        if window.rope_type != "default" or window.partial_rotary_factor not in (UNSET, None, 1.0):
            return f"the rotation of {_WINDOWED} is not supported, only rope_type 'default' of whole heads."
        if self.rope.rope_type != "proportional":
            return f"the rotation of {_FULL} is not supported, only rope_type 'proportional'."
        return super().unsupported(architecture)


class Gemma4Config(NestedConfig, frozen=True, kw_only=True):
    """Gemma4ForConditionalGeneration, whose language model is a Gemma4ForCausalLM."""

    tie_word_embeddings: bool = True
    text_config: Gemma4TextConfig = Gemma4TextConfig()

    @property
    def language(self) -> Gemma4TextConfig:
        """The language model's, whose output is the token table where the whole says so."""
        return msgspec.structs.replace(self.text_config, tie_word_embeddings=self.tie_word_embeddings)


_NAMES = (
    ATTENTION
    | QK_NORMS
    | DENSE
    | {
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "pre_feedforward_layernorm_2": "pre_ffw_norm_2",
        "post_feedforward_layernorm": "post_ffw_norm",
        "post_feedforward_layernorm_1": "post_ffw_norm_1",
        "post_feedforward_layernorm_2": "post_ffw_norm_2",
        "layer_scalar": "layer_output_scale.weight",
        "router.proj": "ffn_gate_inp",
        "router.scale": "ffn_gate_inp.scale",
        "router.per_expert_scale": "ffn_down_exps.scale",
    }
)
_TEXT = Family(
    "gemma4_text",
    Gemma4TextConfig,
    GEMMA4,
    _NAMES,
    {"bos": 2, "eos": 1, "pad": 0},
    joined={
        "experts.gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"),
        "experts.down_proj": ("ffn_down_exps",),
    },
)
FAMILIES = {
    "Gemma4ForCausalLM": _TEXT,
    "Gemma4ForConditionalGeneration": replace(
        _TEXT,
        model_type="gemma4",
        nested=Gemma4Config,
        skipped=tuple(f"model.{part}." for part in ("vision_tower", "audio_tower", "embed_vision", "embed_audio")),
        prefix="model.language_model.",
    ),
}
"""The families by the name of their model class."""
