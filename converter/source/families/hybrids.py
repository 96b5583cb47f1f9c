"""Models of whose layers most have a recurrence: LFM2 and LFM2.5 MoE with short convolutions, and Nemotron 3.

Of the latter each layer is one part: Mamba-2, attention, or experts without a gate. What Mamba-2 layers of all families
have in common is here as well.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from slimoe.converter.source.families.config import (
    Count,
    DeepseekConfig,
    Positive,
    RoutedConfig,
    SmallCount,
    dense_first,
)
from slimoe.converter.source.families.family import ATTENTION, Change, Family
from slimoe.converter.source.families.qwen_next import decay, squeezed
from slimoe.converter.source.picked_rows import folded
from slimoe.converter.source.stored_rows import StoredMatrix
from slimoe.offload.model.architecture import Architecture
from slimoe.offload.model.architectures import LFM2MOE, NEMOTRON_H_MOE
from slimoe.offload.model.expert_spec import ExpertSpec, LayerShape
from slimoe.offload.model.recurrent_spec import RecurrentSpec

_LFM_KINDS = ("conv", "full_attention")


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
        are_recurrent = tuple(kind == _LFM_KINDS[0] for kind in self.kinds)
        return RecurrentSpec("short_conv", are_recurrent, self.conv_L_cache, self.hidden_size)

    def unsupported(self, architecture: Architecture) -> str | None:
        """A sentence about the first setting that a GGUF file of this architecture cannot express; None without any."""
        if len(self.kinds) != self.num_hidden_layers or not set(self.kinds) <= set(_LFM_KINDS):
            return f"layer_types has not one of {' and '.join(_LFM_KINDS)} for each of {self.num_hidden_layers} layers."
        if _LFM_KINDS[1] not in self.kinds:
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


_LFM_EXPERTS = {
    "feed_forward.experts.gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"),
    "feed_forward.experts.down_proj": ("ffn_down_exps",),
}
_LFM_NAMES = {name: role for name, role in ATTENTION.items() if name.startswith("self_attn.")} | {
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


@dataclass(frozen=True, slots=True)
class MambaSizes:
    """The sizes of Mamba-2 layers, `n_head` heads of `n_embd_head` values in `n_group` groups."""

    n_head: int
    n_embd_head: int
    n_group: int
    n_state: int
    n_conv: int

    def spec(self, layers: tuple[bool, ...]) -> RecurrentSpec:
        """The same, of these layers."""
        n_inner = self.n_head * self.n_embd_head
        sizes = n_inner + 2 * self.n_group * self.n_state, self.n_state, self.n_group, self.n_head, n_inner
        return RecurrentSpec("mamba2", layers, self.n_conv, *sizes)

    @property
    def problem(self) -> str | None:
        """What is wrong with them, a sentence."""
        if self.n_head % self.n_group:
            return f"{self.n_head} heads of Mamba-2 layers do not divide into {self.n_group} groups."
        return None


class NoNumber(msgspec.Struct, frozen=True, rename={"name": "__float__"}):
    """What JSON has no word for, as transformers spells it."""

    name: Literal["Infinity", "-Infinity", "NaN"]


StepLimit = tuple[float | NoNumber, float | NoNumber]
"""The least and the largest step of Mamba-2 layers, `time_step_limit`."""


def limit_problem(limit: StepLimit | None, architecture: Architecture) -> str | None:
    """What is wrong with limits of steps, a sentence: GGUF files have none, which is null or from 0 to infinity."""
    if limit is None or limit == (0.0, NoNumber("Infinity")):
        return None
    least, largest = (one.name if isinstance(one, NoNumber) else f"{one:g}" for one in limit)
    what = f"time_step_limit is {least} to {largest}"
    return f"{what}, but steps of Mamba-2 layers in {architecture.name} files have no limits."


def _column(stored: StoredMatrix, of: RecurrentSpec) -> StoredMatrix:
    """A value of each head in a row of its own."""
    return folded(stored, of.n_rank)


MAMBA_NAMES = {
    "in_proj": "ssm_in",
    "conv1d": "ssm_conv1d",
    "dt_bias": "ssm_dt.bias",
    "A_log": "ssm_a",
    "D": "ssm_d",
    "norm": "ssm_norm",
    "out_proj": "ssm_out",
}
"""The names of a mixer's tensors, behind that of the mixer."""
MAMBA_CHANGES: Mapping[str, Change] = {
    "ssm_conv1d.weight": squeezed,
    "ssm_a": lambda stored, of: _column(decay(stored, of), of),
    "ssm_d": _column,
    "ssm_norm.weight": lambda stored, of: folded(stored, of.n_group),
}
"""What makes GGUF tensors of them."""

_MAMBA, _ATTENTION, _EXPERTS = "linear_attention", "full_attention", "moe"
_KINDS = (_MAMBA, _ATTENTION, _EXPERTS)
_LETTERS = {"M": _MAMBA, "*": _ATTENTION, "E": _EXPERTS, "-": "mlp"}
"""The parts by the letters of `hybrid_override_pattern`, which older files have in place of a list."""
_OLDER = {"mamba": _MAMBA, "attention": _ATTENTION}
"""Older words for the parts."""
_OLDER_NAMES = {
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_conv_bias": "use_conv_bias",
    "mamba_dt_min": "time_step_min",
}
"""Older names of settings, which count before the others as in transformers' class."""


class NemotronHConfig(DeepseekConfig, frozen=True, kw_only=True, rename={"rms_norm_eps": "layer_norm_epsilon"}):
    """NemotronHForCausalLM; `layer_types` is another name of `layers_block_type`, and of some there are older ones."""

    vocab_size: Count = 131072
    hidden_size: Count = 4096
    intermediate_size: Count = 21504
    head_dim: SmallCount | None = 128
    max_position_embeddings: Count = 4096
    rms_norm_eps: Positive = 1e-5
    layers_block_type: list[str] | None = None
    layer_types: list[str] | None = None
    hybrid_override_pattern: str | None = None
    moe_intermediate_size: Count = 7688
    moe_shared_expert_intermediate_size: Count = 7688
    moe_latent_size: Count | None = None
    n_routed_experts: SmallCount = 8
    n_shared_experts: Annotated[int, Meta(ge=0, le=2**16)] = 1
    num_experts_per_tok: SmallCount = 2
    norm_topk_prob: bool = True
    mlp_hidden_act: str = "relu2"
    mamba_hidden_act: str = "silu"
    mamba_num_heads: SmallCount = 128
    mamba_head_dim: SmallCount = 64
    n_groups: SmallCount = 8
    ssm_state_size: SmallCount = 128
    conv_kernel: Annotated[int, Meta(ge=2, le=2**16)] = 4
    use_conv_bias: bool = True
    mamba_proj_bias: bool = False
    use_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    time_step_min: Annotated[float, Meta(ge=0, le=3e38)] = 0.001
    mamba_n_groups: SmallCount | UnsetType = UNSET
    mamba_d_conv: Annotated[int, Meta(ge=2, le=2**16)] | UnsetType = UNSET
    mamba_conv_bias: bool | UnsetType = UNSET
    mamba_dt_min: Annotated[float, Meta(ge=0, le=3e38)] | UnsetType = UNSET

    def __post_init__(self) -> None:
        for older, name in _OLDER_NAMES.items():
            if not isinstance(value := getattr(self, older), UnsetType):
                msgspec.structs.force_setattr(self, name, value)
        msgspec.structs.force_setattr(self, "num_hidden_layers", len(self.kinds))
        # transformers' class has an output matrix of its own whatever the field says.
        msgspec.structs.force_setattr(self, "tie_word_embeddings", False)

    @property
    def notes(self) -> tuple[str, ...]:
        """What transformers' class does with steps, as it does in no other implementation and not for single tokens."""
        if not self.time_step_min:
            return ()
        what = (
            f"Reading a prompt, transformers raises steps of Mamba-2 layers to {self.time_step_min:g} (time_step_min)"
        )
        return (f"{what} where they are smaller; slimoe and llama.cpp take them as they are.",)

    @property
    def kinds(self) -> Sequence[str]:
        """The part that each layer is."""
        listed = self.layers_block_type or self.layer_types
        if listed is None:
            return [_LETTERS.get(letter, letter) for letter in self.hybrid_override_pattern or ""]
        return [_OLDER.get(kind, kind) for kind in listed]

    @property
    def experts(self) -> ExpertSpec:
        """The experts, their router, and the layers' shapes."""
        routed, other = LayerShape(self.n_expert, self.n_ff, False), LayerShape(0, 0)
        layers = tuple(routed if kind == _EXPERTS else other for kind in self.kinds)
        n_ff_shared = self.moe_shared_expert_intermediate_size
        n_latent = self.moe_latent_size or 0
        return replace(super().experts, layers=layers, score=None, n_ff_shared=n_ff_shared, n_latent=n_latent)

    @property
    def _mamba(self) -> MambaSizes:
        heads = self.mamba_num_heads, self.mamba_head_dim
        return MambaSizes(*heads, self.n_groups, self.ssm_state_size, self.conv_kernel)

    @property
    def recurrent(self) -> RecurrentSpec | None:
        """The sizes of Mamba-2 layers."""
        return self._mamba.spec(tuple(kind == _MAMBA for kind in self.kinds))

    @property
    def n_rot(self) -> int | None:
        """None of a head's values rotate."""
        return 0

    @property
    def biased(self) -> tuple[str, ...]:
        """The modules of a layer whose matrices have biases."""
        return ("mixer.conv1d",)

    def unsupported(self, architecture: Architecture) -> str | None:
        """A sentence about the first setting that a GGUF file of this architecture cannot express; None without any."""
        unknown = next((kind for kind in self.kinds if kind not in _KINDS), None)
        if unknown is not None:
            return (
                f"layers_block_type has {unknown!r:.100}; layers of {architecture.name} files are {', '.join(_KINDS)}."
            )
        missing = next((kind for kind in _KINDS if kind not in self.kinds), None)
        if missing is not None:
            return f"no layer is {missing}."
        acts = {"mlp_hidden_act": (self.mlp_hidden_act, "relu2"), "mamba_hidden_act": (self.mamba_hidden_act, "silu")}
        for name, (found, known) in acts.items():
            if found != known:
                return f"{name} is {found!r:.100}, but {architecture.name} files have {known}."
        biases = ("mamba_proj_bias", "use_bias", "mlp_bias", "attention_bias")
        if (biased := next((name for name in biases if getattr(self, name)), None)) is not None:
            return f"{biased} is true, but matrices of {architecture.name} files have no biases."
        if not self.use_conv_bias:
            return f"use_conv_bias is false, but convolutions of {architecture.name} files have biases."
        if self.sliding_window is not None:
            what = f"sliding_window is {self.sliding_window}"
            return f"{what}, but attention of {architecture.name} files sees all tokens before."
        return self._mamba.problem or super().unsupported(architecture)


_NAMES = {f"mixer.{name}": role for name, role in MAMBA_NAMES.items()} | {
    "norm": "attn_norm",
    "mixer.q_proj": "attn_q",
    "mixer.k_proj": "attn_k",
    "mixer.v_proj": "attn_v",
    "mixer.o_proj": "attn_output",
    "mixer.gate": "ffn_gate_inp",
    "mixer.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mixer.fc1_latent_proj": "ffn_latent_down",
    "mixer.fc2_latent_proj": "ffn_latent_up",
    "mixer.experts.*.up_proj": "ffn_up_exps",
    "mixer.experts.*.down_proj": "ffn_down_exps",
    "mixer.shared_experts.up_proj": "ffn_up_shexp",
    "mixer.shared_experts.down_proj": "ffn_down_shexp",
}
FAMILIES = {
    "Lfm2MoeForCausalLM": Family(
        "lfm2_moe",
        Lfm2MoeConfig,
        LFM2MOE,
        _LFM_NAMES,
        {"bos": 1, "eos": 2},
        joined=_LFM_EXPERTS,
        changes={"shortconv.conv.weight": squeezed},
    ),
    "NemotronHForCausalLM": Family(
        "nemotron_h",
        NemotronHConfig,
        NEMOTRON_H_MOE,
        _NAMES,
        {"bos": 1, "eos": 2},
        joined={"mixer.experts.up_proj": ("ffn_up_exps",), "mixer.experts.down_proj": ("ffn_down_exps",)},
        skipped=("mtp.",),
        changes=MAMBA_CHANGES,
        prefix="backbone.",
    ),
}
"""The families by the name of their model class."""
