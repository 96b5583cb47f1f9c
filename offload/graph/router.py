"""The router: which experts a token selects, and with which weights."""

import math
from dataclasses import dataclass

import numpy as np

from slimoe.offload.ggml import ops as ggml
from slimoe.offload.graph.linear import add_linear
from slimoe.offload.graph.weights import LayerWeights
from slimoe.offload.model.spec import ModelSpec

LEAST_SUM = 2.0**-14
"""llama.cpp's lower bound of what the weights of the selected experts are divided by, F16's least normal number."""


@dataclass(frozen=True, slots=True)
class Selection:
    """What a router says, as tensor addresses: all experts from the likeliest on, `ranked` I32 [n_expert, n_rows], and
    the `weights` F32 [1, n_expert_used, n_rows] of those that are computed.

    `aux_weights` F32 [n_expert_aux, n_rows] are those of the further ones for which vectors stand, 0 without any.
    """

    ranked: int
    weights: int
    aux_weights: int = 0


def router_input(ctx: int, spec: ModelSpec, layer: LayerWeights, plain: int, normed: int) -> int:
    """What a layer's router reads, [n_embd, n_rows]: the experts' input `normed`, or where it has a vector of its own
    the residual stream that is normalised, but not yet weighted, `plain`.
    """
    if not layer.router_scale:
        return normed
    factor = np.float32(1.0) / np.sqrt(np.float32(spec.n_embd))
    return int(ggml.ggml_mul(ctx, ggml.ggml_scale(ctx, plain, float(factor)), layer.router_scale))


def add_router(ctx: int, spec: ModelSpec, layer: LayerWeights, read: int) -> Selection:
    """The experts that a token selects, with their weights; `read` is the router's input."""
    scores = _add_scores(ctx, spec, layer, read)
    n_expert, n_rows = ggml.tensor_at(scores).ne[:2]
    choice = ggml.ggml_add(ctx, scores, layer.choice_bias) if layer.choice_bias else scores
    if spec.experts.n_group > 1:
        choice = _add_group_choice(ctx, spec, choice)
    ranked = int(ggml.ggml_argsort(ctx, choice, ggml.SORT_DESCENDING))
    selected = _ranks(ctx, ranked, 0, spec.n_expert_selected)
    found = ggml.ggml_get_rows(ctx, ggml.ggml_reshape_3d(ctx, scores, 1, n_expert, n_rows), selected)
    weights = ggml.ggml_reshape_2d(ctx, found, spec.n_expert_selected, n_rows)
    if spec.router_score == "softmax_of_selected":
        weights = ggml.ggml_soft_max(ctx, weights)
    if spec.renormalises or (spec.n_expert_aux and spec.router_score == "softmax_of_selected"):
        computed = _ranks(ctx, weights, 0, spec.n_expert_used) if spec.n_expert_aux else weights
        total = ggml.ggml_sum_rows(ctx, computed)
        # The largest of n softmax values are never so small, but a bias or groups may select others.
        if spec.router_score != "softmax" or layer.choice_bias or spec.experts.n_group > 1:
            total = ggml.ggml_clamp(ctx, total, LEAST_SUM, math.inf)
        weights = ggml.ggml_div(ctx, weights, total)
    if spec.expert_weights_scale not in (0.0, 1.0):
        weights = ggml.ggml_scale(ctx, weights, spec.expert_weights_scale)
    if not spec.n_expert_aux:
        return Selection(ranked, int(ggml.ggml_reshape_3d(ctx, weights, 1, spec.n_expert_used, n_rows)))
    main = ggml.ggml_cont(ctx, _ranks(ctx, weights, 0, spec.n_expert_used))
    aux = ggml.ggml_cont(ctx, _ranks(ctx, weights, spec.n_expert_used, spec.n_expert_aux))
    return Selection(ranked, int(ggml.ggml_reshape_3d(ctx, main, 1, spec.n_expert_used, n_rows)), int(aux))


def add_choice(ctx: int, spec: ModelSpec, layer: LayerWeights, read: int) -> int:
    """What says which experts are the likeliest, F32 [n_expert, n_rows]: scores, with the bias that only selects."""
    scores = _add_scores(ctx, spec, layer, read, is_plain=not layer.choice_bias)
    return int(ggml.ggml_add(ctx, scores, layer.choice_bias)) if layer.choice_bias else scores


def _add_scores(ctx: int, spec: ModelSpec, layer: LayerWeights, read: int, *, is_plain: bool = False) -> int:
    """The router's scores F32 [n_expert, n_rows], or logits if `is_plain`."""
    assert layer.router is not None
    logits = add_linear(ctx, layer.router, read)
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
    """The experts that are computed, the first `n_expert_used` of the ranked ones, I32 [n_expert_used, n_rows]."""
    return _ranks(ctx, ranked, 0, spec.n_expert_used)


def aux_experts(ctx: int, spec: ModelSpec, ranked: int) -> int:
    """The selected experts for which vectors stand, I32 [n_expert_aux, n_rows]."""
    return _ranks(ctx, ranked, spec.n_expert_used, spec.n_expert_aux)


def _ranks(ctx: int, tensor: int, begin: int, n: int) -> int:
    """Elements `begin` to `begin` + `n` of each row of a matrix."""
    matrix = ggml.tensor_at(tensor)
    return int(ggml.ggml_view_2d(ctx, tensor, n, matrix.ne[1], matrix.nb[1], begin * matrix.nb[0]))
