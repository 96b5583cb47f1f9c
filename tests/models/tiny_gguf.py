"""Small random GGUF files, written by gguf's own writer: a Mixtral with a real vocabulary, and one of each family."""

import functools
import math
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf.vocab import SentencePieceVocab

from tests.models.gguf_content import Array, StoredTensor, finish, quantise

MIXTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)


N_PIECES = 2048
"""Different pieces of rows in the matrices of a file of `write_family`."""


@dataclass(frozen=True, slots=True)
class TinyShape:
    """Sizes that no real model has, so that nothing can be tuned to them."""

    n_layer: int = 2
    n_embd: int = 64
    n_ff: int = 96
    n_head: int = 4
    n_head_kv: int = 2
    n_expert: int = 6
    n_expert_used: int = 3
    n_ctx: int = 512


def write_tiny_gguf(
    path: Path,
    tokenizer: Path | None,
    template: str | None = MIXTRAL_TEMPLATE,
    shape: TinyShape = TinyShape(),
    added: tuple[str, ...] = (),
) -> Path:
    """Writes the model to `path`; `tokenizer` is a sentencepiece model, without one only token ids go in.

    `added` are further control tokens.
    """
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(shape.n_ctx)
    writer.add_block_count(shape.n_layer)
    writer.add_embedding_length(shape.n_embd)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_expert_count(shape.n_expert)
    writer.add_expert_used_count(shape.n_expert_used)
    n_vocab = 300 if tokenizer is None else add_vocabulary(writer, tokenizer, template, added)
    writer.add_vocab_size(n_vocab)
    rng = np.random.default_rng(1)
    for name, dims in _tensors(shape, n_vocab).items():
        values = rng.standard_normal(dims, dtype=np.float32)
        writer.add_tensor(name, values / 8 + 1 if name.endswith("norm.weight") else values * dims[-1] ** -0.5)
    finish(writer)
    return path


def add_vocabulary(writer: gguf.GGUFWriter, tokenizer: Path, template: str | None, added: tuple[str, ...] = ()) -> int:
    """Adds the tokenizer's keys, with further control tokens, and returns the number of tokens."""
    pieces = [*SentencePieceVocab(tokenizer.parent).all_tokens()]
    pieces += [(name.encode(), 0.0, gguf.TokenType.CONTROL) for name in added]
    tokens, scores, types = zip(*pieces, strict=True)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    if template is not None:
        writer.add_chat_template(template)
    return len(tokens)


def write_vocabulary(path: Path, model: Path, *, added: tuple[str, ...] = (), user: tuple[str, ...] = ()) -> Path:
    """Writes a vocabulary alone, by gguf's own reader of sentencepiece models, for an architecture that nobody knows.

    `added` are further control tokens, `user` those that a user defined.
    """
    tokens, scores, types = [], [], []
    for text, score, kind in SentencePieceVocab(model.parent).all_tokens():
        tokens.append(text)
        scores.append(score)
        types.append(gguf.TokenType.USER_DEFINED if text.decode() in user else kind)
    writer = gguf.GGUFWriter(path, "unheard-of")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*tokens, *added])
    writer.add_token_scores([*scores, *[0.0] * len(added)])
    writer.add_token_types([*types, *[gguf.TokenType.CONTROL] * len(added)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages }}")
    finish(writer)
    return path


def _tensors(shape: TinyShape, n_vocab: int) -> dict[str, tuple[int, ...]]:
    """Shapes in numpy's order, the contiguous axis last."""
    d, n_kv = shape.n_embd, shape.n_embd // shape.n_head * shape.n_head_kv
    tensors: dict[str, tuple[int, ...]] = {"token_embd.weight": (n_vocab, d)}
    for n in range(shape.n_layer):
        layer = {
            "attn_norm": (d,),
            "attn_q": (d, d),
            "attn_k": (n_kv, d),
            "attn_v": (n_kv, d),
            "attn_output": (d, d),
            "ffn_norm": (d,),
            "ffn_gate_inp": (shape.n_expert, d),
            "ffn_gate_exps": (shape.n_expert, shape.n_ff, d),
            "ffn_up_exps": (shape.n_expert, shape.n_ff, d),
            "ffn_down_exps": (shape.n_expert, d, shape.n_ff),
        }
        tensors |= {f"blk.{n}.{name}.weight": dims for name, dims in layer.items()}
    return tensors | {"output_norm.weight": (d,), "output.weight": (n_vocab, d)}


@dataclass(frozen=True, slots=True)
class LatentShape:
    """Sizes of latent attention: ranks of queries (0 for a whole matrix) and of keys and values, a head's values that
    do not rotate, those that do, and its values. Files before April 2025 are not `is_absorbed`.
    """

    n_lora_q: int = 256
    n_lora_kv: int = 256
    n_plain: int = 64
    n_rot: int = 32
    n_value: int = 64
    is_absorbed: bool = True


@dataclass(frozen=True, slots=True)
class Family:
    """What its files have beyond the usual.

    `norm_of` is what its Q and K norms span, `keys` are further ones by name without prefix, `tensors` those of a layer
    with experts, `whole` those of the model, by name with suffix, in numpy's order, as sizes of `FineShape` or numbers.
    """

    norm_of: str = "nothing"
    width_key: str = "feed_forward_length"
    has_output: bool = True
    keys: dict[str, int | float | bool | str | list[int]] = field(default_factory=dict)
    tensors: dict[str, tuple[str | int, ...]] = field(default_factory=dict)
    whole: dict[str, tuple[str | int, ...]] = field(default_factory=dict)
    n_dense: int = 0
    ffn_norm: str = "ffn_norm"
    is_fused: bool = False
    latent: LatentShape | None = None
    arch: str = ""
    recurrent: tuple[int, ...] = ()
    """Layers that have `recurrent_tensors` in place of attention."""
    recurrent_tensors: dict[str, tuple[str | int, ...]] = field(default_factory=dict)
    is_gated: bool = False
    window: "WindowShape | None" = None
    only_experts: tuple[int, ...] = ()
    """Layers of experts alone; if there are any, all others are without a feed-forward part. Experts have no gate."""
    is_merged: bool = False
    """Whether gate and up of the experts are one tensor."""
    n_latent: int = 0
    """What experts read and write of values, between two matrices, where it is not what the residual stream has."""


@dataclass(frozen=True, slots=True)
class WindowShape:
    """Heads of layers with a window, where they are not those of the others: of keys, of how many values, of which so
    many rotate. `layers` have a window; of the others those in `without_values` have no matrix of values.
    """

    layers: tuple[int, ...] = (0, 2)
    without_values: tuple[int, ...] = (1,)
    n_head_kv: int = 4
    n_embd_head: int = 64
    n_rot: int = 64


def _shared(width: int) -> dict[str, tuple[str | int, ...]]:
    return {
        "ffn_gate_shexp.weight": (width, "n_embd"),
        "ffn_up_shexp.weight": (width, "n_embd"),
        "ffn_down_shexp.weight": ("n_embd", width),
    }


_CHOICE: dict[str, tuple[str | int, ...]] = {"exp_probs_b.bias": ("n_expert",)}
_QKV_BIASES: dict[str, tuple[str | int, ...]] = {
    "attn_q.bias": ("n_q",),
    "attn_k.bias": ("n_kv",),
    "attn_v.bias": ("n_kv",),
}
_INDEXER_KEYS: dict[str, int | float | bool | str] = {
    "attention.indexer.head_count": 2,
    "attention.indexer.key_length": 64,
    "attention.indexer.top_k": 256,
}
_INDEXER: dict[str, tuple[str | int, ...]] = {
    "indexer.k_norm.weight": (64,),
    "indexer.k_norm.bias": (64,),
    "indexer.proj.weight": (2, "n_embd"),
    "indexer.attn_k.weight": (64, "n_embd"),
    "indexer.attn_q_b.weight": (128, 256),
}
_DELTA_KEYS: dict[str, int | float | bool | str | list[int]] = {
    "ssm.conv_kernel": 4,
    "ssm.inner_size": 256,
    "ssm.state_size": 64,
    "ssm.time_step_rank": 4,
    "ssm.group_count": 2,
    "rope.dimension_count": 32,
    "expert_shared_feed_forward_length": 256,
}
_DELTA_NET: dict[str, tuple[str | int, ...]] = {
    "attn_qkv.weight": (512, "n_embd"),
    "attn_gate.weight": (256, "n_embd"),
    "ssm_conv1d.weight": (512, 4),
    "ssm_dt.bias": (4,),
    "ssm_a": (4,),
    "ssm_norm.weight": (64,),
    "ssm_out.weight": ("n_embd", 256),
}
_DELTA_NET_INPUT = ("attn_qkv.weight", "attn_gate.weight")


def _mamba2(n_group: int) -> dict[str, tuple[str | int, ...]]:
    return {
        "ssm_in.weight": (1032 + 256 * n_group, "n_embd"),
        "ssm_conv1d.weight": (512 + 256 * n_group, 4),
        "ssm_conv1d.bias": (512 + 256 * n_group,),
        "ssm_dt.bias": (8,),
        "ssm_a": (8, 1),
        "ssm_d": (8, 1),
        "ssm_norm.weight": (n_group, 512 // n_group),
        "ssm_out.weight": ("n_embd", 512),
    }


def _mamba2_keys(n_group: int) -> dict[str, int | float | bool | str | list[int]]:
    return {
        "ssm.conv_kernel": 4,
        "ssm.inner_size": 512,
        "ssm.state_size": 128,
        "ssm.time_step_rank": 8,
        "ssm.group_count": n_group,
    }


_NEMOTRON_KEYS: dict[str, int | float | bool | str | list[int]] = _mamba2_keys(2) | {
    "expert_shared_count": 1,
    "expert_shared_feed_forward_length": 512,
    "expert_weights_norm": True,
    "expert_weights_scale": 2.5,
    "expert_group_count": 1,
    "attention.layer_norm_epsilon": 1e-6,
}
_UNGATED_SHARED = {name: dims for name, dims in _shared(512).items() if "gate" not in name}
_GATED_SHARED: dict[str, tuple[str | int, ...]] = _shared(256) | {"ffn_gate_inp_shexp.weight": ("n_embd",)}
FAMILIES = {
    "llama": Family(),
    "qwen2moe": Family(
        width_key="expert_feed_forward_length",
        keys={"expert_shared_feed_forward_length": 512},
        tensors=_shared(512) | {"ffn_gate_inp_shexp.weight": ("n_embd",)} | _QKV_BIASES,
    ),
    "qwen3moe": Family("head", "expert_feed_forward_length", has_output=False),
    "olmoe": Family("row"),
    "phimoe": Family(
        keys={"rope.scaling.original_context_length": 128, "rope.scaling.attn_factor": 1.19},
        tensors=_QKV_BIASES
        | {"attn_norm.bias": ("n_embd",), "attn_output.bias": ("n_embd",), "ffn_norm.bias": ("n_embd",)},
        whole={
            "output_norm.bias": ("n_embd",),
            "output.bias": ("n_vocab",),
            "rope_factors_short.weight": ("n_rot_pairs",),
            "rope_factors_long.weight": ("n_rot_pairs",),
        },
    ),
    "granitemoe": Family(
        has_output=False,
        keys={
            "expert_shared_feed_forward_length": 512,
            "embedding_scale": 1.5,
            "residual_scale": 0.6,
            "attention.scale": 0.125,
            "logit_scale": 0.75,
        },
        tensors=_shared(512),
    ),
    "granitehybrid": Family(
        has_output=False,
        keys=_mamba2_keys(1)
        | {
            "expert_shared_feed_forward_length": 512,
            "embedding_scale": 1.5,
            "residual_scale": 0.6,
            "attention.scale": 0.125,
            "logit_scale": 0.75,
            "rope.scaling.finetuned": False,
        },
        tensors=_shared(512),
        recurrent=(0, 2),
        recurrent_tensors=_mamba2(1),
    ),
    "dots1": Family(
        "head",
        "expert_feed_forward_length",
        keys={
            "leading_dense_block_count": 1,
            "expert_shared_count": 2,
            "expert_gating_func": 2,
            "expert_weights_norm": True,
            "expert_weights_scale": 2.5,
        },
        tensors=_shared(512) | _CHOICE,
        n_dense=1,
    ),
    "ernie4_5-moe": Family(
        "nothing",
        "expert_feed_forward_length",
        has_output=False,
        keys={
            "leading_dense_block_count": 1,
            "interleave_moe_layer_step": 1,
            "expert_shared_feed_forward_length": 512,
        },
        tensors=_shared(512) | _CHOICE,
        n_dense=1,
    ),
    "hunyuan-moe": Family(
        "head",
        has_output=False,
        keys={"expert_shared_feed_forward_length": 512, "expert_feed_forward_length": 256},
        tensors=_shared(512),
    ),
    "minimax-m2": Family(
        "row",
        keys={"expert_feed_forward_length": 256, "expert_gating_func": 2, "rope.dimension_count": 64},
        tensors=_CHOICE,
    ),
    "glm4moe": Family(
        "head",
        "expert_feed_forward_length",
        keys={
            "leading_dense_block_count": 1,
            "expert_shared_count": 1,
            "expert_weights_norm": True,
            "rope.dimension_count": 64,
        },
        tensors=_shared(256) | _CHOICE | _QKV_BIASES,
        n_dense=1,
        ffn_norm="post_attention_norm",
    ),
    "bailingmoe2": Family(
        "head",
        "expert_feed_forward_length",
        keys={
            "leading_dense_block_count": 1,
            "expert_shared_count": 1,
            "expert_shared_feed_forward_length": 512,
            "expert_gating_func": 2,
            "expert_weights_norm": True,
            "expert_weights_scale": 2.5,
            "expert_group_count": 4,
            "expert_group_used_count": 2,
            "rope.dimension_count": 32,
        },
        tensors=_shared(512) | _CHOICE,
        n_dense=1,
        is_fused=True,
    ),
    "deepseek2": Family(
        "nothing",
        "expert_feed_forward_length",
        keys={
            "leading_dense_block_count": 1,
            "expert_shared_count": 2,
            "expert_gating_func": 2,
            "expert_weights_norm": True,
            "expert_weights_scale": 2.5,
            "expert_group_count": 4,
            "expert_group_used_count": 2,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 40.0,
            "rope.scaling.original_context_length": 64,
            "rope.scaling.yarn_log_multiplier": 0.0707,
        },
        tensors=_shared(512) | _CHOICE,
        n_dense=1,
        latent=LatentShape(),
    ),
    "deepseek2-old": Family(
        "nothing",
        "expert_feed_forward_length",
        has_output=False,
        keys={"leading_dense_block_count": 1, "expert_shared_count": 1, "expert_weights_scale": 16.0},
        tensors=_shared(256),
        n_dense=1,
        latent=LatentShape(is_absorbed=False),
        arch="deepseek2",
    ),
    "deepseek2-lite": Family(
        "nothing",
        "expert_feed_forward_length",
        keys={"leading_dense_block_count": 1, "expert_shared_count": 2},
        tensors=_shared(64),
        n_dense=1,
        latent=LatentShape(n_lora_q=0),
        arch="deepseek2",
    ),
    "glm-dsa": Family(
        "nothing",
        "expert_feed_forward_length",
        keys={"leading_dense_block_count": 1, "expert_shared_count": 2, "expert_weights_norm": True, **_INDEXER_KEYS},
        tensors=_shared(512) | _CHOICE | _INDEXER,
        n_dense=1,
        latent=LatentShape(),
    ),
    "deepseek32": Family(
        "nothing",
        "expert_feed_forward_length",
        keys={
            "expert_shared_count": 1,
            "expert_gating_func": 2,
            "expert_group_count": 4,
            "expert_group_used_count": 2,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 40.0,
            "rope.scaling.original_context_length": 64,
            "rope.scaling.yarn_log_multiplier": 0.1,
            **_INDEXER_KEYS,
        },
        tensors=_shared(256) | _CHOICE | _INDEXER,
        latent=LatentShape(),
    ),
    "mistral4": Family(
        "nothing",
        "expert_feed_forward_length",
        keys={
            "expert_shared_count": 1,
            "expert_weights_norm": True,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 8.0,
            "rope.scaling.original_context_length": 16,
            "rope.scaling.yarn_log_multiplier": 0.05,
            "attention.temperature_scale": 0.5,
            "attention.temperature_length": 16,
        },
        tensors=_shared(256),
        latent=LatentShape(),
    ),
    "gpt-oss": Family(
        width_key="expert_feed_forward_length",
        keys={
            "attention.sliding_window": 8,
            "rope.freq_base_swa": 5e5,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 128,
        },
        tensors=_QKV_BIASES
        | {
            "attn_output.bias": ("n_embd",),
            "attn_sinks.weight": ("n_head",),
            "ffn_gate_inp.bias": ("n_expert",),
            "ffn_gate_exps.bias": ("n_expert", "n_ff"),
            "ffn_up_exps.bias": ("n_expert", "n_ff"),
            "ffn_down_exps.bias": ("n_expert", "n_embd"),
        },
        ffn_norm="post_attention_norm",
    ),
    "qwen3next": Family(
        "head",
        "expert_feed_forward_length",
        keys=_DELTA_KEYS | {"full_attention_interval": 2},
        tensors=_GATED_SHARED,
        ffn_norm="post_attention_norm",
        recurrent=(0, 2),
        recurrent_tensors=_DELTA_NET | {"ssm_ba.weight": (8, "n_embd")},
        is_gated=True,
    ),
    "qwen3next-old": Family(
        "head",
        "expert_feed_forward_length",
        keys=_DELTA_KEYS | {"full_attention_interval": 2},
        tensors=_GATED_SHARED,
        ffn_norm="post_attention_norm",
        recurrent=(0, 2),
        recurrent_tensors={name: dims for name, dims in _DELTA_NET.items() if name not in _DELTA_NET_INPUT}
        | {"ssm_in.weight": (768, "n_embd"), "ssm_ba.weight": (8, "n_embd")},
        is_gated=True,
        arch="qwen3next",
    ),
    "qwen35moe": Family(
        "head",
        "expert_feed_forward_length",
        has_output=False,
        keys=_DELTA_KEYS | {"rope.dimension_sections": [6, 5, 5, 0]},
        tensors=_GATED_SHARED,
        ffn_norm="post_attention_norm",
        recurrent=(0, 2, 3),
        recurrent_tensors=_DELTA_NET | {"ssm_beta.weight": (4, "n_embd"), "ssm_alpha.weight": (4, "n_embd")},
        is_gated=True,
    ),
    "lfm2moe": Family(
        "head",
        "expert_feed_forward_length",
        has_output=False,
        keys={
            "leading_dense_block_count": 1,
            "expert_gating_func": 2,
            "shortconv.l_cache": 3,
        },
        tensors=_CHOICE,
        n_dense=1,
        recurrent=(0, 2),
        recurrent_tensors={
            "shortconv.in_proj.weight": ("n_conv_inputs", "n_embd"),
            "shortconv.conv.weight": ("n_embd", 3),
            "shortconv.out_proj.weight": ("n_embd", "n_embd"),
        },
        whole={"token_embd_norm.weight": ("n_embd",)},
    ),
    "nemotron_h_moe": Family(
        "nothing",
        "expert_feed_forward_length",
        keys=_NEMOTRON_KEYS,
        tensors=_UNGATED_SHARED | _CHOICE,
        recurrent=(0, 3),
        recurrent_tensors=_mamba2(2),
        only_experts=(1, 4),
    ),
    "nemotron_h_moe-latent": Family(
        "nothing",
        "expert_feed_forward_length",
        keys=_NEMOTRON_KEYS | {"moe_latent_size": 96},
        tensors=_UNGATED_SHARED
        | _CHOICE
        | {"ffn_latent_down.weight": (96, "n_embd"), "ffn_latent_up.weight": ("n_embd", 96)},
        arch="nemotron_h_moe",
        recurrent=(0, 3),
        recurrent_tensors=_mamba2(2),
        only_experts=(1, 4),
        n_latent=96,
    ),
    "gemma4": Family(
        "head",
        "expert_feed_forward_length",
        has_output=False,
        keys={
            "attention.sliding_window": 8,
            "rope.freq_base_swa": 1e4,
            "final_logit_softcapping": 5.0,
            "embedding_length_per_layer_input": 0,
            "attention.shared_kv_layers": 0,
        },
        tensors={
            "post_attention_norm.weight": ("n_embd",),
            "ffn_gate.weight": ("n_ff_dense", "n_embd"),
            "ffn_up.weight": ("n_ff_dense", "n_embd"),
            "ffn_down.weight": ("n_embd", "n_ff_dense"),
            "ffn_gate_inp.scale": ("n_embd",),
            "ffn_down_exps.scale": ("n_expert",),
            "pre_ffw_norm_2.weight": ("n_embd",),
            "post_ffw_norm_1.weight": ("n_embd",),
            "post_ffw_norm_2.weight": ("n_embd",),
            "post_ffw_norm.weight": ("n_embd",),
            "layer_output_scale.weight": (1,),
        },
        whole={"rope_freqs.weight": ("n_rot_pairs",)},
        window=WindowShape(),
        is_merged=True,
    ),
}


@dataclass(frozen=True, slots=True)
class FineShape:
    """Many small experts, and heads whose size is not n_embd / n_head."""

    n_layer: int = 3
    n_embd: int = 256
    n_ff: int = 256
    n_head: int = 4
    n_head_kv: int = 2
    n_embd_head: int = 128
    n_expert: int = 32
    n_expert_used: int = 8
    n_vocab: int = 300


def write_family(
    path: Path, name: str, kind: Type = Type.F32, shape: FineShape = FineShape(), *, words: tuple[str, ...] = ()
) -> Path:
    """Writes a model of architecture `name` to `path`, all matrices but routers of type `kind`.

    `words` are the tokens of a byte-level vocabulary, cut as Qwen's; without them only token ids go in.
    """
    family = FAMILIES[name]
    arch = family.arch or name
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(512)
    writer.add_block_count(shape.n_layer)
    writer.add_embedding_length(shape.n_embd)
    if family.only_experts:
        widths = [shape.n_ff if layer in family.only_experts else 0 for layer in range(shape.n_layer)]
        writer.add_feed_forward_length(widths)
    else:
        writer.add_feed_forward_length(shape.n_ff if family.width_key == "feed_forward_length" else 7 * shape.n_ff)
    if family.width_key == "expert_feed_forward_length":
        writer.add_expert_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    if family.latent:
        _add_latent_keys(writer, family.latent, shape.n_head)
    else:
        without = (*family.recurrent, *family.only_experts)
        of_layers = [0 if layer in without else shape.n_head_kv for layer in range(shape.n_layer)]
        if family.window:
            of_layers = _add_window_keys(writer, family.window, shape)
        has_each = family.window or (family.recurrent and not family.is_gated)
        writer.add_head_count_kv(of_layers if has_each else shape.n_head_kv)
        writer.add_key_length(shape.n_embd_head)
        writer.add_value_length(shape.n_embd_head)
    if family.is_gated and "full_attention_interval" not in family.keys:
        are_recurrent = [layer in family.recurrent for layer in range(shape.n_layer)]
        writer.add_array(f"{arch}.attention.recurrent_layers", are_recurrent)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_expert_count(shape.n_expert)
    writer.add_expert_used_count(shape.n_expert_used)
    writer.add_vocab_size(shape.n_vocab)
    for key, value in family.keys.items():
        kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        kinds[list] = writer.add_array
        kinds[type(value)](f"{arch}.{key}", value)
    if words:
        _add_byte_level(writer, words, shape.n_vocab)
    else:
        writer.add_tokenizer_model("none")
    rng = np.random.default_rng(1)
    for tensor, dims in _family_tensors(family, shape).items():
        if tensor == "rope_freqs.weight":
            writer.add_tensor(tensor, np.where(np.arange(dims[0]) < dims[0] // 4, 1.0, 1e30).astype(np.float32))
        elif tensor.endswith(".bias"):
            writer.add_tensor(tensor, rng.standard_normal(dims, dtype=np.float32) / 4)
        elif tensor.endswith("ssm_d"):
            writer.add_tensor(tensor, rng.standard_normal(dims, dtype=np.float32) / 2 + 1)
        elif tensor.endswith("ssm_a"):
            writer.add_tensor(tensor, -np.exp(rng.standard_normal(dims, dtype=np.float32) - 1))
        elif "conv" in tensor and dims[-1] < 8:
            writer.add_tensor(tensor, rng.standard_normal(dims, dtype=np.float32) / 2)
        elif len(dims) == 1 or tensor.endswith("ssm_norm.weight"):
            # Where nothing divides the products of queries and keys, norms keep them small.
            size = 0.25 if family.window and "attn_q_norm" in tensor else 1.0
            writer.add_tensor(tensor, size * (rng.standard_normal(dims, dtype=np.float32) / 8 + 1))
        elif "ffn_gate_inp" in tensor:
            writer.add_tensor(tensor, rng.standard_normal(dims, dtype=np.float32) * 2 * dims[-1] ** -0.5)
        else:
            # As in real files, rows that do not divide into blocks take the type that they do divide into.
            fits = dims[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0
            stored = _random_matrices(rng, dims, kind if fits else Type.Q8_0)
            writer.add_tensor(tensor, stored.data, raw_dtype=stored.type)
    finish(writer)
    return path


def _random_matrices(rng: np.random.Generator, dims: tuple[int, ...], kind: Type) -> StoredTensor:
    """Rows that are drawn, piece by piece, from a few, so that only those few need be quantised.

    Not for routers: two experts with the same row would be equally good.
    """
    width = math.gcd(dims[-1], 256)
    drawn = rng.integers(0, N_PIECES, (*dims[:-1], dims[-1] // width))
    pieces = _pieces(width, dims[-1], kind)
    return StoredTensor(pieces[drawn].reshape(*dims[:-1], -1), kind)


@functools.cache
def _pieces(width: int, n_columns: int, kind: Type) -> Array:
    """Normal values [N_PIECES, width] of rows of `n_columns`, in a type."""
    values = np.random.default_rng(width).standard_normal((N_PIECES, width), dtype=np.float32) * 2 * n_columns**-0.5
    return values if kind is Type.F32 else quantise(values, kind).data


def _add_window_keys(writer: gguf.GGUFWriter, window: WindowShape, shape: FineShape) -> list[int]:
    """Adds the keys of layers with a window; the key heads of all layers."""
    writer.add_sliding_window_pattern([layer in window.layers for layer in range(shape.n_layer)])
    writer.add_key_length_swa(window.n_embd_head)
    writer.add_value_length_swa(window.n_embd_head)
    writer.add_rope_dimension_count(shape.n_embd_head)
    writer.add_rope_dimension_count_swa(window.n_rot)
    return [window.n_head_kv if layer in window.layers else shape.n_head_kv for layer in range(shape.n_layer)]


def _add_latent_keys(writer: gguf.GGUFWriter, latent: LatentShape, n_head: int) -> None:
    writer.add_kv_lora_rank(latent.n_lora_kv)
    writer.add_rope_dimension_count(latent.n_rot)
    if latent.n_lora_q:
        writer.add_q_lora_rank(latent.n_lora_q)
    if latent.is_absorbed:
        writer.add_head_count_kv(1)
        writer.add_key_length(latent.n_lora_kv + latent.n_rot)
        writer.add_value_length(latent.n_lora_kv)
        writer.add_key_length_mla(latent.n_plain + latent.n_rot)
        writer.add_value_length_mla(latent.n_value)
    else:
        writer.add_head_count_kv(n_head)
        writer.add_key_length(latent.n_plain + latent.n_rot)
        writer.add_value_length(latent.n_value)


def _add_byte_level(writer: gguf.GGUFWriter, words: tuple[str, ...], n_vocab: int) -> None:
    """The bytes by their byte-level names, the words, and control tokens; words are merged byte by byte."""
    bytes_ = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256))]
    bytes_ += [chr(256 + n) for n in range(256 - len(bytes_))]
    tokens = [*bytes_, *words]
    control = [f"<|control{n}|>" for n in range(n_vocab - len(tokens))]
    kinds = [gguf.TokenType.NORMAL] * len(tokens) + [gguf.TokenType.CONTROL] * len(control)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([*tokens, *control])
    writer.add_token_types(kinds)
    writer.add_token_merges([f"{word[:-1]} {word[-1]}" for word in words])
    writer.add_eos_token_id(n_vocab - 1)
    writer.add_add_bos_token(False)


def _family_tensors(family: Family, shape: FineShape) -> dict[str, tuple[int, ...]]:
    """Shapes in numpy's order, written out independently of the code under test."""
    d, n_ff = shape.n_embd, shape.n_ff
    n_q, n_kv = shape.n_head * shape.n_embd_head, shape.n_head_kv * shape.n_embd_head
    norms = {"head": (shape.n_embd_head, shape.n_embd_head), "row": (n_q, n_kv)}.get(family.norm_of)
    tensors: dict[str, tuple[int, ...]] = {"token_embd.weight": (shape.n_vocab, d)}
    if "token_embd_norm.weight" not in family.whole:
        tensors["output_norm.weight"] = (d,)
    if family.has_output:
        tensors["output.weight"] = (shape.n_vocab, d)
    sizes = {"n_embd": d, "n_expert": shape.n_expert, "n_q": n_q, "n_kv": n_kv, "n_ff": n_ff, "n_head": shape.n_head}
    sizes |= {"n_vocab": shape.n_vocab, "n_rot_pairs": shape.n_embd_head // 2, "n_conv_inputs": 3 * d}
    sizes["n_ff_dense"] = 7 * n_ff
    extra, whole, recurrent = (
        {name: tuple(sizes[size] if isinstance(size, str) else size for size in dims) for name, dims in named.items()}
        for named in (family.tensors, family.whole, family.recurrent_tensors)
    )
    tensors |= whole
    attention = {
        "attn_norm": (d,),
        "attn_q": (2 * n_q if family.is_gated else n_q, d),
        "attn_k": (n_kv, d),
        "attn_v": (n_kv, d),
        "attn_output": (d, n_q),
        family.ffn_norm: (d,),
    }
    if family.is_fused:
        attention = {name: dims for name, dims in attention.items() if name not in ("attn_q", "attn_k", "attn_v")}
        attention["attn_qkv"] = (n_q + 2 * n_kv, d)
    if family.latent:
        attention = {"attn_norm": (d,), family.ffn_norm: (d,)} | _latent_tensors(family.latent, shape)
    if norms:
        attention |= {"attn_q_norm": (norms[0],), "attn_k_norm": (norms[1],)}
    dense = {"ffn_gate": (7 * n_ff, d), "ffn_up": (7 * n_ff, d), "ffn_down": (d, 7 * n_ff)}
    of_expert = family.n_latent or d
    experts = {
        "ffn_gate_inp": (shape.n_expert, d),
        "ffn_gate_exps": (shape.n_expert, n_ff, of_expert),
        "ffn_up_exps": (shape.n_expert, n_ff, of_expert),
        "ffn_down_exps": (shape.n_expert, of_expert, n_ff),
    }
    if family.is_merged:
        experts = {name: dims for name, dims in experts.items() if name not in ("ffn_gate_exps", "ffn_up_exps")}
        experts["ffn_gate_up_exps"] = (shape.n_expert, 2 * n_ff, d)
    for n in range(shape.n_layer):
        is_dense = n < family.n_dense
        is_recurrent = n in family.recurrent
        if family.only_experts:
            kept = _single_part(n, family, attention, experts) | ({"attn_norm": (d,)})
            tensors |= {f"blk.{n}.{name}.weight": dims for name, dims in kept.items()}
            tensors |= {f"blk.{n}.{name}": dims for name, dims in (recurrent if is_recurrent else {}).items()}
            if n in family.only_experts:
                tensors |= {f"blk.{n}.{name}": dims for name, dims in extra.items()}
            continue
        mixer = {"attn_norm": (d,), family.ffn_norm: (d,)} if is_recurrent else attention
        layer = mixer | (dense if is_dense else experts)
        if family.window:
            layer |= _window_tensors(family.window, shape, n)
            if n in family.window.without_values:
                del layer["attn_v"]
        if is_recurrent:
            tensors |= {f"blk.{n}.{name}": dims for name, dims in recurrent.items()}
        tensors |= {f"blk.{n}.{name}.weight": dims for name, dims in layer.items()}
        of_ffn = ("ffn_", "exp_probs_b")
        tensors |= {
            f"blk.{n}.{name}": dims for name, dims in extra.items() if not (is_dense and name.startswith(of_ffn))
        }
    return tensors


def _single_part(
    n: int, family: Family, attention: dict[str, tuple[int, ...]], experts: dict[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """What layer `n` has of these, if it is one part."""
    if n in family.only_experts:
        return {name: dims for name, dims in experts.items() if name != "ffn_gate_exps"}
    return {} if n in family.recurrent else {name: dims for name, dims in attention.items() if name != "ffn_norm"}


def _window_tensors(window: WindowShape, shape: FineShape, n: int) -> dict[str, tuple[int, ...]]:
    """What differs in layer `n`, where that has a window."""
    if n not in window.layers:
        return {}
    n_q, n_kv = shape.n_head * window.n_embd_head, window.n_head_kv * window.n_embd_head
    d, norm = shape.n_embd, (window.n_embd_head,)
    inputs = {"attn_q": (n_q, d), "attn_k": (n_kv, d), "attn_v": (n_kv, d)}
    return inputs | {"attn_output": (d, n_q), "attn_q_norm": norm, "attn_k_norm": norm}


def _latent_tensors(latent: LatentShape, shape: FineShape) -> dict[str, tuple[int, ...]]:
    d, n_head, n_q, n_kv = shape.n_embd, shape.n_head, latent.n_lora_q, latent.n_lora_kv
    n_queries = n_head * (latent.n_plain + latent.n_rot)
    tensors: dict[str, tuple[int, ...]] = {
        "attn_kv_a_mqa": (n_kv + latent.n_rot, d),
        "attn_kv_a_norm": (n_kv,),
        "attn_output": (d, n_head * latent.n_value),
    }
    if n_q:
        tensors |= {"attn_q_a": (n_q, d), "attn_q_a_norm": (n_q,), "attn_q_b": (n_queries, n_q)}
    else:
        tensors["attn_q"] = (n_queries, d)
    if latent.is_absorbed:
        return tensors | {"attn_k_b": (n_head, n_kv, latent.n_plain), "attn_v_b": (n_head, latent.n_value, n_kv)}
    return tensors | {"attn_kv_b": (n_head * (latent.n_plain + latent.n_value), n_kv)}
