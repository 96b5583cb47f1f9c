"""The architectures that the engine runs, one row for each value of `general.architecture`."""

from dataclasses import replace

from slimoe.offload.model.architecture import Architecture, RopeType, Router, SharedExpert, TensorRole
from slimoe.offload.model.tensor_roles import (
    ATTN_OUTPUT,
    BEGIN,
    CHOICE_BIAS,
    CHOICE_BIAS_OR_NONE,
    DELTA_NET,
    DENSE,
    END,
    EXPERTS,
    FFN_NORM,
    GATED_ATTENTION,
    GATED_END,
    GEMMA,
    MAMBA2,
    MLA,
    MLA_END,
    MTP,
    NORM_OF_HEADS,
    NORM_OF_HEADS_OR_NONE,
    NORM_OF_ROWS,
    OUTPUT,
    OUTPUT_NORM,
    OUTPUT_OR_TIED,
    RECURRENT_NORM,
    ROPE_FACTORS,
    ROPE_FREQS,
    ROUTER,
    SHARED,
    SHARED_GATE,
    UNGATED,
)

LLAMA = Architecture(
    name="llama",
    models="Llama, Mistral and Mixtral",
    tensors=(ROPE_FREQS, *ROPE_FACTORS, *BEGIN, *END, OUTPUT_OR_TIED),
    may_be_dense=True,
)
QWEN2MOE = Architecture(
    name="qwen2moe",
    models="Qwen1.5-MoE and Qwen2-57B-A14B",
    tensors=(*BEGIN, *END, *SHARED, SHARED_GATE, OUTPUT),
    rope=RopeType.NEOX,
    router=Router(renormalise=False),
    shared=SharedExpert("key_or_dense", gate="silu_quotient"),
    width_key="expert_feed_forward_length",
)
QWEN3MOE = Architecture(
    name="qwen3moe",
    models="Qwen3 MoE",
    tensors=(*BEGIN, *NORM_OF_HEADS, *END, OUTPUT_OR_TIED),
    rope=RopeType.NEOX,
    qk_norm="head",
    width_key="expert_feed_forward_length",
)
OLMOE = Architecture(
    name="olmoe",
    models="OLMoE",
    tensors=(*BEGIN, *NORM_OF_ROWS, *END, OUTPUT),
    rope=RopeType.NEOX,
    qk_norm="row",
    router=Router(renormalise=False),
)
PHIMOE = Architecture(
    name="phimoe",
    models="Phi-3.5-MoE",
    tensors=(
        *ROPE_FACTORS,
        *BEGIN,
        *END,
        OUTPUT,
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
    tensors=(ROPE_FREQS, *ROPE_FACTORS, *BEGIN, *END, *SHARED, OUTPUT_OR_TIED),
    shared=SharedExpert("key"),
    has_multipliers=True,
)
GRANITEHYBRID = replace(
    GRANITEMOE,
    name="granitehybrid",
    models="Granite 4 H",
    tensors=(ROPE_FREQS, *BEGIN, *MAMBA2, *END, *SHARED, OUTPUT_OR_TIED),
    rotation="by_key",
    recurrence="mamba2",
)
DOTS1 = Architecture(
    name="dots1",
    models="dots.llm1",
    tensors=(*BEGIN, *NORM_OF_HEADS, *END, CHOICE_BIAS_OR_NONE, *SHARED, OUTPUT),
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
    tensors=(*BEGIN, *END, CHOICE_BIAS_OR_NONE, *SHARED, OUTPUT_OR_TIED),
    shared=SharedExpert("key"),
    width_key="expert_feed_forward_length",
    has_dense_layers=True,
)
HUNYUAN_MOE = Architecture(
    name="hunyuan-moe",
    models="Hunyuan-A13B",
    tensors=(*BEGIN, *NORM_OF_HEADS, *END, *SHARED, OUTPUT_OR_TIED),
    rope=RopeType.NEOX,
    qk_norm="head_after_rope",
    shared=SharedExpert("key_or_dense"),
)
MINIMAX_M2 = Architecture(
    name="minimax-m2",
    models="MiniMax-M2",
    tensors=(*BEGIN, *NORM_OF_ROWS, *END, CHOICE_BIAS, OUTPUT),
    rope=RopeType.NEOX,
    qk_norm="row",
    rotates_partly=True,
    router=Router(score="sigmoid", reads_score=True),
)
GLM4MOE = Architecture(
    name="glm4moe",
    models="GLM-4.5, 4.6 and 4.7",
    tensors=(
        *BEGIN,
        *NORM_OF_HEADS_OR_NONE,
        ATTN_OUTPUT,
        TensorRole("post_attention_norm", ("n_embd",), "ffn"),
        ROUTER,
        CHOICE_BIAS,
        *DENSE,
        *EXPERTS,
        *SHARED,
        *MTP,
        OUTPUT_NORM,
        OUTPUT_OR_TIED,
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
    tensors=(*MLA, *MLA_END, *MTP),
    router=Router(reads_score=True, renormalise=None, sigmoid_sizes=((47, 154880), (48, 154880))),
    shared=SharedExpert("counted"),
    width_key="expert_feed_forward_length",
    has_dense_layers=True,
    has_latent_attention=True,
    is_mscale_shared=True,
)
MISTRAL4 = replace(
    DEEPSEEK2,
    name="mistral4",
    models="Mistral Small 4",
    tensors=(*MLA, *MLA_END),
    is_mscale_shared=False,
    is_down_wide=True,
)
GPT_OSS = Architecture(
    name="gpt-oss",
    models="gpt-oss",
    tensors=(
        *BEGIN,
        TensorRole("attn_sinks", ("n_head",), "attention"),
        ATTN_OUTPUT,
        TensorRole("attn_output", ("n_embd",), "attention", suffix="bias"),
        TensorRole("post_attention_norm", ("n_embd",), "ffn"),
        ROUTER,
        TensorRole("ffn_gate_inp", ("n_expert",), "router", suffix="bias"),
        *EXPERTS,
        TensorRole("ffn_gate_exps", ("n_ff", "n_expert"), "experts", suffix="bias"),
        TensorRole("ffn_up_exps", ("n_ff", "n_expert"), "experts", suffix="bias"),
        TensorRole("ffn_down_exps", ("n_embd", "n_expert"), "experts", suffix="bias"),
        OUTPUT_NORM,
        OUTPUT,
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
        *GATED_ATTENTION,
        *DELTA_NET,
        TensorRole("ssm_ba", ("n_embd", "n_rank_pairs"), "recurrent"),
        *GATED_END,
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
        *GATED_ATTENTION,
        *DELTA_NET,
        TensorRole("ssm_beta", ("n_embd", "n_rank"), "recurrent"),
        TensorRole("ssm_alpha", ("n_embd", "n_rank"), "recurrent"),
        *GATED_END,
    ),
    groups_heads=False,
)
LFM2MOE = Architecture(
    name="lfm2moe",
    models="LFM2 and LFM2.5 MoE",
    tensors=(
        *BEGIN,
        *NORM_OF_HEADS,
        RECURRENT_NORM,
        TensorRole("shortconv.in_proj", ("n_embd", "n_conv_inputs"), "recurrent"),
        TensorRole("shortconv.conv", ("n_conv", "n_embd"), "recurrent"),
        TensorRole("shortconv.out_proj", ("n_embd", "n_embd"), "recurrent"),
        ATTN_OUTPUT,
        FFN_NORM,
        ROUTER,
        CHOICE_BIAS,
        *DENSE,
        *EXPERTS,
        TensorRole("output_norm", ("n_embd",), "model", stored_as="token_embd_norm"),
        OUTPUT_OR_TIED,
    ),
    rope=RopeType.NEOX,
    qk_norm="head",
    router=Router(reads_score=True),
    width_key="expert_feed_forward_length",
    has_dense_layers=True,
    recurrence="short_conv",
)
NEMOTRON_H_MOE = Architecture(
    name="nemotron_h_moe",
    models="Nemotron 3 Nano and Super",
    tensors=(
        *BEGIN,
        *MAMBA2,
        ATTN_OUTPUT,
        TensorRole("attn_norm", ("n_embd",), "ffn"),
        ROUTER,
        CHOICE_BIAS,
        *UNGATED,
        OUTPUT_NORM,
        OUTPUT_OR_TIED,
    ),
    rotation="never",
    ffn_norm="attn_norm",
    router=Router(score="sigmoid", renormalise=None),
    shared=SharedExpert("key"),
    width_key="expert_feed_forward_length",
    has_single_parts=True,
    activation="relu2",
    recurrence="mamba2",
    eps_keys=("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"),
)
BAILINGMOE2 = Architecture(
    name="bailingmoe2",
    models="Ling 2 and Ring 2",
    tensors=(*BEGIN, *NORM_OF_HEADS, *END, CHOICE_BIAS_OR_NONE, *SHARED, OUTPUT),
    rope=RopeType.NEOX,
    qk_norm="head",
    rotates_partly=True,
    joins_qkv=True,
    router=Router(score="sigmoid", reads_score=True, renormalise=None),
    shared=SharedExpert("key_counted"),
    width_key="expert_feed_forward_length",
    has_dense_layers=True,
)
GEMMA4 = Architecture(
    name="gemma4",
    models="Gemma 4 26B-A4B",
    tensors=GEMMA,
    rope=RopeType.NEOX,
    qk_norm="head",
    ffn_norm="pre_ffw_norm_2",
    router=Router(reads_residual=True),
    shared=SharedExpert("dense"),
    width_key="expert_feed_forward_length",
    window_period=6,
    activation="geglu",
    norms_values=True,
    has_window_heads=True,
    has_post_norms=True,
    scales_embeddings=True,
    absent=(
        ("embedding_length_per_layer_input", "embeddings of tokens for each layer, as E2B and E4B have"),
        ("attention.shared_kv_layers", "layers that read the keys and values of others, as E2B and E4B have"),
    ),
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
        GRANITEHYBRID,
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
        NEMOTRON_H_MOE,
        BAILINGMOE2,
        GEMMA4,
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
    "hunyuan-dense": ("hunyuan-moe", "without experts"),
    "hunyuan_v1_dense": ("hunyuan-moe", "without experts"),
    "kimi_k25": ("deepseek2", "with a part for images"),
    "llama4": ("llama", "with chunked attention, and weights on the input of experts"),
    "nemotron_h": ("nemotron_h_moe", "without experts"),
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
