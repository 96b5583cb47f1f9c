"""Hunyuan-A13B: settings, and names of tensors. Apart: as each family is, and a new one will be."""

from msgspec import UnsetType

from slimoe.converter.source.families.config import Count, ModelConfig, Positive, RopeFields, SmallCount
from slimoe.converter.source.families.family import ATTENTION, EXPERTS, Family
from slimoe.offload.model.architecture import Architecture
from slimoe.offload.model.architectures import HUNYUAN_MOE
from slimoe.offload.model.expert_spec import ExpertSpec


class HunYuanMoEV1Config(ModelConfig, frozen=True, kw_only=True):
    """HunYuanMoEV1ForCausalLM, whose settings of the experts may be lists with an entry for each layer."""

    vocab_size: Count = 290943
    intermediate_size: Count = 11008
    num_key_value_heads: SmallCount | None = None
    max_position_embeddings: Count = 2048
    rms_norm_eps: Positive = 1e-5
    attention_bias: bool = False
    num_experts: SmallCount | list[SmallCount] = 1
    moe_topk: SmallCount | list[SmallCount] = 1

    @property
    def n_expert(self) -> int:
        """Experts per layer."""
        return self.num_experts if isinstance(self.num_experts, int) else max(self.num_experts, default=0)

    @property
    def n_expert_used(self) -> int:
        """Experts per token."""
        return self.moe_topk if isinstance(self.moe_topk, int) else max(self.moe_topk, default=0)

    @property
    def experts(self) -> ExpertSpec:
        """The experts, and the shared one, which is as wide as one of them."""
        return ExpertSpec(self.n_expert, self.n_expert_used, n_ff_shared=self.intermediate_size)

    @property
    def rope(self) -> RopeFields:
        """The rotation's fields; a scaling by a fixed `alpha` is one of the base alone."""
        fields = super().rope
        kind = fields.type if isinstance(fields.rope_type, UnsetType) else fields.rope_type
        n_rot = self.n_embd_head
        if kind != "dynamic" or not fields.alpha or n_rot < 4:
            return fields
        theta = self.rope_theta if isinstance(fields.rope_theta, UnsetType) else fields.rope_theta
        return RopeFields(rope_theta=theta * fields.alpha ** (n_rot / (n_rot - 2)))

    def unsupported(self, architecture: Architecture) -> str | None:
        """A sentence about the first setting that a GGUF file of this architecture cannot express; None without any."""
        for name, value in (("num_experts", self.num_experts), ("moe_topk", self.moe_topk)):
            if isinstance(value, list) and len(set(value)) != 1:
                return f"{name} differs between layers, which is not supported."
            if isinstance(value, list) and len(value) != self.num_hidden_layers:
                return f"{name} has {len(value)} entries for {self.num_hidden_layers} layers."
        if self.attention_bias:
            return f"attention_bias is true; biases of attention are not read for {architecture.models}."
        return super().unsupported(architecture)


_NAMES = (
    ATTENTION
    | EXPERTS
    | {
        "self_attn.query_layernorm": "attn_q_norm",
        "self_attn.key_layernorm": "attn_k_norm",
        "mlp.gate.wg": "ffn_gate_inp",
        "mlp.shared_mlp.gate_proj": "ffn_gate_shexp",
        "mlp.shared_mlp.up_proj": "ffn_up_shexp",
        "mlp.shared_mlp.down_proj": "ffn_down_shexp",
    }
)
FAMILIES = {
    "HunYuanMoEV1ForCausalLM": Family(
        "hunyuan_v1_moe", HunYuanMoEV1Config, HUNYUAN_MOE, _NAMES, {"bos": 1, "eos": 2, "pad": 0}
    )
}
"""The families by the name of their model class."""
