"""The tensors that several architectures have in common, as parts of their rows in `architectures`."""

from slimoe.offload.model.architecture import TensorRole

BEGIN = (
    TensorRole("token_embd", ("n_embd", "n_vocab"), "model"),
    TensorRole("attn_norm", ("n_embd",), "attention"),
    TensorRole("attn_q", ("n_embd", "n_q"), "attention"),
    TensorRole("attn_k", ("n_embd", "n_kv"), "attention"),
    TensorRole("attn_v", ("n_embd", "n_kv"), "attention"),
)
ROPE_FREQS = TensorRole("rope_freqs", ("n_rot_pairs",), "model", is_optional=True)
ROPE_FACTORS = (
    TensorRole("rope_factors_short", ("n_rot_pairs",), "model", is_optional=True),
    TensorRole("rope_factors_long", ("n_rot_pairs",), "model", is_optional=True),
)
NORM_OF_HEADS = (
    TensorRole("attn_q_norm", ("n_embd_head",), "attention"),
    TensorRole("attn_k_norm", ("n_embd_head",), "attention"),
)
NORM_OF_HEADS_OR_NONE = (
    TensorRole("attn_q_norm", ("n_embd_head",), "attention", is_optional=True),
    TensorRole("attn_k_norm", ("n_embd_head",), "attention", is_optional=True),
)
NORM_OF_ROWS = (
    TensorRole("attn_q_norm", ("n_q",), "attention"),
    TensorRole("attn_k_norm", ("n_kv",), "attention"),
)
ATTN_OUTPUT = TensorRole("attn_output", ("n_q", "n_embd"), "attention")
FFN_NORM = TensorRole("ffn_norm", ("n_embd",), "ffn")
ROUTER = TensorRole("ffn_gate_inp", ("n_embd", "n_expert"), "router")
CHOICE_BIAS = TensorRole("exp_probs_b", ("n_expert",), "router", suffix="bias")
CHOICE_BIAS_OR_NONE = TensorRole("exp_probs_b", ("n_expert",), "router", is_optional=True, suffix="bias")
DENSE = (
    TensorRole("ffn_gate", ("n_embd", "n_ff"), "dense"),
    TensorRole("ffn_up", ("n_embd", "n_ff"), "dense"),
    TensorRole("ffn_down", ("n_ff", "n_embd"), "dense"),
)
EXPERTS = (
    TensorRole("ffn_gate_exps", ("n_embd", "n_ff", "n_expert"), "experts"),
    TensorRole("ffn_up_exps", ("n_embd", "n_ff", "n_expert"), "experts"),
    TensorRole("ffn_down_exps", ("n_ff", "n_embd", "n_expert"), "experts"),
)
SHARED = (
    TensorRole("ffn_gate_shexp", ("n_embd", "n_ff_shared"), "shared"),
    TensorRole("ffn_up_shexp", ("n_embd", "n_ff_shared"), "shared"),
    TensorRole("ffn_down_shexp", ("n_ff_shared", "n_embd"), "shared"),
)
SHARED_GATE = TensorRole("ffn_gate_inp_shexp", ("n_embd",), "shared")
OUTPUT_NORM = TensorRole("output_norm", ("n_embd",), "model")
OUTPUT = TensorRole("output", ("n_embd", "n_vocab"), "model")
OUTPUT_OR_TIED = TensorRole("output", ("n_embd", "n_vocab"), "model", is_optional=True)
END = (ATTN_OUTPUT, FFN_NORM, ROUTER, *DENSE, *EXPERTS, OUTPUT_NORM)

RECURRENT_NORM = TensorRole("attn_norm", ("n_embd",), "recurrent")
DELTA_NET = (
    RECURRENT_NORM,
    TensorRole("attn_qkv", ("n_embd", "n_conv_channels"), "recurrent"),
    TensorRole("attn_gate", ("n_embd", "n_inner"), "recurrent"),
    TensorRole("ssm_conv1d", ("n_conv", "n_conv_channels"), "recurrent"),
    TensorRole("ssm_dt", ("n_rank",), "recurrent", suffix="bias"),
    TensorRole("ssm_a", ("n_rank",), "recurrent", suffix=""),
    TensorRole("ssm_norm", ("n_state",), "recurrent"),
    TensorRole("ssm_out", ("n_inner", "n_embd"), "recurrent"),
)
MAMBA2 = (
    RECURRENT_NORM,
    TensorRole("ssm_in", ("n_embd", "n_ssm_in"), "recurrent"),
    TensorRole("ssm_conv1d", ("n_conv", "n_conv_channels"), "recurrent"),
    TensorRole("ssm_conv1d", ("n_conv_channels",), "recurrent", suffix="bias"),
    TensorRole("ssm_dt", ("n_rank",), "recurrent", suffix="bias"),
    TensorRole("ssm_a", ("one", "n_rank"), "recurrent", suffix=""),
    TensorRole("ssm_d", ("one", "n_rank"), "recurrent", suffix=""),
    TensorRole("ssm_norm", ("n_group_inner", "n_group"), "recurrent"),
    TensorRole("ssm_out", ("n_inner", "n_embd"), "recurrent"),
)
UNGATED = (
    TensorRole("ffn_latent_down", ("n_embd", "n_embd_expert"), "latent_experts"),
    TensorRole("ffn_up_exps", ("n_embd_expert", "n_ff", "n_expert"), "experts"),
    TensorRole("ffn_down_exps", ("n_ff", "n_embd_expert", "n_expert"), "experts"),
    TensorRole("ffn_latent_up", ("n_embd_expert", "n_embd"), "latent_experts"),
    TensorRole("ffn_up_shexp", ("n_embd", "n_ff_shared"), "shared"),
    TensorRole("ffn_down_shexp", ("n_ff_shared", "n_embd"), "shared"),
)
GATED_ATTENTION = (
    BEGIN[0],
    TensorRole("attn_norm", ("n_embd",), "attention"),
    TensorRole("attn_q", ("n_embd", "n_q_rows"), "attention"),
    TensorRole("attn_k", ("n_embd", "n_kv"), "attention"),
    TensorRole("attn_v", ("n_embd", "n_kv"), "attention"),
    *NORM_OF_HEADS,
    ATTN_OUTPUT,
)
MTP = (
    TensorRole("nextn.eh_proj", ("n_embd_twice", "n_embd"), "mtp"),
    TensorRole("nextn.enorm", ("n_embd",), "mtp"),
    TensorRole("nextn.hnorm", ("n_embd",), "mtp"),
    TensorRole("nextn.embed_tokens", ("n_embd", "n_vocab"), "mtp", is_optional=True),
    TensorRole("nextn.shared_head_head", ("n_embd", "n_vocab"), "mtp", is_optional=True),
    TensorRole("nextn.shared_head_norm", ("n_embd",), "mtp", is_optional=True),
)

GATED_END = (
    TensorRole("post_attention_norm", ("n_embd",), "ffn"),
    ROUTER,
    *EXPERTS,
    *SHARED,
    SHARED_GATE,
    *MTP,
    OUTPUT_NORM,
    OUTPUT_OR_TIED,
)

MLA = (
    BEGIN[0],
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
MLA_END = (FFN_NORM, ROUTER, CHOICE_BIAS_OR_NONE, *DENSE, *EXPERTS, *SHARED, OUTPUT_NORM, OUTPUT_OR_TIED)

GEMMA = (
    TensorRole("rope_freqs", ("n_rot_pairs",), "model"),
    *BEGIN[:-1],
    TensorRole("attn_v", ("n_embd", "n_kv"), "attention", is_optional=True),
    *NORM_OF_HEADS,
    ATTN_OUTPUT,
    TensorRole("post_attention_norm", ("n_embd",), "attention"),
    FFN_NORM,
    TensorRole("ffn_gate", ("n_embd", "n_ff_shared"), "shared"),
    TensorRole("ffn_up", ("n_embd", "n_ff_shared"), "shared"),
    TensorRole("ffn_down", ("n_ff_shared", "n_embd"), "shared"),
    TensorRole("post_ffw_norm_1", ("n_embd",), "shared"),
    ROUTER,
    TensorRole("ffn_gate_inp", ("n_embd",), "router", suffix="scale"),
    TensorRole("pre_ffw_norm_2", ("n_embd",), "ffn"),
    *EXPERTS,
    TensorRole("ffn_down_exps", ("n_expert",), "experts", suffix="scale"),
    TensorRole("post_ffw_norm_2", ("n_embd",), "ffn"),
    TensorRole("post_ffw_norm", ("n_embd",), "ffn"),
    TensorRole("layer_output_scale", ("one",), "layer", is_optional=True),
    OUTPUT_NORM,
    OUTPUT_OR_TIED,
)
