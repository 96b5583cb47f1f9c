"""The router: which experts a token selects, and with which weights."""

import math

from slimoe.offload.ggml import ops as ggml
from slimoe.offload.graph.linear import add_linear
from slimoe.offload.graph.weights import LayerWeights
from slimoe.offload.model.spec import ModelSpec

LEAST_SUM = 2.0**-14
"""llama.cpp's lower bound of what the weights of the selected experts are divided by, F16's least normal number."""


def add_router(ctx: int, spec: ModelSpec, layer: LayerWeights, normed: int) -> tuple[int, int]:
    """All experts from the likeliest on, I32 [n_expert, n_rows], and F32 [1, n_expert_used, n_rows]: expert weights."""
    scores = _add_scores(ctx, spec, layer, normed)
    n_expert, n_rows = ggml.tensor_at(scores).ne[:2]
    choice = ggml.ggml_add(ctx, scores, layer.choice_bias) if layer.choice_bias else scores
    if spec.experts.n_group > 1:
        choice = _add_group_choice(ctx, spec, choice)
    ranked = int(ggml.ggml_argsort(ctx, choice, ggml.SORT_DESCENDING))
    selected = select_experts(ctx, spec, ranked)
    found = ggml.ggml_get_rows(ctx, ggml.ggml_reshape_3d(ctx, scores, 1, n_expert, n_rows), selected)
    weights = ggml.ggml_reshape_2d(ctx, found, spec.n_expert_used, n_rows)
    if spec.router_score == "softmax_of_selected":
        weights = ggml.ggml_soft_max(ctx, weights)
    if spec.renormalises:
        total = ggml.ggml_sum_rows(ctx, weights)
        # The largest of n softmax values are never so small, but a bias or groups may select others.
        if spec.router_score == "sigmoid" or layer.choice_bias or spec.experts.n_group > 1:
            total = ggml.ggml_clamp(ctx, total, LEAST_SUM, math.inf)
        weights = ggml.ggml_div(ctx, weights, total)
    if spec.expert_weights_scale not in (0.0, 1.0):
        weights = ggml.ggml_scale(ctx, weights, spec.expert_weights_scale)
    return ranked, int(ggml.ggml_reshape_3d(ctx, weights, 1, spec.n_expert_used, n_rows))


def add_choice(ctx: int, spec: ModelSpec, layer: LayerWeights, normed: int) -> int:
    """What says which experts are the likeliest, F32 [n_expert, n_rows]: scores, with the bias that only selects."""
    scores = _add_scores(ctx, spec, layer, normed, is_plain=not layer.choice_bias)
    return int(ggml.ggml_add(ctx, scores, layer.choice_bias)) if layer.choice_bias else scores


def _add_scores(ctx: int, spec: ModelSpec, layer: LayerWeights, normed: int, *, is_plain: bool = False) -> int:
    """The router's scores F32 [n_expert, n_rows], or logits if `is_plain`."""
    assert layer.router is not None
    logits = add_linear(ctx, layer.router, normed)
    if is_plain or spec.router_score == "softmax_of_selected":
        return logits
    return int((ggml.ggml_sigmoid if spec.router_score == "sigmoid" else ggml.ggml_soft_max)(ctx, logits))


def _add_group_choice(ctx: int, spec: ModelSpec, choice: int) -> int:
    """The scores [n_expert, n_rows] with -inf in the groups that are not selected, whose two best add up to less."""
    n_expert, n_rows = ggml.tensor_at(choice).ne[:2]
    n_group, n_group_used = spec.experts.n_group, spec.experts.n_group_used
    size = n_expert // n_group
    groups = ggml.ggml_reshape_3d(ctx, choice, size, n_group, n_rows)
    best = ggml.ggml_argsort_top_k(ctx, groups, 2)
    scores = ggml.ggml_get_rows(ctx, ggml.ggml_reshape_4d(ctx, groups, 1, size, n_group, n_rows), best)
    scores = ggml.ggml_sum_rows(ctx, ggml.ggml_reshape_3d(ctx, scores, 2, n_group, n_rows))
    chosen = ggml.ggml_argsort_top_k(ctx, ggml.ggml_reshape_2d(ctx, scores, n_group, n_rows), n_group_used)
    kept = ggml.ggml_get_rows(ctx, groups, chosen)
    masked = ggml.ggml_set_rows(ctx, ggml.ggml_fill(ctx, groups, -math.inf), kept, chosen)
    return int(ggml.ggml_reshape_2d(ctx, masked, n_expert, n_rows))


def select_experts(ctx: int, spec: ModelSpec, ranked: int) -> int:
    """The first `n_expert_used` of the ranked experts, I32 [n_expert_used, n_rows]."""
    tensor = ggml.tensor_at(ranked)
    return int(ggml.ggml_view_2d(ctx, ranked, spec.n_expert_used, tensor.ne[1], tensor.nb[1], 0))
