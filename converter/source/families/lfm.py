"""LFM2 and LFM2.5 MoE, of whose layers most have a short convolution: settings, and names of tensors."""

from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, UnsetType

from slimoe.converter.source.families.config import Count, Positive, RoutedConfig, SmallCount, dense_first
from slimoe.converter.source.families.family import ATTENTION, Family
from slimoe.converter.source.families.qwen_next import squeezed
from slimoe.offload.model.architecture import Architecture
from slimoe.offload.model.architectures import LFM2MOE
from slimoe.offload.model.expert_spec import ExpertSpec
from slimoe.offload.model.recurrent_spec import RecurrentSpec

_KINDS = ("conv", "full_attention")


class Lfm2MoeConfig(RoutedConfig, frozen=True, kw_only=True, rename={"rms_norm_eps": "norm_eps"}):
    """Lfm2MoeForCausalLM; `tie_embedding` is an older name of `tie_word_embeddings`, and counts before it."""

    vocab_size: Count = 65536
    hidden_size: Count = 2048
    intermediate_size: Count = 7168
    num_hidden_layers: SmallCount = 32
    num_attention_heads: SmallCount = 32
    max_position_embeddings: Count = 128000
    rms_norm_eps: Positive = 1e-5
    rope_theta: Positive = 1e6
    tie_word_embeddings: bool = True
    tie_embedding: bool | UnsetType = UNSET
    moe_intermediate_size: Count = 1792
    num_experts: SmallCount = 32
    num_experts_per_tok: SmallCount = 4
    num_dense_layers: Annotated[int, Meta(ge=0, le=2**16)] = 2
    norm_topk_prob: bool = True
    use_expert_bias: bool = True
    routed_scaling_factor: Positive = 1.0
    layer_types: list[str] | None = None
    conv_L_cache: Annotated[int, Meta(ge=2, le=2**16)] = 3
    conv_bias: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.tie_embedding, UnsetType):
            msgspec.structs.force_setattr(self, "tie_word_embeddings", self.tie_embedding)

    @property
    def n_ff(self) -> int:
        """The width of one expert."""
        return self.moe_intermediate_size

    @property
    def experts(self) -> ExpertSpec:
        """The experts, whose scores are sigmoids, and the layers' shapes where some are dense."""
        layers = dense_first(self, self.num_dense_layers)
        return ExpertSpec(self.n_expert, self.n_expert_used, layers=layers, score="sigmoid")

    @property
    def kinds(self) -> Sequence[str]:
        """What mixes tokens in each layer."""
        return self.layer_types or ()

    @property
    def recurrent(self) -> RecurrentSpec:
        """The sizes of short convolutions."""
        are_recurrent = tuple(kind == _KINDS[0] for kind in self.kinds)
        return RecurrentSpec("short_conv", are_recurrent, self.conv_L_cache, self.hidden_size)

    def unsupported(self, architecture: Architecture) -> str | None:
        """A sentence about the first setting that a GGUF file of this architecture cannot express; None without any."""
        if len(self.kinds) != self.num_hidden_layers or not set(self.kinds) <= set(_KINDS):
            return f"layer_types has not one of {' and '.join(_KINDS)} for each of {self.num_hidden_layers} layers."
        if _KINDS[1] not in self.kinds:
            return "no layer has full attention."
        if self.num_dense_layers >= self.num_hidden_layers:
            what = f"num_dense_layers is {self.num_dense_layers}"
            return f"{what}, which leaves none of {self.num_hidden_layers} layers with experts."
        if self.conv_bias:
            return f"conv_bias is true, but {architecture.name} files have no biases of convolutions."
        if not self.use_expert_bias:
            return f"use_expert_bias is false, but routers of {architecture.name} files have biases."
        if self.routed_scaling_factor != 1.0:
            what = f"routed_scaling_factor is {self.routed_scaling_factor:g}"
            return f"{what}, but weights of {architecture.name} files are not scaled."
        return super().unsupported(architecture)


_EXPERTS = {
    "feed_forward.experts.gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"),
    "feed_forward.experts.down_proj": ("ffn_down_exps",),
}
_NAMES = {name: role for name, role in ATTENTION.items() if name.startswith("self_attn.")} | {
    "operator_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "self_attn.out_proj": "attn_output",
    "self_attn.q_layernorm": "attn_q_norm",
    "self_attn.k_layernorm": "attn_k_norm",
    "conv.in_proj": "shortconv.in_proj",
    "conv.conv": "shortconv.conv",
    "conv.out_proj": "shortconv.out_proj",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w3": "ffn_up",
    "feed_forward.w2": "ffn_down",
    "feed_forward.gate": "ffn_gate_inp",
    "feed_forward.expert_bias": "exp_probs_b.bias",
    "feed_forward.experts.*.w1": "ffn_gate_exps",
    "feed_forward.experts.*.w3": "ffn_up_exps",
    "feed_forward.experts.*.w2": "ffn_down_exps",
}
FAMILIES = {
    "Lfm2MoeForCausalLM": Family(
        "lfm2_moe",
        Lfm2MoeConfig,
        LFM2MOE,
        _NAMES,
        {"bos": 1, "eos": 2},
        joined=_EXPERTS,
        changes={"shortconv.conv.weight": squeezed},
    ),
}
"""The families by the name of their model class."""
