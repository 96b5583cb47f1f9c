"""Qwen3-Next, and Qwen3.5 and 3.6 MoE, of whose layers most have a gated delta net: settings, and names of tensors.

Of a checkpoint with a part for images the language model is read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta

from slimoe.converter.source.families.config import Count, CountOrZero, NestedConfig, RoutedConfig, SmallCount
from slimoe.converter.source.families.family import ATTENTION, EXPERTS, MTP, QK_NORMS, Change, Family
from slimoe.converter.source.families.qwen import SHARED, shared_problem
from slimoe.converter.source.picked_rows import ChangedRows, Order, Values, picked_columns, picked_rows
from slimoe.converter.source.stored_rows import StoredMatrix
from slimoe.offload.errors import ModelFileError
from slimoe.offload.model.architecture import Architecture
from slimoe.offload.model.architectures import QWEN3NEXT, QWEN35MOE
from slimoe.offload.model.attention_spec import AttentionSpec
from slimoe.offload.model.expert_spec import ExpertSpec
from slimoe.offload.model.recurrent_spec import RecurrentSpec

_KINDS = ("linear_attention", "full_attention")
_SECTIONS = (11, 11, 10)
"""How many pairs turn by place in time, row and column, where a checkpoint does not say."""


class DeltaNetConfig(RoutedConfig, frozen=True, kw_only=True):
    """The fields that both classes have, with the defaults of Qwen3NextForCausalLM."""

    vocab_size: Count = 151936
    hidden_size: Count = 2048
    intermediate_size: Count = 5632
    num_hidden_layers: SmallCount = 48
    num_attention_heads: SmallCount = 16
    num_key_value_heads: SmallCount | None = 2
    head_dim: SmallCount | None = 256
    max_position_embeddings: Count = 32768
    partial_rotary_factor: float | None = 0.25
    moe_intermediate_size: Count = 512
    shared_expert_intermediate_size: CountOrZero = 512
    num_experts: SmallCount = 512
    num_experts_per_tok: SmallCount = 10
    norm_topk_prob: bool = True
    layer_types: list[str] | None = None
    full_attention_interval: SmallCount = 4
    linear_conv_kernel_dim: Annotated[int, Meta(ge=2, le=2**16)] = 4
    linear_key_head_dim: SmallCount = 128
    linear_value_head_dim: SmallCount = 128
    linear_num_key_heads: SmallCount = 16
    linear_num_value_heads: SmallCount = 32

    @property
    def n_ff(self) -> int:
        """The width of one expert."""
        return self.moe_intermediate_size

    @property
    def experts(self) -> ExpertSpec:
        """The experts, and the shared one."""
        return ExpertSpec(self.n_expert, self.n_expert_used, n_ff_shared=self.shared_expert_intermediate_size)

    @property
    def attention(self) -> AttentionSpec:
        """The sizes of attention, whose queries bring a gate of the output along."""
        return replace(super().attention, is_gated=True)

    @property
    def kinds(self) -> Sequence[str]:
        """What mixes tokens in each layer."""
        if self.layer_types is not None:
            return self.layer_types
        return [_KINDS[(layer + 1) % self.full_attention_interval == 0] for layer in range(self.num_hidden_layers)]

    @property
    def recurrent(self) -> RecurrentSpec:
        """The sizes of delta nets."""
        n_state, n_group, n_rank = self.linear_key_head_dim, self.linear_num_key_heads, self.linear_num_value_heads
        return RecurrentSpec(
            "delta_net",
            tuple(kind == _KINDS[0] for kind in self.kinds),
            self.linear_conv_kernel_dim,
            n_state * (2 * n_group + n_rank),
            n_state,
            n_group,
            n_rank,
            n_state * n_rank,
        )

    def unsupported(self, architecture: Architecture) -> str | None:
        """A sentence about the first setting that a GGUF file of this architecture cannot express; None without any."""
        if len(self.kinds) != self.num_hidden_layers or not set(self.kinds) <= set(_KINDS):
            return f"layer_types has not one of {' and '.join(_KINDS)} for each of {self.num_hidden_layers} layers."
        if _KINDS[1] not in self.kinds:
            return "no layer has full attention."
        if self.linear_key_head_dim != self.linear_value_head_dim:
            what = f"linear_key_head_dim is {self.linear_key_head_dim} and linear_value_head_dim"
            return f"{what} {self.linear_value_head_dim}, but in {architecture.name} files both are the same."
        if self.linear_num_value_heads % self.linear_num_key_heads:
            what = f"{self.linear_num_value_heads} value heads of linear attention do not divide into groups for"
            return f"{what} {self.linear_num_key_heads} key heads."
        return shared_problem(self.shared_expert_intermediate_size, architecture) or super().unsupported(architecture)


class Qwen3NextConfig(DeltaNetConfig, frozen=True, kw_only=True):
    """Qwen3NextForCausalLM."""

    decoder_sparse_step: SmallCount = 1
    mlp_only_layers: list[int] | None = None

    def unsupported(self, architecture: Architecture) -> str | None:
        """A sentence about the first setting that a GGUF file of this architecture cannot express; None without any."""
        if self.mlp_only_layers or self.decoder_sparse_step != 1:
            what = f"mlp_only_layers is {self.mlp_only_layers} and decoder_sparse_step {self.decoder_sparse_step}"
            return f"{what}; layers without experts are not supported."
        return super().unsupported(architecture)


class Qwen35MoeConfig(DeltaNetConfig, frozen=True, kw_only=True):
    """Qwen3_5MoeForCausalLM."""

    vocab_size: Count = 248320
    num_hidden_layers: SmallCount = 40
    num_experts: SmallCount = 256
    num_experts_per_tok: SmallCount = 8

    @property
    def rope_sections(self) -> tuple[int, ...]:
        """How many pairs turn by a token's place in time, by its row and by its column, and by nothing."""
        return (*(self.rope.mrope_section or _SECTIONS), 0)

    def unsupported(self, architecture: Architecture) -> str | None:
        """A sentence about the first setting that a GGUF file of this architecture cannot express; None without any."""
        sections = self.rope_sections[:3]
        if any(pair >= 3 * sections[pair % 3] for pair in range(sum(sections))):
            return f"mrope_section is {list(sections)}, whose pairs cannot take turns."
        return super().unsupported(architecture)


class Qwen35MoeImageConfig(NestedConfig, frozen=True, kw_only=True):
    """Qwen3_5MoeForConditionalGeneration, whose language model is a Qwen3_5MoeForCausalLM."""

    text_config: Qwen35MoeConfig = Qwen35MoeConfig()

    @property
    def language(self) -> Qwen35MoeConfig:
        """The language model's, whose output is the token table where the whole says so."""
        return msgspec.structs.replace(self.text_config, tie_word_embeddings=self.tie_word_embeddings)


def _raised(stored: StoredMatrix, _: RecurrentSpec) -> StoredMatrix:
    """The weight of a norm, which is stored as what it has beyond 1."""
    return replace(stored, rows=ChangedRows(stored.rows, _add_one))


def _add_one(values: Values) -> Values:
    return values + np.float32(1.0)


def decay(stored: StoredMatrix, _: RecurrentSpec) -> StoredMatrix:
    """The factors of decay, which are stored as the logarithms of their opposites."""
    return replace(stored, rows=ChangedRows(stored.rows, _negative_exponential))


def _negative_exponential(values: Values) -> Values:
    found: Values = -np.exp(values)
    return found


def squeezed(stored: StoredMatrix, _: RecurrentSpec) -> StoredMatrix:
    """The taps of a convolution [n_channels, 1, n_conv] without the dimension of its channels' groups."""
    n_channels, *others = stored.shape
    return replace(stored, shape=(n_channels, others[1])) if len(others) == 2 and others[0] == 1 else stored


def _grouped(stored: StoredMatrix, of: RecurrentSpec, parts: Mapping[str, tuple[int, int]]) -> StoredMatrix:
    """Those `parts` (first row and rows) of every key head's rows, of all heads one after the other."""
    n_each = stored.shape[0] // of.n_group
    n_rows = of.n_channels + of.n_inner
    if stored.shape[0] != n_rows:
        problem = f"tensor {stored.rows.name} has {stored.shape[0]} rows, not the {n_rows} of its heads."
        raise ModelFileError(stored.rows.path, problem, "Download the checkpoint again.")
    heads = n_each * np.arange(of.n_group, dtype=np.int64)[:, None]
    order = [(heads + np.arange(first, first + n)).ravel() for first, n in parts.values()]
    return picked_rows(stored, np.concatenate(order))


def _joined(stored: StoredMatrix, of: RecurrentSpec) -> StoredMatrix:
    """Queries, keys and values of a matrix that has them, and gates of outputs, by key heads."""
    n, n_values = of.n_state, of.n_inner // of.n_group
    return _grouped(stored, of, {"queries": (0, n), "keys": (n, n), "values": (2 * n, n_values)})


def _gates(stored: StoredMatrix, of: RecurrentSpec) -> StoredMatrix:
    """The gates of that matrix."""
    n_values = of.n_inner // of.n_group
    return _grouped(stored, of, {"gates": (2 * of.n_state + n_values, n_values)})


def _tiled(of: RecurrentSpec, n_each: int, n_before: int = 0) -> Order:
    """The places of value heads of `n_each` elements behind `n_before` others, for ggml: first the first of each key
    head, and not first all of the first key head.
    """
    heads = np.arange(of.n_rank, dtype=np.int64).reshape(of.n_group, -1).T.reshape(-1, 1)
    return np.concatenate([np.arange(n_before), n_before + (n_each * heads + np.arange(n_each)).ravel()])


def _tiled_rows(stored: StoredMatrix, order: Order) -> StoredMatrix:
    """The rows in that order; those of another number as they are, to be refused by their shape."""
    return picked_rows(stored, order) if stored.shape[0] == len(order) else stored


def _tiled_columns(stored: StoredMatrix, order: Order) -> StoredMatrix:
    is_whole = stored.shape[-1] == len(order)
    return replace(stored, rows=picked_columns(stored.rows, order)) if is_whole else stored


def _tiled_channels(stored: StoredMatrix, of: RecurrentSpec) -> StoredMatrix:
    return _tiled_rows(squeezed(stored, of), _tiled(of, of.n_state, 2 * of.n_group * of.n_state))


def _tiled_heads(stored: StoredMatrix, of: RecurrentSpec) -> StoredMatrix:
    return _tiled_rows(stored, _tiled(of, 1))


_NORMS: dict[str, Change] = dict.fromkeys(
    (
        f"{name}.weight"
        for name in (
            *("attn_norm", "post_attention_norm", "attn_q_norm", "attn_k_norm", "output_norm"),
            *("nextn.enorm", "nextn.hnorm", "nextn.shared_head_norm"),
        )
    ),
    _raised,
)
_NAMES = (
    ATTENTION
    | QK_NORMS
    | EXPERTS
    | SHARED
    | MTP
    | {
        "post_attention_layernorm": "post_attention_norm",
        "linear_attn.conv1d": "ssm_conv1d",
        "linear_attn.dt_bias": "ssm_dt.bias",
        "linear_attn.A_log": "ssm_a",
        "linear_attn.norm": "ssm_norm",
        "linear_attn.out_proj": "ssm_out",
    }
)
_NEXT = Family(
    "qwen3_next",
    Qwen3NextConfig,
    QWEN3NEXT,
    _NAMES | {"linear_attn.in_proj_ba": "ssm_ba"},
    skipped=("mtp.",),
    changes=_NORMS | {"ssm_a": decay, "ssm_conv1d.weight": squeezed},
    split={"linear_attn.in_proj_qkvz.weight": {"attn_qkv.weight": _joined, "attn_gate.weight": _gates}},
)
_TEXT = Family(
    "qwen3_5_moe_text",
    Qwen35MoeConfig,
    QWEN35MOE,
    _NAMES
    | {
        "linear_attn.in_proj_qkv": "attn_qkv",
        "linear_attn.in_proj_z": "attn_gate",
        "linear_attn.in_proj_a": "ssm_alpha",
        "linear_attn.in_proj_b": "ssm_beta",
    },
    skipped=("mtp.", "model.visual."),
    changes=_NORMS
    | {
        "attn_qkv.weight": lambda stored, of: _tiled_rows(stored, _tiled(of, of.n_state, 2 * of.n_group * of.n_state)),
        "attn_gate.weight": lambda stored, of: _tiled_rows(stored, _tiled(of, of.n_state)),
        "ssm_alpha.weight": _tiled_heads,
        "ssm_beta.weight": _tiled_heads,
        "ssm_conv1d.weight": _tiled_channels,
        "ssm_dt.bias": lambda stored, of: _tiled_columns(stored, _tiled(of, 1)),
        "ssm_a": lambda stored, of: _tiled_columns(decay(stored, of), _tiled(of, 1)),
        "ssm_out.weight": lambda stored, of: _tiled_columns(stored, _tiled(of, of.n_state)),
    },
    # transformers keeps the longer names, too, where it saves the language model of one that reads images.
    prefix="model.language_model.",
)
FAMILIES = {
    "Qwen3NextForCausalLM": _NEXT,
    "Qwen3_5MoeForCausalLM": _TEXT,
    "Qwen3_5MoeForConditionalGeneration": replace(
        _TEXT,
        model_type="qwen3_5_moe",
        nested=Qwen35MoeImageConfig,
    ),
}
"""The families by the name of their model class."""
