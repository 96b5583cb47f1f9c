"""Models of many small experts: one of each kind whose layers differ from the others' in what they compute.

Their files are as true models' but for the number of layers, so that a layer takes what it takes there.
"""

from collections.abc import Callable, Mapping

import numpy as np

from slimoe.offload.model.architectures import (
    DEEPSEEK2,
    GEMMA4,
    GPT_OSS,
    GRANITEHYBRID,
    LFM2MOE,
    NEMOTRON_H_MOE,
    QWEN3MOE,
    QWEN3NEXT,
    QWEN35MOE,
)
from slimoe.offload.model.attention_spec import AttentionSpec, LatentSpec
from slimoe.offload.model.expert_spec import ExpertSpec, LayerShape
from slimoe.offload.model.recurrent_spec import RecurrentSpec
from slimoe.offload.model.rope import RopeSpec
from slimoe.offload.model.spec import ModelSpec, Multipliers

_N_CTX = 32768


def _qwen3moe(n_layer: int = 8) -> ModelSpec:
    """Qwen3-30B-A3B."""
    return ModelSpec(
        architecture=QWEN3MOE,
        n_layer=n_layer,
        n_embd=2048,
        n_ff=768,
        n_vocab=151936,
        n_ctx_train=_N_CTX,
        rms_eps=1e-6,
        attention=AttentionSpec(n_head=32, n_head_kv=4, n_embd_head=128),
        experts=ExpertSpec(n_expert=128, n_expert_used=8),
        rope=RopeSpec(128, _N_CTX, 1e6),
    )


def _deepseek2(n_layer: int = 8) -> ModelSpec:
    """DeepSeek-V2-Lite, whose first layer is dense, but with queries of low rank, as GLM-4.7-Flash has them.

    llama.cpp takes queries of full rank from files of 26 or 27 layers alone.
    """
    n_ctx_orig, n_rot, n_lora_q, n_lora_kv = 4096, 64, 768, 512
    routed = (LayerShape(64, 1408),) * (n_layer - 1)
    return ModelSpec(
        architecture=DEEPSEEK2,
        n_layer=n_layer,
        n_embd=2048,
        n_ff=1408,
        n_vocab=102400,
        n_ctx_train=40 * n_ctx_orig,
        rms_eps=1e-6,
        attention=AttentionSpec(16, 1, n_lora_kv + n_rot, n_lora_kv, LatentSpec(n_lora_q, n_lora_kv, 128 + n_rot, 128)),
        experts=ExpertSpec(
            64, 6, layers=(LayerShape(0, 10944), *routed), score="softmax", renormalise=False, n_ff_shared=2 * 1408
        ),
        rope=RopeSpec(n_rot, n_ctx_orig, 1e4, "yarn", 40.0, yarn_log_multiplier=0.0707, is_mscale_shared=True),
    )


def _gpt_oss(n_layer: int = 6) -> ModelSpec:
    """gpt-oss-20b."""
    n_ctx_orig = 4096
    return ModelSpec(
        architecture=GPT_OSS,
        n_layer=n_layer,
        n_embd=2880,
        n_ff=2880,
        n_vocab=201088,
        n_ctx_train=32 * n_ctx_orig,
        rms_eps=1e-5,
        attention=AttentionSpec(n_head=64, n_head_kv=8, n_embd_head=64),
        experts=ExpertSpec(n_expert=32, n_expert_used=4),
        rope=RopeSpec(64, n_ctx_orig, 150000.0, "yarn", 32.0),
        n_window=128,
        windowed=tuple(layer % 2 == 0 for layer in range(n_layer)),
    )


def _qwen3next(n_layer: int = 8) -> ModelSpec:
    """Qwen3-Next-80B-A3B and Qwen3-Coder-Next: three of four layers are recurrent."""
    return ModelSpec(
        architecture=QWEN3NEXT,
        n_layer=n_layer,
        n_embd=2048,
        n_ff=512,
        n_vocab=151936,
        n_ctx_train=_N_CTX,
        rms_eps=1e-6,
        attention=AttentionSpec(n_head=16, n_head_kv=2, n_embd_head=256, is_gated=True),
        experts=ExpertSpec(n_expert=512, n_expert_used=10, n_ff_shared=512),
        rope=RopeSpec(64, _N_CTX, 1e7),
        recurrent=_delta_net(n_layer),
    )


def _qwen35moe(n_layer: int = 8) -> ModelSpec:
    """Qwen3.5-35B-A3B and 3.6, whose recurrent layers have the same sizes."""
    return ModelSpec(
        architecture=QWEN35MOE,
        n_layer=n_layer,
        n_embd=2048,
        n_ff=512,
        n_vocab=248320,
        n_ctx_train=_N_CTX,
        rms_eps=1e-6,
        attention=AttentionSpec(n_head=16, n_head_kv=2, n_embd_head=256, is_gated=True),
        experts=ExpertSpec(n_expert=256, n_expert_used=8, n_ff_shared=512),
        rope=RopeSpec(64, _N_CTX, 1e7, sections=(11, 11, 10, 0)),
        recurrent=_delta_net(n_layer),
    )


def _delta_net(n_layer: int) -> RecurrentSpec:
    n_state, n_group, n_rank = 128, 16, 32
    layers = tuple((layer + 1) % 4 != 0 for layer in range(n_layer))
    n_inner = n_rank * n_state
    return RecurrentSpec("delta_net", layers, 4, n_inner + 2 * n_group * n_state, n_state, n_group, n_rank, n_inner)


def _lfm2moe(n_layer: int = 8) -> ModelSpec:
    """LFM2-8B-A1B: two dense layers first, and short convolutions in three of four."""
    n_embd, n_expert, n_ff = 2048, 32, 1792
    return ModelSpec(
        architecture=LFM2MOE,
        n_layer=n_layer,
        n_embd=n_embd,
        n_ff=n_ff,
        n_vocab=65536,
        n_ctx_train=_N_CTX,
        rms_eps=1e-5,
        attention=AttentionSpec(n_head=32, n_head_kv=8, n_embd_head=64),
        experts=ExpertSpec(
            n_expert,
            4,
            layers=(LayerShape(0, 7168),) * 2 + (LayerShape(n_expert, n_ff),) * (n_layer - 2),
            score="sigmoid",
        ),
        rope=RopeSpec(64, _N_CTX, 1e6),
        recurrent=RecurrentSpec("short_conv", tuple(layer % 4 != 2 for layer in range(n_layer)), 3, n_embd),
    )


def _granitehybrid(n_layer: int = 8) -> ModelSpec:
    """Granite-4.0-H-Tiny: every tenth layer has attention, without rotation, and all have experts.

    Sizes are those of its model card. Where the layers with attention are, the size of the vocabulary and the factors
    are not in it: these are written from memory.
    """
    n_embd, n_state, n_rank = 1536, 128, 48
    n_inner = 2 * n_embd
    layers = tuple(layer % 10 != 5 for layer in range(n_layer))
    return ModelSpec(
        architecture=GRANITEHYBRID,
        n_layer=n_layer,
        n_embd=n_embd,
        n_ff=512,
        n_vocab=100352,
        n_ctx_train=131072,
        rms_eps=1e-5,
        attention=AttentionSpec(n_head=12, n_head_kv=4, n_embd_head=128),
        experts=ExpertSpec(n_expert=64, n_expert_used=6, n_ff_shared=1024),
        rope=RopeSpec(0, 131072),
        multipliers=Multipliers(embedding=12.0, residual=0.22, attention=1 / 128, logits=1 / 6),
        recurrent=RecurrentSpec("mamba2", layers, 4, n_inner + 2 * n_state, n_state, 1, n_rank, n_inner),
    )


def _nemotron_h_moe(n_layer: int = 7) -> ModelSpec:
    """Nemotron-3-Nano-30B-A3B, whose layers are each Mamba-2, experts or attention, by NVIDIA's recipe for it."""
    parts = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"[:n_layer]
    n_expert, n_ff, n_state, n_group, n_rank, n_inner = 128, 1856, 128, 8, 64, 4096
    sizes = n_inner + 2 * n_group * n_state, n_state, n_group, n_rank, n_inner
    return ModelSpec(
        architecture=NEMOTRON_H_MOE,
        n_layer=len(parts),
        n_embd=2688,
        n_ff=n_ff,
        n_vocab=131072,
        n_ctx_train=262144,
        rms_eps=1e-5,
        attention=AttentionSpec(n_head=32, n_head_kv=2, n_embd_head=128),
        experts=ExpertSpec(
            n_expert,
            6,
            weights_scale=2.5,
            layers=tuple(LayerShape(n_expert, n_ff, False) if part == "E" else LayerShape(0, 0) for part in parts),
            renormalise=True,
            n_ff_shared=3712,
        ),
        rope=RopeSpec(0, 262144),
        recurrent=RecurrentSpec("mamba2", tuple(part == "M" for part in parts), 4, *sizes),
    )


def _gemma4(n_layer: int = 8) -> ModelSpec:
    """Gemma 4 26B-A4B: every sixth layer sees all tokens, with heads twice as wide, of which a quarter rotates."""
    n_embd, n_head = 2816, 16
    return ModelSpec(
        architecture=GEMMA4,
        n_layer=n_layer,
        n_embd=n_embd,
        n_ff=704,
        n_vocab=262144,
        n_ctx_train=_N_CTX,
        rms_eps=1e-6,
        attention=AttentionSpec(n_head, n_head_kv=2, n_embd_head=512),
        window_attention=AttentionSpec(n_head, n_head_kv=8, n_embd_head=256),
        experts=ExpertSpec(n_expert=128, n_expert_used=8, n_ff_shared=2112),
        rope=RopeSpec(512, _N_CTX, 1e6, window_freq_base=1e4, window_n_rot=256),
        multipliers=Multipliers(embedding=float(np.float32(n_embd**0.5)), attention=1.0, softcap=30.0),
        n_window=1024,
        windowed=tuple(layer % 6 != 5 for layer in range(n_layer)),
    )


FINE_MODELS: Mapping[str, Callable[..., ModelSpec]] = {
    "qwen3moe": _qwen3moe,
    "deepseek2": _deepseek2,
    "gpt-oss": _gpt_oss,
    "qwen3next": _qwen3next,
    "qwen35moe": _qwen35moe,
    "lfm2moe": _lfm2moe,
    "granitehybrid": _granitehybrid,
    "nemotron_h_moe": _nemotron_h_moe,
    "gemma4": _gemma4,
}
"""Models by their architecture: functions of the number of layers."""
TIED = ("lfm2moe", "granitehybrid", "gemma4")
"""Architectures of those whose embeddings are the output matrix too."""
PUBLISHED = {"gpt-oss": "Q8_0,MXFP4"}
"""Types of matrices, and of those of experts, of architectures whose published files are not rounded any further."""
