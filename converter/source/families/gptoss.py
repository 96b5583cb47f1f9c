"""gpt-oss: settings, and names of tensors. Apart: as each family is, and a new one will be.

Its YaRN has bounds between two pairs (`truncate` is false). The file is one of llama.cpp's, which rounds them: its
answers are llama.cpp's.
"""

from collections.abc import Sequence

import msgspec

from slimoe.converter.source.families.config import Count, ModelConfig, Positive, RopeFields, SmallCount
from slimoe.converter.source.families.family import ATTENTION, STACKED, Family
from slimoe.offload.model.architecture import Architecture
from slimoe.offload.model.architectures import GPT_OSS

_YARN = RopeFields(rope_type="yarn", factor=32.0, beta_fast=32.0, beta_slow=1.0, original_max_position_embeddings=4096)
_KINDS = ("sliding_attention", "full_attention")


class GptOssConfig(ModelConfig, frozen=True, kw_only=True):
    """GptOssForCausalLM."""

    vocab_size: Count = 201088
    hidden_size: Count = 2880
    intermediate_size: Count = 2880
    num_hidden_layers: SmallCount = 36
    num_attention_heads: SmallCount = 64
    head_dim: SmallCount | None = 64
    rms_norm_eps: Positive = 1e-5
    rope_theta: Positive = 150000.0
    num_local_experts: SmallCount = 128
    num_experts_per_tok: SmallCount = 4
    sliding_window: Count = 128
    layer_types: list[str] | None = None
    swiglu_alpha: Positive = 1.702
    swiglu_limit: Positive = 7.0
    attention_bias: bool = True

    @property
    def n_expert(self) -> int:
        """Experts per layer."""
        return self.num_local_experts

    @property
    def n_expert_used(self) -> int:
        """Experts per token."""
        return self.num_experts_per_tok

    @property
    def window(self) -> int | None:
        """Tokens that attention looks back at in the layers that are `windowed`."""
        return self.sliding_window

    @property
    def kinds(self) -> Sequence[str]:
        """What attention sees in each layer: the window in every other one from the first on, unless layers say it."""
        return self.layer_types or [_KINDS[layer % 2] for layer in range(self.num_hidden_layers)]

    @property
    def windowed(self) -> tuple[bool, ...]:
        """Which layers look back no further than the window."""
        return tuple(kind == _KINDS[0] for kind in self.kinds)

    @property
    def rope(self) -> RopeFields:
        """The rotation's fields, with rounded bounds of YaRN."""
        return msgspec.structs.replace(self.rope_scaling or self.rope_parameters or _YARN, truncate=True)

    @property
    def biased(self) -> tuple[str, ...]:
        """The modules of a layer whose matrices have biases."""
        return ("self_attn", "mlp.router")

    def unsupported(self, architecture: Architecture) -> str | None:
        """A sentence about the first setting that a GGUF file of this architecture cannot express; None without any."""
        if len(self.kinds) != self.num_hidden_layers or set(self.kinds) != set(_KINDS):
            return f"layer_types has not {_KINDS[0]} or {_KINDS[1]} for each of the layers, and some of both."
        if (self.swiglu_alpha, self.swiglu_limit) != (1.702, 7.0):
            what = f"swiglu_alpha is {self.swiglu_alpha:g} and swiglu_limit {self.swiglu_limit:g}"
            return f"{what}, but in {architecture.name} files they are 1.702 and 7."
        if not self.attention_bias:
            return f"attention_bias is false, but {architecture.name} files have biases of attention."
        return super().unsupported(architecture)


_NAMES = ATTENTION | {
    "post_attention_layernorm": "post_attention_norm",
    "self_attn.sinks": "attn_sinks.weight",
    "mlp.router": "ffn_gate_inp",
    "mlp.experts.down_proj_bias": "ffn_down_exps.bias",
}
_GATE_UP, _DOWN = STACKED.values()
_JOINED = STACKED | {
    "mlp.experts.gate_up_proj_bias": _GATE_UP,
    "mlp.experts.gate_up_proj_blocks": _GATE_UP,
    "mlp.experts.down_proj_blocks": _DOWN,
}

FAMILIES = {
    "GptOssForCausalLM": Family("gpt_oss", GptOssConfig, GPT_OSS, _NAMES, joined=_JOINED, alternates=True),
}
"""The families by the name of their model class."""
