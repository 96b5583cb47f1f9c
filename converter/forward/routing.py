"""A router in torch: which experts tokens select, and with which weights."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slimoe.converter.forward.norms import Norm
from slimoe.offload.model.expert_spec import ExpertSpec
from slimoe.offload.model.spec import ModelSpec

_LEAST_SUM = 2.0**-14
"""llama.cpp's lower bound of what the probabilities of the selected experts are divided by."""


@dataclass(frozen=True, slots=True)
class Router:
    """The feed-forward part's norm, and the router `weight` [n_row, n_embd].

    `bias` [n_row], if any, is that of its logits, and `choice_bias` [n_row] is added to the scores to select experts,
    but not to their weights. A router that does not read what the experts read has a `scale` [n_embd] of these inputs.
    """

    norm: Norm
    weight: Tensor
    choice_bias: Tensor | None = None
    bias: Tensor | None = None
    scale: Tensor | None = None

    def with_rows(self, rows: Sequence[int]) -> "Router":
        """The router with only some of its rows."""
        own = torch.tensor(rows, device=self.weight.device)
        choice_bias, bias = (None if one is None else one[own] for one in (self.choice_bias, self.bias))
        return Router(self.norm, self.weight[own], choice_bias, bias, self.scale)


@dataclass(frozen=True, slots=True)
class Routing:
    """What a router answers to n tokens: logits and probabilities for all its rows [n, n_row], each by itself if the
    score is a sigmoid; the rows that are selected and their expert weights [n, n_selected], the likeliest first.
    """

    logits: Tensor
    probabilities: Tensor
    selected: Tensor
    weights: Tensor


def route(router: Router, spec: ModelSpec, x: Tensor) -> Routing:
    """The experts that a router selects for their inputs `x` [n, n_embd], the likeliest first."""
    read = x if router.scale is None else x * router.scale
    logits = torch.nn.functional.linear(read, router.weight, router.bias)
    probabilities = logits.sigmoid() if spec.router_score == "sigmoid" else logits.softmax(-1)
    scores = logits if spec.router_score == "softmax_of_selected" else probabilities
    choice = scores if router.choice_bias is None else scores + router.choice_bias
    selected = _of_best_groups(choice, spec.experts).topk(spec.n_expert_selected, -1).indices
    weights = scores.gather(-1, selected)
    if spec.router_score == "softmax_of_selected":
        weights = weights.softmax(-1)
    if spec.renormalises or (spec.n_expert_aux and spec.router_score == "softmax_of_selected"):
        weights = weights / weights[:, : spec.n_expert_used].sum(-1, keepdim=True).clamp(min=_LEAST_SUM)
    return Routing(logits, probabilities, selected, weights * spec.expert_weights_scale)


def _of_best_groups(choice: Tensor, experts: ExpertSpec) -> Tensor:
    """The scores [n, n_row] with -inf in the groups that are not selected, whose two best add up to less."""
    if experts.n_group < 2:
        return choice
    groups = choice.unflatten(-1, (experts.n_group, -1))
    best = groups.topk(2, -1).values.sum(-1).topk(experts.n_group_used, -1).indices
    is_other = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(-1, best, value=False)
    return groups.masked_fill(is_other[..., None], -math.inf).flatten(-2)
