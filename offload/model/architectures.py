"""The architectures that the engine runs, one row for each value of `general.architecture`."""

from dataclasses import replace

from slimoe.offload.model.architecture import Architecture, RopeType, Router, SharedExpert, TensorRole

_BEGIN = (
    TensorRole("token_embd", ("n_embd", "n_vocab"), "model"),
    TensorRole("attn_norm", ("n_embd",), "attention"),
    TensorRole("attn_q", ("n_embd", "n_q"), "attention"),
    TensorRole("attn_k", ("n_embd", "n_kv"), "attention"),
    TensorRole("attn_v", ("n_embd", "n_kv"), "attention"),
)
_ROPE_FREQS = TensorRole("rope_freqs", ("n_rot_pairs",), "model", is_optional=True)
_ROPE_FACTORS = (
    TensorRole("rope_factors_short", ("n_rot_pairs",), "model", is_optional=True),
    TensorRole("rope_factors_long", ("n_rot_pairs",), "model", is_optional=True),
)
_NORM_OF_HEADS = (
    TensorRole("attn_q_norm", ("n_embd_head",), "attention"),
    TensorRole("attn_k_norm", ("n_embd_head",), "attention"),
)
_NORM_OF_HEADS_OR_NONE = (
    TensorRole("attn_q_norm", ("n_embd_head",), "attention", is_optional=True),
    TensorRole("attn_k_norm", ("n_embd_head",), "attention", is_optional=True),
)
_NORM_OF_ROWS = (
    TensorRole("attn_q_norm", ("n_q",), "attention"),
    TensorRole("attn_k_norm", ("n_kv",), "attention"),
)
_ATTN_OUTPUT = TensorRole("attn_output", ("n_q", "n_embd"), "attention")
_FFN_NORM = TensorRole("ffn_norm", ("n_embd",), "ffn")
_ROUTER = TensorRole("ffn_gate_inp", ("n_embd", "n_expert"), "router")
_CHOICE_BIAS = TensorRole("exp_probs_b", ("n_expert",), "router", suffix="bias")
_CHOICE_BIAS_OR_NONE = TensorRole("exp_probs_b", ("n_expert",), "router", is_optional=True, suffix="bias")
_DENSE = (
    TensorRole("ffn_gate", ("n_embd", "n_ff"), "dense"),
    TensorRole("ffn_up", ("n_embd", "n_ff"), "dense"),
    TensorRole("ffn_down", ("n_ff", "n_embd"), "dense"),
)
_EXPERTS = (
    TensorRole("ffn_gate_exps", ("n_embd", "n_ff", "n_expert"), "experts"),
    TensorRole("ffn_up_exps", ("n_embd", "n_ff", "n_expert"), "experts"),
    TensorRole("ffn_down_exps", ("n_ff", "n_embd", "n_expert"), "experts"),
)
_SHARED = (
    TensorRole("ffn_gate_shexp", ("n_embd", "n_ff_shared"), "shared"),
    TensorRole("ffn_up_shexp", ("n_embd", "n_ff_shared"), "shared"),
    TensorRole("ffn_down_shexp", ("n_ff_shared", "n_embd"), "shared"),
)
_SHARED_GATE = TensorRole("ffn_gate_inp_shexp", ("n_embd",), "shared")
_OUTPUT_NORM = TensorRole("output_norm", ("n_embd",), "model")
_OUTPUT = TensorRole("output", ("n_embd", "n_vocab"), "model")
_OUTPUT_OR_TIED = TensorRole("output", ("n_embd", "n_vocab"), "model", is_optional=True)
_END = (_ATTN_OUTPUT, _FFN_NORM, _ROUTER, *_DENSE, *_EXPERTS, _OUTPUT_NORM)

_RECURRENT_NORM = TensorRole("attn_norm", ("n_embd",), "recurrent")
_DELTA_NET = (
    _RECURRENT_NORM,
    TensorRole("attn_qkv", ("n_embd", "n_conv_channels"), "recurrent"),
    TensorRole("attn_gate", ("n_embd", "n_inner"), "recurrent"),
    TensorRole("ssm_conv1d", ("n_conv", "n_conv_channels"), "recurrent"),
    TensorRole("ssm_dt", ("n_rank",), "recurrent", suffix="bias"),
    TensorRole("ssm_a", ("n_rank",), "recurrent", suffix=""),
    TensorRole("ssm_norm", ("n_state",), "recurrent"),
    TensorRole("ssm_out", ("n_inner", "n_embd"), "recurrent"),
)
_GATED_ATTENTION = (
    _BEGIN[0],
    TensorRole("attn_norm", ("n_embd",), "attention"),
    TensorRole("attn_q", ("n_embd", "n_q_rows"), "attention"),
    TensorRole("attn_k", ("n_embd", "n_kv"), "attention"),
    TensorRole("attn_v", ("n_embd", "n_kv"), "attention"),
    *_NORM_OF_HEADS,
    _ATTN_OUTPUT,
)
_GATED_END = (
    TensorRole("post_attention_norm", ("n_embd",), "ffn"),
    _ROUTER,
    *_EXPERTS,
    *_SHARED,
    _SHARED_GATE,
    _OUTPUT_NORM,
    _OUTPUT_OR_TIED,
)

_MLA = (
    _BEGIN[0],
    TensorRole("attn_norm", ("n_embd",), "attention"),
    TensorRole("attn_q", ("n_embd", "n_q"), "q"),
    TensorRole("attn_q_a", ("n_embd", "n_lora_q"), "low_rank_q"),
    TensorRole("attn_q_a_norm", ("n_lora_q",), "low_rank_q"),
    TensorRole("attn_q_b", ("n_lora_q", "n_q"), "low_rank_q"),
    TensorRole("attn_kv_a_mqa", ("n_embd", "n_lora_kv_rot"), "attention"),
    TensorRole("attn_kv_a_norm", ("n_lora_kv",), "attention"),
    TensorRole("attn_k_b", ("n_unrotated", "n_lora_kv", "n_head"), "absorbed"),
    TensorRole("attn_v_b", ("n_lora_kv", "n_embd_head_v", "n_head"), "absorbed"),
    TensorRole("attn_kv_b", ("n_lora_kv", "n_kv_b"), "unabsorbed"),
    TensorRole("attn_output", ("n_attn_output", "n_embd"), "attention"),
)
_MLA_END = (_FFN_NORM, _ROUTER, _CHOICE_BIAS_OR_NONE, *_DENSE, *_EXPERTS, *_SHARED, _OUTPUT_NORM, _OUTPUT_OR_TIED)

LLAMA = Architecture(
    name="llama",
    models="Llama, Mistral and Mixtral",
    tensors=(_ROPE_FREQS, *_ROPE_FACTORS, *_BEGIN, *_END, _OUTPUT_OR_TIED),
    may_be_dense=True,
)
QWEN2MOE = Architecture(
    name="qwen2moe",
    models="Qwen1.5-MoE and Qwen2-57B-A14B",
    tensors=(*_BEGIN, *_END, *_SHARED, _SHARED_GATE, _OUTPUT),
    rope=RopeType.NEOX,
    router=Router(renormalise=False),
    shared=SharedExpert("key_or_dense", gate="silu_quotient"),
    width_key="expert_feed_forward_length",
)
QWEN3MOE = Architecture(
    name="qwen3moe",
    models="Qwen3 MoE",
    tensors=(*_BEGIN, *_NORM_OF_HEADS, *_END, _OUTPUT_OR_TIED),
    rope=RopeType.NEOX,
    qk_norm="head",
    width_key="expert_feed_forward_length",
)
OLMOE = Architecture(
    name="olmoe",
    models="OLMoE",
    tensors=(*_BEGIN, *_NORM_OF_ROWS, *_END, _OUTPUT),
    rope=RopeType.NEOX,
    qk_norm="row",
    router=Router(renormalise=False),
)
PHIMOE = Architecture(
    name="phimoe",
    models="Phi-3.5-MoE",
    tensors=(
        *_ROPE_FACTORS,
        *_BEGIN,
        *_END,
        _OUTPUT,
        TensorRole("attn_norm", ("n_embd",), "attention", suffix="bias"),
        TensorRole("ffn_norm", ("n_embd",), "ffn", suffix="bias"),
        TensorRole("output_norm", ("n_embd",), "model", suffix="bias"),
        TensorRole("attn_output", ("n_embd",), "attention", suffix="bias"),
        TensorRole("output", ("n_vocab",), "model", suffix="bias"),
    ),
    rope=RopeType.NEOX,
    scales_queries=True,
    difference="It answers as in llama.cpp, not as in transformers: norms keep the mean, softmax weighs the experts.",
)
GRANITEMOE = Architecture(
    name="granitemoe",
    models="Granite 3 and 4 MoE",
    tensors=(_ROPE_FREQS, *_ROPE_FACTORS, *_BEGIN, *_END, *_SHARED, _OUTPUT_OR_TIED),
    shared=SharedExpert("key"),
    has_multipliers=True,
)
DOTS1 = Architecture(
    name="dots1",
    models="dots.llm1",
    tensors=(*_BEGIN, *_NORM_OF_HEADS, *_END, _CHOICE_BIAS_OR_NONE, *_SHARED, _OUTPUT),
    rope=RopeType.NEOX,
    qk_norm="head",
    router=Router(score="sigmoid", reads_score=True, renormalise=None),
    shared=SharedExpert("counted"),
    width_key="expert_feed_forward_length",
    has_dense_layers=True,
)
ERNIE4_5_MOE = Architecture(
    name="ernie4_5-moe",
    models="ERNIE 4.5 MoE",
    tensors=(*_BEGIN, *_END, _CHOICE_BIAS_OR_NONE, *_SHARED, _OUTPUT_OR_TIED),
    shared=SharedExpert("key"),
    width_key="expert_feed_forward_length",
    has_dense_layers=True,
)
HUNYUAN_MOE = Architecture(
    name="hunyuan-moe",
    models="Hunyuan-A13B",
    tensors=(*_BEGIN, *_NORM_OF_HEADS, *_END, *_SHARED, _OUTPUT_OR_TIED),
    rope=RopeType.NEOX,
    qk_norm="head_after_rope",
    shared=SharedExpert("key_or_dense"),
)
MINIMAX_M2 = Architecture(
    name="minimax-m2",
    models="MiniMax-M2",
    tensors=(*_BEGIN, *_NORM_OF_ROWS, *_END, _CHOICE_BIAS, _OUTPUT),
    rope=RopeType.NEOX,
    qk_norm="row",
    rotates_partly=True,
    router=Router(score="sigmoid", reads_score=True),
)
GLM4MOE = Architecture(
    name="glm4moe",
    models="GLM-4.5, 4.6 and 4.7",
    tensors=(
        *_BEGIN,
        *_NORM_OF_HEADS_OR_NONE,
        _ATTN_OUTPUT,
        TensorRole("post_attention_norm", ("n_embd",), "ffn"),
        _ROUTER,
        _CHOICE_BIAS,
        *_DENSE,
        *_EXPERTS,
        *_SHARED,
        _OUTPUT_NORM,
        _OUTPUT_OR_TIED,
    ),
    rope=RopeType.NEOX,
    qk_norm="head",
    rotates_partly=True,
    ffn_norm="post_attention_norm",
    router=Router(score="sigmoid", reads_score=True, renormalise=None),
    shared=SharedExpert("counted"),
    width_key="expert_feed_forward_length",
    has_dense_layers=True,
)
DEEPSEEK2 = Architecture(
    name="deepseek2",
    models="DeepSeek-V2 and V3, R1, Kimi-K2, Moonlight, GLM-4.7-Flash",
    tensors=(*_MLA, *_MLA_END),
    router=Router(reads_score=True, renormalise=None, sigmoid_sizes=((47, 154880), (48, 154880))),
    shared=SharedExpert("counted"),
    width_key="expert_feed_forward_length",
    has_dense_layers=True,
    has_latent_attention=True,
    is_mscale_shared=True,
)
MISTRAL4 = replace(DEEPSEEK2, name="mistral4", models="Mistral Small 4", is_mscale_shared=False, is_down_wide=True)
GPT_OSS = Architecture(
    name="gpt-oss",
    models="gpt-oss",
    tensors=(
        *_BEGIN,
        TensorRole("attn_sinks", ("n_head",), "attention"),
        _ATTN_OUTPUT,
        TensorRole("attn_output", ("n_embd",), "attention", suffix="bias"),
        TensorRole("post_attention_norm", ("n_embd",), "ffn"),
        _ROUTER,
        TensorRole("ffn_gate_inp", ("n_expert",), "router", suffix="bias"),
        *_EXPERTS,
        TensorRole("ffn_gate_exps", ("n_ff", "n_expert"), "experts", suffix="bias"),
        TensorRole("ffn_up_exps", ("n_ff", "n_expert"), "experts", suffix="bias"),
        TensorRole("ffn_down_exps", ("n_embd", "n_expert"), "experts", suffix="bias"),
        _OUTPUT_NORM,
        _OUTPUT,
    ),
    rope=RopeType.NEOX,
    ffn_norm="post_attention_norm",
    router=Router(score="softmax_of_selected", renormalise=False),
    width_key="expert_feed_forward_length",
    window_period=2,
    activation="swiglu_oai",
)
DEEPSEEK32 = replace(
    DEEPSEEK2,
    name="deepseek32",
    models="DeepSeek-V3.2",
    router=Router(score="sigmoid", reads_score=True, renormalise=None),
    is_mscale_shared=False,
    has_indexer=True,
)
GLM_DSA = replace(DEEPSEEK32, name="glm-dsa", models="GLM-5, 5.1 and 5.2")
QWEN3NEXT = Architecture(
    name="qwen3next",
    models="Qwen3-Next and Qwen3-Coder-Next",
    tensors=(
        *_GATED_ATTENTION,
        *_DELTA_NET,
        TensorRole("ssm_ba", ("n_embd", "n_rank_pairs"), "recurrent"),
        *_GATED_END,
    ),
    rope=RopeType.NEOX,
    qk_norm="head",
    rotates_partly=True,
    ffn_norm="post_attention_norm",
    shared=SharedExpert("key_or_dense", gate="sigmoid"),
    width_key="expert_feed_forward_length",
    recurrence="delta_net",
    groups_heads=True,
    gates_attention=True,
)
QWEN35MOE = replace(
    QWEN3NEXT,
    name="qwen35moe",
    models="Qwen3.5 and 3.6 MoE",
    tensors=(
        *_GATED_ATTENTION,
        *_DELTA_NET,
        TensorRole("ssm_beta", ("n_embd", "n_rank"), "recurrent"),
        TensorRole("ssm_alpha", ("n_embd", "n_rank"), "recurrent"),
        *_GATED_END,
    ),
    groups_heads=False,
)
LFM2MOE = Architecture(
    name="lfm2moe",
    models="LFM2 and LFM2.5 MoE",
    tensors=(
        *_BEGIN,
        *_NORM_OF_HEADS,
        _RECURRENT_NORM,
        TensorRole("shortconv.in_proj", ("n_embd", "n_conv_inputs"), "recurrent"),
        TensorRole("shortconv.conv", ("n_conv", "n_embd"), "recurrent"),
        TensorRole("shortconv.out_proj", ("n_embd", "n_embd"), "recurrent"),
        _ATTN_OUTPUT,
        _FFN_NORM,
        _ROUTER,
        _CHOICE_BIAS,
        *_DENSE,
        *_EXPERTS,
        TensorRole("output_norm", ("n_embd",), "model", stored_as="token_embd_norm"),
        _OUTPUT_OR_TIED,
    ),
    rope=RopeType.NEOX,
    qk_norm="head",
    router=Router(reads_score=True),
    width_key="expert_feed_forward_length",
    has_dense_layers=True,
    recurrence="short_conv",
)
BAILINGMOE2 = Architecture(
    name="bailingmoe2",
    models="Ling 2 and Ring 2",
    tensors=(*_BEGIN, *_NORM_OF_HEADS, *_END, _CHOICE_BIAS_OR_NONE, *_SHARED, _OUTPUT),
    rope=RopeType.NEOX,
    qk_norm="head",
    rotates_partly=True,
    joins_qkv=True,
    router=Router(score="sigmoid", reads_score=True, renormalise=None),
    shared=SharedExpert("key_counted"),
    width_key="expert_feed_forward_length",
    has_dense_layers=True,
)
ARCHITECTURES = {
    row.name: row
    for row in (
        LLAMA,
        QWEN2MOE,
        QWEN3MOE,
        OLMOE,
        PHIMOE,
        GRANITEMOE,
        DOTS1,
        ERNIE4_5_MOE,
        HUNYUAN_MOE,
        MINIMAX_M2,
        GLM4MOE,
        DEEPSEEK2,
        MISTRAL4,
        DEEPSEEK32,
        GLM_DSA,
        GPT_OSS,
        QWEN3NEXT,
        QWEN35MOE,
        LFM2MOE,
        BAILINGMOE2,
    )
}

COUSINS = {
    "bailingmoe": ("bailingmoe2", "with neighbours that rotate together"),
    "deepseek": ("deepseek2", "without latent attention"),
    "deepseek4": ("deepseek32", "with compressed attention, and experts chosen by the token's number"),
    "deepseek_v32": ("deepseek32", "only GGUF files of it are read"),
    "ernie4_5": ("ernie4_5-moe", "without experts"),
    "glm4": ("glm4moe", "without experts"),
    "glm_moe_dsa": ("glm-dsa", "only GGUF files of it are read"),
    "granite": ("granitemoe", "without experts"),
    "granitehybrid": ("granitemoe", "with Mamba layers"),
    "granitemoehybrid": ("granitemoe", "with Mamba layers"),
    "hunyuan-dense": ("hunyuan-moe", "without experts"),
    "hunyuan_v1_dense": ("hunyuan-moe", "without experts"),
    "kimi_k25": ("deepseek2", "with a part for images"),
    "llama4": ("llama", "with chunked attention, and weights on the input of experts"),
    "minimax-m3": ("minimax-m2", "with sparse attention"),
    "phi3": ("phimoe", "without experts"),
    "qwen2": ("qwen2moe", "without experts"),
    "qwen3": ("qwen3moe", "without experts"),
    "qwen35": ("qwen35moe", "without experts"),
    "lfm2": ("lfm2moe", "without experts"),
    "qwen3vlmoe": ("qwen3moe", "with positions of images"),
}
"""Architectures that the engine does not run: the nearest one, and what is different from it."""


def variant_of(name: str) -> str:
    """Says of which architecture one that is not run is a variant, for the middle of a sentence; empty if of none.

    Hugging Face's `model_type` does as the name too.
    """
    plain = {known.replace("_", ""): variant for known, variant in COUSINS.items()}
    nearest, difference = plain.get(name.replace("_", ""), ("", ""))
    return f": it is like {nearest}, but {difference}" if nearest else ""
