"""A forward pass in torch whose experts obey a rule: which of a token's are skipped, and which use their last copy."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slimoe.converter.forward.block import attend, read_attention, read_expert, read_router, read_shared, read_tensor
from slimoe.converter.forward.routing import route
from slimoe.converter.forward.stream import Sequences
from slimoe.converter.forward.tensor_source import TensorSource
from slimoe.converter.source.model_source import MatrixKey


@dataclass(frozen=True, slots=True, eq=False)
class Selected:
    """What a layer's router selected for the tokens of all sequences, and what a rule may look at.

    `hidden` [n, n_embd] are the hidden states before the experts, `received` [n] the attention weights that each token
    gets from itself and all later ones, summed over heads; `experts` and `weights` [n, n_used] begin with the
    likeliest.
    """

    layer: int
    hidden: Tensor
    received: Tensor
    experts: Tensor
    weights: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Saved:
    """Which selected experts are skipped, and which use their last copy, both bool [n, n_used]."""

    skipped: Tensor
    low: Tensor


Rule = Callable[[Selected], Saved]


def nothing(selected: Selected) -> Saved:
    """Saves on no expert."""
    none = torch.zeros_like(selected.experts, dtype=torch.bool)
    return Saved(none, none)


def run_gated(copies: Sequence[TensorSource], sequences: Sequences, rule: Rule) -> Tensor:
    """The hidden states [n, n_embd] behind the last layer of a model of `copies`, the best first and the last last.

    All but the last copies of experts is the best source's. Of skipped experts the weights go to the token's others,
    as in the engine. Raises ModelFileError.
    """
    best, spec, spans = copies[0], copies[0].spec, list(sequences.spans())
    tokens = torch.tensor([token for one in sequences.tokens for token in one])
    h = read_tensor(best, MatrixKey("token_embd.weight"))[tokens] * spec.multipliers.embedding
    with torch.no_grad():
        for layer in range(spec.n_layer):
            attention, received = read_attention(best, layer), torch.zeros(len(h))
            for begin, end in spans:
                if attention is not None:
                    seen = attend(attention, spec, h[begin:end])
                    h[begin:end] += seen.update
                    received[begin:end] = seen.received
            router = read_router(best, layer)
            if router is None:
                continue
            x = router.norm(h)
            routing = route(router, spec, x)
            selected = Selected(layer, h, received, routing.selected, routing.weights)
            saved = rule(selected)
            h = h + spec.multipliers.residual * _mixture(copies, selected, saved, x)
    return h


def _mixture(copies: Sequence[TensorSource], selected: Selected, saved: Saved, x: Tensor) -> Tensor:
    kept = selected.weights.masked_fill(saved.skipped, 0.0)
    left = kept.sum(1, keepdim=True)
    is_less = saved.skipped.any(1, keepdim=True) & (left > 0)
    weights = torch.where(is_less, kept * selected.weights.sum(1, keepdim=True) / left.clamp(min=1e-30), kept)
    target = torch.tensor(copies[0].layers[selected.layer].target)[selected.experts]
    total = torch.zeros_like(x)
    for number in target.unique().tolist():
        for source, is_this in ((copies[0], ~saved.low), (copies[-1], saved.low)):
            rows, ranks = torch.nonzero((target == number) & is_this & ~saved.skipped, as_tuple=True)
            if len(rows):
                output = read_expert(source, selected.layer, number)(x[rows])
                total.index_add_(0, rows, weights[rows, ranks][:, None] * output)
    shared = read_shared(copies[0], selected.layer)
    return total if shared is None else total + shared(x)
