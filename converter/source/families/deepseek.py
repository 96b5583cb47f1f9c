"""DeepSeek-V2 and V3, GLM-4.7-Flash and Mistral Small 4, which have latent attention: settings, names of tensors."""

from dataclasses import replace
from typing import Annotated

from msgspec import Meta, UnsetType

from slimoe.converter.source.families.config import Count, DeepseekConfig, Positive, RopeFields, SmallCount
from slimoe.converter.source.families.family import ATTENTION, CHOICE_BIAS, DENSE, EXPERTS, MTP, SHARED, Family
from slimoe.offload.model.architecture import Architecture, Score
from slimoe.offload.model.architectures import DEEPSEEK2, MISTRAL4
from slimoe.offload.model.attention_spec import AttentionSpec, LatentSpec, Temperature

_Few = Annotated[int, Meta(ge=0, le=2**16)]


class LatentConfig(DeepseekConfig, frozen=True, kw_only=True):
    """DeepseekV3ForCausalLM."""

    vocab_size: Count = 129280
    hidden_size: Count = 7168
    intermediate_size: Count = 18432
    moe_intermediate_size: Count = 2048
    num_hidden_layers: SmallCount = 61
    num_attention_heads: SmallCount = 128
    num_key_value_heads: SmallCount | None = 128
    max_position_embeddings: Count = 4096
    n_routed_experts: SmallCount = 256
    n_shared_experts: _Few = 1
    num_experts_per_tok: SmallCount = 8
    n_group: SmallCount | None = 8
    topk_group: SmallCount | None = 4
    first_k_dense_replace: _Few = 3
    norm_topk_prob: bool = True
    routed_scaling_factor: Positive = 2.5
    kv_lora_rank: SmallCount = 512
    q_lora_rank: SmallCount | None = 1536
    qk_rope_head_dim: SmallCount = 64
    qk_nope_head_dim: SmallCount = 128
    v_head_dim: SmallCount = 128
    rope_interleave: bool = True
    num_nextn_predict_layers: _Few = 1

    @property
    def n_layer_nextn(self) -> int:
        """Blocks behind the layers that predict further tokens."""
        return self.num_nextn_predict_layers

    @property
    def n_rot(self) -> int | None:
        """The values of a head that rotate."""
        return self.qk_rope_head_dim

    @property
    def attention(self) -> AttentionSpec:
        """The sizes of latent attention, which is absorbed: all heads share one row of keys."""
        n_embd_head_k = self.qk_nope_head_dim + self.qk_rope_head_dim
        latent = LatentSpec(self.q_lora_rank or 0, self.kv_lora_rank, n_embd_head_k, self.v_head_dim)
        n_key = self.kv_lora_rank + self.qk_rope_head_dim
        return AttentionSpec(self.num_attention_heads, 1, n_key, self.kv_lora_rank, latent)

    def unsupported(self, architecture: Architecture) -> str | None:
        """A sentence about the first setting that a GGUF file of this architecture cannot express; None without any."""
        if self.attention_bias:
            return f"attention_bias is true; biases of attention are not read for {architecture.models}."
        if not self.rope_interleave:
            return "rope_interleave is false; only neighbours that rotate together are supported."
        if self.n_head_kv != self.num_attention_heads:
            what = f"num_key_value_heads is {self.n_head_kv}, and num_attention_heads {self.num_attention_heads}"
            return f"{what}; with latent attention both are the same."
        return super().unsupported(architecture)


class DeepseekV2Config(LatentConfig, frozen=True, kw_only=True):
    """DeepseekV2ForCausalLM, whose router has probabilities and no bias."""

    vocab_size: Count = 102400
    hidden_size: Count = 4096
    intermediate_size: Count = 11008
    moe_intermediate_size: Count = 1407
    num_hidden_layers: SmallCount = 32
    num_attention_heads: SmallCount = 32
    num_key_value_heads: SmallCount | None = None
    max_position_embeddings: Count = 2048
    n_routed_experts: SmallCount = 64
    n_shared_experts: _Few = 2
    num_experts_per_tok: SmallCount
    n_group: SmallCount | None = None
    topk_group: SmallCount | None = None
    topk_method: str | None = "greedy"
    first_k_dense_replace: _Few = 0
    norm_topk_prob: bool = False
    routed_scaling_factor: Positive = 1.0
    num_nextn_predict_layers: _Few = 0

    @property
    def score(self) -> Score:
        """What a router's logits become."""
        return "softmax"

    def unsupported(self, architecture: Architecture) -> str | None:
        """A sentence about the first setting that a GGUF file of this architecture cannot express; None without any."""
        if self.topk_method != "greedy" and (self.n_group or 1) > 1:
            what = f"topk_method is {self.topk_method!r:.100}, which chooses groups by the best expert of each"
            return f"{what}; in {architecture.name} files the two best decide."
        return super().unsupported(architecture)


class Glm4MoeLiteConfig(LatentConfig, frozen=True, kw_only=True):
    """Glm4MoeLiteForCausalLM."""

    vocab_size: Count = 154880
    hidden_size: Count = 2048
    intermediate_size: Count = 10240
    moe_intermediate_size: Count = 1536
    num_hidden_layers: SmallCount = 47
    num_attention_heads: SmallCount = 20
    num_key_value_heads: SmallCount | None = 20
    max_position_embeddings: Count = 202752
    rms_norm_eps: Positive = 1e-5
    n_routed_experts: SmallCount = 64
    num_experts_per_tok: SmallCount = 4
    n_group: SmallCount | None = 1
    topk_group: SmallCount | None = 1
    first_k_dense_replace: _Few = 1
    routed_scaling_factor: Positive = 1.8
    q_lora_rank: SmallCount | None = 768
    qk_nope_head_dim: SmallCount = 192
    v_head_dim: SmallCount = 256
    mlp_layer_types: list[str] | None = None

    @property
    def n_dense(self) -> int:
        """The layers without experts, which come first."""
        return 1 if self.mlp_layer_types is None else self.mlp_layer_types.count("dense")

    def unsupported(self, architecture: Architecture) -> str | None:
        """A sentence about the first setting that a GGUF file of this architecture cannot express; None without any."""
        n_routed = self.num_hidden_layers - self.n_dense
        if self.mlp_layer_types not in (None, ["dense"] * self.n_dense + ["sparse"] * n_routed):
            return "mlp_layer_types has not the dense layers first, and then those with experts, for all layers."
        return super().unsupported(architecture)


_YARN = RopeFields(
    rope_type="yarn",
    factor=128.0,
    original_max_position_embeddings=8192,
    beta_fast=32.0,
    beta_slow=1.0,
    mscale=1.0,
    mscale_all_dim=1.0,
    llama_4_scaling_beta=0.1,
)


class Mistral4Config(LatentConfig, frozen=True, kw_only=True):
    """Mistral4ForCausalLM, whose queries grow with their position."""

    vocab_size: Count = 131072
    hidden_size: Count = 4096
    intermediate_size: Count = 12288
    num_hidden_layers: SmallCount = 36
    num_attention_heads: SmallCount = 32
    num_key_value_heads: SmallCount | None = 32
    max_position_embeddings: Count = 1048576
    n_routed_experts: SmallCount = 128
    num_experts_per_tok: SmallCount = 4
    n_group: SmallCount | None = 1
    topk_group: SmallCount | None = 1
    first_k_dense_replace: _Few = 0
    routed_scaling_factor: Positive = 1.0
    kv_lora_rank: SmallCount = 256
    q_lora_rank: SmallCount | None = 1024
    qk_nope_head_dim: SmallCount = 64
    num_nextn_predict_layers: _Few = 0

    @property
    def score(self) -> Score:
        """What a router's logits become."""
        return "softmax"

    @property
    def rope(self) -> RopeFields:
        """The rotation's fields."""
        return self.rope_scaling or self.rope_parameters or _YARN

    @property
    def attention(self) -> AttentionSpec:
        """The sizes of latent attention, and the temperature of queries."""
        beta, length = self.rope.llama_4_scaling_beta, self.rope.original_max_position_embeddings
        plain = super().attention
        if not beta or isinstance(length, UnsetType):
            return plain
        return replace(plain, temperature=Temperature(beta, length))

    def unsupported(self, architecture: Architecture) -> str | None:
        """A sentence about the first setting that a GGUF file of this architecture cannot express; None without any."""
        rope = self.rope
        if rope.llama_4_scaling_beta is None or isinstance(rope.original_max_position_embeddings, UnsetType):
            return "llama_4_scaling_beta or original_max_position_embeddings is missing in rope_parameters."
        if rope.mscale_all_dim not in (None, 0.0, 1.0):
            what = f"mscale_all_dim is {rope.mscale_all_dim:g}"
            return f"{what}, but the magnitude of what rotates in {architecture.name} files is that of 1."
        return super().unsupported(architecture)


_NAMES = (
    ATTENTION
    | DENSE
    | EXPERTS
    | SHARED
    | CHOICE_BIAS
    | {
        "self_attn.q_a_proj": "attn_q_a",
        "self_attn.q_a_layernorm": "attn_q_a_norm",
        "self_attn.q_b_proj": "attn_q_b",
        "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
        "self_attn.kv_a_layernorm": "attn_kv_a_norm",
        "self_attn.kv_b_proj": "attn_kv_b",
    }
)
_V2_IDS, _V3_IDS = {"bos": 1, "eos": 2}, {"bos": 0, "eos": 1}

FAMILIES = {
    "DeepseekV2ForCausalLM": Family(
        "deepseek_v2", DeepseekV2Config, DEEPSEEK2, _NAMES, _V2_IDS, rotates_neighbours=True
    ),
    "DeepseekV3ForCausalLM": Family(
        "deepseek_v3", LatentConfig, DEEPSEEK2, _NAMES | MTP, _V3_IDS, rotates_neighbours=True
    ),
    "Glm4MoeLiteForCausalLM": Family(
        "glm4_moe_lite", Glm4MoeLiteConfig, DEEPSEEK2, _NAMES | MTP, _V3_IDS, rotates_neighbours=True
    ),
    "Mistral4ForCausalLM": Family("mistral4", Mistral4Config, MISTRAL4, _NAMES, _V2_IDS, rotates_neighbours=True),
}
"""The families by the name of their model class."""
