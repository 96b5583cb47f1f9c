"""Adds selected experts to a graph, pair by pair, between the tensors of an exchange.

A *pair* is one token and one of the experts that the router selected for it. A pair has its place in the `outputs`, its
column: token * n_expert_used + rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from gguf import GGMLQuantizationType as Type

from slimoe.offload.ggml import ops as ggml
from slimoe.offload.graph.exchange import Exchange
from slimoe.offload.graph.expert_ffn import NO_EXTRAS, ExpertExtras, add_expert_ffn
from slimoe.offload.graph.linear import add_factors


@dataclass(frozen=True, slots=True)
class PairInputs:
    """The tensors that say which n pairs a graph computes: the pairs' `slots`, `columns` and `tokens`, all I32 [n].

    `tokens` is 0 if all pairs are one token's, each with an expert of its own. `experts` I32 [n], the numbers by which
    experts have biases and scales, is 0 where they have none.
    """

    slots: int
    columns: int
    tokens: int = 0
    experts: int = 0

    def one(self, ctx: int, pair: int) -> "PairInputs":
        """Those of a single pair among them."""
        every = (self.slots, self.columns, self.tokens, self.experts)
        return PairInputs(*(int(ggml.ggml_view_1d(ctx, one, 1, 4 * pair)) if one else 0 for one in every))

    @classmethod
    def apart(cls, ctx: int, n_pairs: int, extras: ExpertExtras) -> "PairInputs":
        """Inputs for pairs of any tokens, each of them a tensor of its own."""
        return cls(
            slots=add_input(ctx, n_pairs),
            columns=add_input(ctx, n_pairs),
            tokens=add_input(ctx, n_pairs),
            experts=add_input(ctx, n_pairs) if extras.has_vectors else 0,
        )


def add_input(ctx: int, n: int, kind: Type = Type.I32) -> int:
    """A vector that is written before each run, and whose memory no other tensor of the graph shares."""
    tensor: int = ggml.ggml_new_tensor_1d(ctx, kind, n)
    ggml.ggml_set_input(tensor)
    ggml.ggml_set_output(tensor)
    return tensor


class PairBuilder:
    """Adds pairs of a step of `n_tokens` tokens to a graph."""

    def __init__(self, ctx: int, graph: int, exchange: Exchange, n_tokens: int) -> None:
        self._ctx, self._graph, self._n_embd = ctx, graph, exchange.shape.n_embd_expert
        n_used, n_columns = exchange.shape.n_used, exchange.shape.n_used * n_tokens
        self._normed = exchange.view(ctx, "normed", (self._n_embd, n_tokens))
        weights = exchange.view(ctx, "expert_weights", (n_used, n_tokens))
        self._weights = int(ggml.ggml_reshape_2d(ctx, weights, 1, n_columns))
        self._outputs = exchange.view(ctx, "outputs", (self._n_embd, n_columns))

    def add(self, stacks: Sequence[int], inputs: PairInputs, extras: ExpertExtras = NO_EXTRAS) -> None:
        """Writes the weighted output of each pair to its column.

        `stacks` are gate, up and down [ne0, ne1, n_stacked], in which the pairs' experts have the places
        `inputs.slots`. `extras` are what the experts have beside their matrices, but for the ids. Pairs of any tokens
        are rows of their own, so that no row has an expert twice, whatever the pairs are.
        """
        ctx, n_embd, n_pairs = self._ctx, self._n_embd, int(ggml.tensor_at(inputs.slots).ne[0])
        seen, selected = self._normed, (n_pairs, 1)
        if inputs.tokens:
            seen, selected = ggml.ggml_get_rows(ctx, self._normed, inputs.tokens), (1, n_pairs)
        rows = ggml.ggml_reshape_3d(ctx, seen, n_embd, 1, selected[1])
        ids = ggml.ggml_reshape_2d(ctx, inputs.slots, *selected)
        if inputs.experts:
            extras = replace(extras, ids=int(ggml.ggml_reshape_2d(ctx, inputs.experts, *selected)))
        *gate_up, down = stacks
        outputs = add_expert_ffn(ctx, gate_up, down, rows, ids, extras)
        weights = ggml.ggml_get_rows(ctx, self._weights, inputs.columns)
        each = int(ggml.ggml_reshape_3d(ctx, weights, 1, *selected))
        weighted = add_factors(ctx, outputs, each, on_cpu=extras.on_cpu)
        flat = ggml.ggml_reshape_2d(ctx, weighted, n_embd, n_pairs)
        written = ggml.ggml_set_rows(ctx, self._outputs, flat, inputs.columns)
        ggml.ggml_build_forward_expand(self._graph, written)

    def add_token(self, stacks: Sequence[int], slots: int, extras: ExpertExtras = NO_EXTRAS) -> int:
        """Writes the outputs of all experts of a single token, no two of them the same: `slots` I32 [n_expert_used].

        Returns the input for the experts' numbers, 0 where they have no biases or scales.
        """
        ctx, n_used = self._ctx, int(ggml.tensor_at(slots).ne[0])
        rows = ggml.ggml_reshape_3d(ctx, self._normed, self._n_embd, 1, 1)
        experts = add_input(ctx, n_used) if extras.has_vectors else 0
        if experts:
            extras = replace(extras, ids=int(ggml.ggml_reshape_2d(ctx, experts, n_used, 1)))
        *gate_up, down = stacks
        outputs = add_expert_ffn(ctx, gate_up, down, rows, ggml.ggml_reshape_2d(ctx, slots, n_used, 1), extras)
        each = int(ggml.ggml_reshape_3d(ctx, self._weights, 1, n_used, 1))
        weighted = add_factors(ctx, outputs, each, on_cpu=extras.on_cpu)
        flat = ggml.ggml_reshape_2d(ctx, weighted, self._n_embd, n_used)
        ggml.ggml_build_forward_expand(self._graph, ggml.ggml_cpy(ctx, flat, self._outputs))
        return experts
