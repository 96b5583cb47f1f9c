"""Granite MoE, with and without a shared expert, and Granite 4 H, of whose layers most are Mamba-2."""

from collections.abc import Sequence
from typing import Annotated, Literal

from msgspec import Meta

from slimoe.converter.source.families.config import Count, CountOrZero, ModelConfig, Positive, SmallCount
from slimoe.converter.source.families.family import ATTENTION, STACKED, Family
from slimoe.converter.source.families.hybrids import (
    MAMBA_CHANGES,
    MAMBA_NAMES,
    MambaSizes,
    StepLimit,
    limit_problem,
)
from slimoe.offload.model.architecture import Architecture
from slimoe.offload.model.architectures import GRANITEHYBRID, GRANITEMOE
from slimoe.offload.model.expert_spec import ExpertSpec
from slimoe.offload.model.recurrent_spec import RecurrentSpec
from slimoe.offload.model.spec import Multipliers

_KINDS = {"mamba": True, "linear_attention": True, "attention": False, "full_attention": False}
"""What mixes tokens in a layer, by the words of older and newer files: whether it is Mamba-2."""


class GraniteMoeConfig(ModelConfig, frozen=True, kw_only=True):
    """GraniteMoeForCausalLM."""

    intermediate_size: Count = 11008
    num_key_value_heads: SmallCount | None = None
    max_position_embeddings: Count = 2048
    attention_bias: bool = False
    embedding_multiplier: Positive = 1.0
    logits_scaling: Positive = 1.0
    residual_multiplier: Positive = 1.0
    attention_multiplier: Positive = 1.0
    num_local_experts: SmallCount = 8
    num_experts_per_tok: SmallCount = 2

    @property
    def n_expert(self) -> int:
        """Experts per layer."""
        return self.num_local_experts

    @property
    def n_expert_used(self) -> int:
        """Experts per token."""
        return self.num_experts_per_tok

    @property
    def multipliers(self) -> Multipliers:
        """The constant factors of the model; logits are divided by theirs."""
        logits = 1.0 / self.logits_scaling
        return Multipliers(self.embedding_multiplier, self.residual_multiplier, self.attention_multiplier, logits)

    def unsupported(self, architecture: Architecture) -> str | None:
        """A sentence about the first setting that a GGUF file of this architecture cannot express; None without any."""
        if self.attention_bias:
            return f"attention_bias is true; biases of attention are not read for {architecture.models}."
        return super().unsupported(architecture)


class GraniteMoeSharedConfig(GraniteMoeConfig, frozen=True, kw_only=True):
    """GraniteMoeSharedForCausalLM, which has a shared expert unless its width is 0."""

    shared_intermediate_size: CountOrZero = 0

    @property
    def experts(self) -> ExpertSpec:
        """The experts, and the shared one."""
        return ExpertSpec(self.n_expert, self.n_expert_used, n_ff_shared=self.shared_intermediate_size)


class GraniteMoeHybridConfig(GraniteMoeSharedConfig, frozen=True, kw_only=True):
    """GraniteMoeHybridForCausalLM; `layers_block_type` is another name of `layer_types`."""

    shared_intermediate_size: CountOrZero = 1024
    position_embedding_type: str | None = None
    layer_types: list[str] | None = None
    layers_block_type: list[str] | None = None
    mamba_n_heads: SmallCount = 128
    mamba_n_groups: SmallCount = 1
    mamba_d_state: SmallCount = 256
    mamba_d_head: SmallCount | Literal["auto"] = "auto"
    mamba_d_conv: Annotated[int, Meta(ge=2, le=2**16)] = 4
    mamba_expand: SmallCount = 2
    mamba_conv_bias: bool = True
    mamba_proj_bias: bool = False
    time_step_limit: StepLimit | None = None

    @property
    def kinds(self) -> Sequence[str]:
        """What mixes tokens in each layer."""
        return self.layer_types or self.layers_block_type or ()

    @property
    def _n_inner(self) -> int:
        return self.mamba_expand * self.hidden_size

    @property
    def _mamba(self) -> MambaSizes:
        width = max(1, self._n_inner // self.mamba_n_heads) if self.mamba_d_head == "auto" else self.mamba_d_head
        return MambaSizes(self.mamba_n_heads, width, self.mamba_n_groups, self.mamba_d_state, self.mamba_d_conv)

    @property
    def recurrent(self) -> RecurrentSpec | None:
        """The sizes of Mamba-2 layers."""
        return self._mamba.spec(tuple(_KINDS.get(kind, False) for kind in self.kinds))

    @property
    def n_rot(self) -> int | None:
        """None of a head's values rotate, unless a file says so."""
        return None if self.position_embedding_type == "rope" else 0

    @property
    def biased(self) -> tuple[str, ...]:
        """The modules of a layer whose matrices have biases."""
        return ("mamba.conv1d",)

    def unsupported(self, architecture: Architecture) -> str | None:
        """A sentence about the first setting that a GGUF file of this architecture cannot express; None without any."""
        if len(self.kinds) != self.num_hidden_layers or not set(self.kinds) <= _KINDS.keys():
            return f"layer_types has not one of {', '.join(_KINDS)} for each of {self.num_hidden_layers} layers."
        are_recurrent = {_KINDS[kind] for kind in self.kinds}
        if len(are_recurrent) < 2:
            return f"no layer has {'attention' if True in are_recurrent else 'Mamba-2'}."
        if self._mamba.n_head * self._mamba.n_embd_head != self._n_inner:
            what = f"mamba_n_heads is {self.mamba_n_heads} and mamba_d_head {self.mamba_d_head}"
            return f"{what}, but mamba_expand times hidden_size is {self._n_inner}."
        if not self.mamba_conv_bias or self.mamba_proj_bias:
            what = f"mamba_conv_bias is {self.mamba_conv_bias} and mamba_proj_bias {self.mamba_proj_bias}".lower()
            return f"{what}; in {architecture.name} files convolutions have biases, and projections have none."
        limits = limit_problem(self.time_step_limit, architecture)
        return limits or self._mamba.problem or super().unsupported(architecture)


_NAMES = ATTENTION | {
    "block_sparse_moe.router.layer": "ffn_gate_inp",
    "shared_mlp.output_linear": "ffn_down_shexp",
}
_JOINED = STACKED | {
    "block_sparse_moe.input_linear.weight": ("ffn_gate_exps", "ffn_up_exps"),
    "block_sparse_moe.output_linear.weight": ("ffn_down_exps",),
    "shared_mlp.input_linear.weight": ("ffn_gate_shexp", "ffn_up_shexp"),
}
_IDS = {"bos": 1, "eos": 2}

FAMILIES = {
    "GraniteMoeForCausalLM": Family("granitemoe", GraniteMoeConfig, GRANITEMOE, _NAMES, _IDS, _JOINED),
    "GraniteMoeSharedForCausalLM": Family(
        "granitemoeshared", GraniteMoeSharedConfig, GRANITEMOE, _NAMES, _IDS, _JOINED
    ),
    "GraniteMoeHybridForCausalLM": Family(
        "granitemoehybrid",
        GraniteMoeHybridConfig,
        GRANITEHYBRID,
        _NAMES | {f"mamba.{name}": role for name, role in MAMBA_NAMES.items()},
        _IDS,
        _JOINED,
        changes=MAMBA_CHANGES,
    ),
}
"""The families by the name of their model class."""
