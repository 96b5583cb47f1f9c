"""The architectures that the engine runs, one row for each value of `general.architecture`."""

from slimoe.offload.model.architecture import Architecture, RopeType, Router, TensorRole

_BEGIN = (
    TensorRole("token_embd", ("n_embd", "n_vocab"), "model"),
    TensorRole("attn_norm", ("n_embd",), "attention"),
    TensorRole("attn_q", ("n_embd", "n_q"), "attention"),
    TensorRole("attn_k", ("n_embd", "n_kv"), "attention"),
    TensorRole("attn_v", ("n_embd", "n_kv"), "attention"),
)
_ROPE_FREQS = TensorRole("rope_freqs", ("n_rot_pairs",), "model", is_optional=True)
_NORM_OF_HEADS = (
    TensorRole("attn_q_norm", ("n_embd_head",), "attention"),
    TensorRole("attn_k_norm", ("n_embd_head",), "attention"),
)
_NORM_OF_ROWS = (
    TensorRole("attn_q_norm", ("n_q",), "attention"),
    TensorRole("attn_k_norm", ("n_kv",), "attention"),
)
_END = (
    TensorRole("attn_output", ("n_q", "n_embd"), "attention"),
    TensorRole("ffn_norm", ("n_embd",), "ffn"),
    TensorRole("ffn_gate_inp", ("n_embd", "n_expert"), "router"),
    TensorRole("ffn_gate", ("n_embd", "n_ff"), "dense"),
    TensorRole("ffn_up", ("n_embd", "n_ff"), "dense"),
    TensorRole("ffn_down", ("n_ff", "n_embd"), "dense"),
    TensorRole("ffn_gate_exps", ("n_embd", "n_ff", "n_expert"), "experts"),
    TensorRole("ffn_up_exps", ("n_embd", "n_ff", "n_expert"), "experts"),
    TensorRole("ffn_down_exps", ("n_ff", "n_embd", "n_expert"), "experts"),
    TensorRole("output_norm", ("n_embd",), "model"),
)
_OUTPUT = TensorRole("output", ("n_embd", "n_vocab"), "model")
_OUTPUT_OR_TIED = TensorRole("output", ("n_embd", "n_vocab"), "model", is_optional=True)

LLAMA = Architecture(
    name="llama",
    models="Llama, Mistral and Mixtral",
    tensors=(_ROPE_FREQS, *_BEGIN, *_END, _OUTPUT_OR_TIED),
    may_be_dense=True,
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
ARCHITECTURES = {row.name: row for row in (LLAMA, QWEN3MOE, OLMOE)}
