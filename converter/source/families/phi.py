"""Phi-3.5-MoE: settings, and names of tensors. Apart: as each family is, and a new one will be.

transformers gives the two selected experts weights of a kind of its own (sparsemixer) and normalises by LayerNorm. The
file is one of llama.cpp's, which does neither: its answers are llama.cpp's.
"""

from slimoe.converter.source.families.config import Count, ModelConfig, Positive, SmallCount
from slimoe.converter.source.families.family import ATTENTION, Family
from slimoe.offload.model.architecture import Architecture
from slimoe.offload.model.architectures import PHIMOE


class PhimoeConfig(ModelConfig, frozen=True, kw_only=True):
    """PhiMoEForCausalLM, which newer versions of transformers call PhimoeForCausalLM."""

    vocab_size: Count = 32064
    intermediate_size: Count = 6400
    rms_norm_eps: Positive = 1e-5
    rope_theta: Positive = 1e6
    sliding_window: Count | None = None
    num_local_experts: SmallCount = 16
    num_experts_per_tok: SmallCount = 2
    attention_bias: bool = False
    lm_head_bias: bool = False

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
        """Tokens that attention looks back at; None for all."""
        return self.sliding_window

    @property
    def biased(self) -> tuple[str, ...]:
        """The modules of a layer whose matrices have biases."""
        return ("self_attn", "input_layernorm", "post_attention_layernorm")

    def unsupported(self, architecture: Architecture) -> str | None:
        """A sentence about the first setting that a GGUF file of this architecture cannot express; None without any."""
        if not (self.attention_bias and self.lm_head_bias):
            return f"attention_bias or lm_head_bias is false, but {architecture.name} files have both biases."
        return super().unsupported(architecture)


_EXPERTS = {
    "gate": "ffn_gate_inp",
    "experts.*.w1": "ffn_gate_exps",
    "experts.*.w2": "ffn_down_exps",
    "experts.*.w3": "ffn_up_exps",
}
# transformers 5 calls the part `mlp` in memory, and `block_sparse_moe` on disk.
_NAMES = ATTENTION | {f"{part}.{name}": _EXPERTS[name] for part in ("mlp", "block_sparse_moe") for name in _EXPERTS}
_PHI = Family("phimoe", PhimoeConfig, PHIMOE, _NAMES, {"bos": 1, "eos": 2})

FAMILIES = {"PhiMoEForCausalLM": _PHI, "PhimoeForCausalLM": _PHI}
"""The families by the name of their model class."""
