"""The router: which experts a token selects, and with which weights."""

from slimoe.offload.ggml import ops as ggml
from slimoe.offload.model.spec import ModelSpec


def add_router(ctx: int, spec: ModelSpec, router: int, normed: int) -> tuple[int, int]:
    """All experts from the likeliest on, I32 [n_expert, n_rows], and F32 [1, n_expert_used, n_rows]: expert weights."""
    logits = ggml.ggml_mul_mat(ctx, router, normed)
    n_expert, n_rows = ggml.tensor_at(logits).ne[:2]
    probabilities = ggml.ggml_soft_max(ctx, logits)
    ranked = int(ggml.ggml_argsort(ctx, probabilities, ggml.SORT_DESCENDING))
    selected = select_experts(ctx, spec, ranked)
    found = ggml.ggml_get_rows(ctx, ggml.ggml_reshape_3d(ctx, probabilities, 1, n_expert, n_rows), selected)
    weights = ggml.ggml_reshape_2d(ctx, found, spec.n_expert_used, n_rows)
    if spec.architecture.router.renormalise:
        weights = ggml.ggml_div(ctx, weights, ggml.ggml_sum_rows(ctx, weights))
    if spec.expert_weights_scale not in (0.0, 1.0):
        weights = ggml.ggml_scale(ctx, weights, spec.expert_weights_scale)
    return ranked, int(ggml.ggml_reshape_3d(ctx, weights, 1, spec.n_expert_used, n_rows))


def select_experts(ctx: int, spec: ModelSpec, ranked: int) -> int:
    """The first `n_expert_used` of the ranked experts, I32 [n_expert_used, n_rows]."""
    tensor = ggml.tensor_at(ranked)
    return int(ggml.ggml_view_2d(ctx, ranked, spec.n_expert_used, tensor.ne[1], tensor.nb[1], 0))
