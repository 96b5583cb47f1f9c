"""MiniMax-M2: settings, and names of tensors. Apart: as each family is, and a new one will be."""

from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from slimoe.converter.source.families.config import Count, ModelConfig, Positive, RopeFields, SmallCount
from slimoe.converter.source.families.family import ATTENTION, QK_NORMS, Family
from slimoe.offload.model.architectures import MINIMAX_M2
from slimoe.offload.model.expert_spec import ExpertSpec


class MiniMaxM2Config(ModelConfig, frozen=True, kw_only=True):
    """MiniMaxM2ForCausalLM; `rotary_dim` is the older word for `partial_rotary_factor` times `head_dim`."""

    vocab_size: Count = 200064
    hidden_size: Count = 3072
    intermediate_size: Count = 1536
    num_hidden_layers: SmallCount = 62
    num_attention_heads: SmallCount = 48
    head_dim: SmallCount | None = 128
    max_position_embeddings: Count = 196608
    rope_theta: Positive = 5e6
    rotary_dim: SmallCount | None = None
    num_experts_per_tok: SmallCount = 8
    num_local_experts: SmallCount = 256
    num_experts: SmallCount | UnsetType = UNSET

    @property
    def n_expert(self) -> int:
        """Experts per layer."""
        return self.num_local_experts if isinstance(self.num_experts, UnsetType) else self.num_experts

    @property
    def n_expert_used(self) -> int:
        """Experts per token."""
        return self.num_experts_per_tok

    @property
    def experts(self) -> ExpertSpec:
        """The experts and their router."""
        return ExpertSpec(self.n_expert, self.n_expert_used, score="sigmoid")

    @property
    def rope(self) -> RopeFields:
        """The rotation's fields, and how much of a head it is that rotates."""
        fields = super().rope
        if self.rotary_dim is None or not isinstance(fields.partial_rotary_factor, UnsetType):
            return fields
        return replace(fields, partial_rotary_factor=self.rotary_dim / self.n_embd_head)


_EXPERTS = {
    "gate": "ffn_gate_inp",
    "e_score_correction_bias": "exp_probs_b.bias",
    "experts.*.w1": "ffn_gate_exps",
    "experts.*.w2": "ffn_down_exps",
    "experts.*.w3": "ffn_up_exps",
}
# transformers 5 calls the part `mlp` in memory, and `block_sparse_moe` on disk.
_PARTS = {f"{part}.{name}": _EXPERTS[name] for part in ("mlp", "block_sparse_moe") for name in _EXPERTS}
_NAMES = ATTENTION | QK_NORMS | _PARTS
FAMILIES = {
    "MiniMaxM2ForCausalLM": Family("minimax_m2", MiniMaxM2Config, MINIMAX_M2, _NAMES, {"bos": 200034, "eos": 200020})
}
"""The families by the name of their model class."""
