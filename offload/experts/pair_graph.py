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


@dataclass(frozen=True, slots=True)
class PairInputs:
    """The tensors that say which n pairs a graph computes: `tokens` I32 [n] and `columns` I64 [n].

    `weight_rows` I32 [n] are the columns again, as `get_rows` takes them. `experts` I32 [n], the numbers by
    which experts have biases and scales, is 0 where they have none.
    """

    tokens: int
    columns: int
    weight_rows: int
    experts: int = 0


def add_input(ctx: int, kind: Type, n: int) -> int:
    """A vector that is written before each run, and whose memory no other tensor of the graph shares."""
    tensor: int = ggml.ggml_new_tensor_1d(ctx, kind, n)
    ggml.ggml_set_input(tensor)
    ggml.ggml_set_output(tensor)
    return tensor


class PairBuilder:
    """Adds pairs of a step of `n_tokens` tokens to a graph."""

    def __init__(self, ctx: int, graph: int, exchange: Exchange, n_tokens: int) -> None:
        self._ctx, self._graph, self._n_embd = ctx, graph, exchange.shape.n_embd
        n_columns = exchange.shape.n_used * n_tokens
        self._normed = exchange.view(ctx, "normed", (self._n_embd, n_tokens))
        self._weights = exchange.view(ctx, "expert_weights", (1, n_columns))
        self._outputs = exchange.view(ctx, "outputs", (self._n_embd, n_columns))

    def add(self, stacks: Sequence[int], slots: int, n_pairs: int, extras: ExpertExtras = NO_EXTRAS) -> PairInputs:
        """Writes the weighted output of each pair to its column.

        `stacks` are gate, up and down [ne0, ne1, n_stacked], `slots` I32 [n_pairs] the places of the pairs' experts in
        them. `extras` are what the experts have beside their matrices, but for the ids. Each pair is a row of its own,
        so that no row has an expert twice, whatever the pairs are.
        """
        ctx, n_embd = self._ctx, self._n_embd
        inputs = PairInputs(
            tokens=add_input(ctx, Type.I32, n_pairs),
            columns=add_input(ctx, Type.I64, n_pairs),
            weight_rows=add_input(ctx, Type.I32, n_pairs),
            experts=_add_numbers(ctx, extras, n_pairs),
        )
        gathered = ggml.ggml_get_rows(ctx, self._normed, inputs.tokens)
        rows = ggml.ggml_reshape_3d(ctx, gathered, n_embd, 1, n_pairs)
        ids = ggml.ggml_reshape_2d(ctx, slots, 1, n_pairs)
        if inputs.experts:
            extras = replace(extras, ids=int(ggml.ggml_reshape_2d(ctx, inputs.experts, 1, n_pairs)))
        *gate_up, down = stacks
        outputs = add_expert_ffn(ctx, gate_up, down, rows, ids, extras)
        weights = ggml.ggml_get_rows(ctx, self._weights, inputs.weight_rows)
        weighted = ggml.ggml_mul(ctx, outputs, ggml.ggml_reshape_3d(ctx, weights, 1, 1, n_pairs))
        flat = ggml.ggml_reshape_2d(ctx, weighted, n_embd, n_pairs)
        written = ggml.ggml_set_rows(ctx, self._outputs, flat, inputs.columns)
        ggml.ggml_build_forward_expand(self._graph, written)
        return inputs

    def add_token(self, stacks: Sequence[int], slots: int, extras: ExpertExtras = NO_EXTRAS) -> int:
        """Writes the outputs of all experts of a single token, no two of them the same: `slots` I32 [n_expert_used].

        Returns the input for the experts' numbers, 0 where they have no biases or scales.
        """
        ctx, n_used = self._ctx, int(ggml.tensor_at(slots).ne[0])
        rows = ggml.ggml_reshape_3d(ctx, self._normed, self._n_embd, 1, 1)
        experts = _add_numbers(ctx, extras, n_used)
        if experts:
            extras = replace(extras, ids=int(ggml.ggml_reshape_2d(ctx, experts, n_used, 1)))
        *gate_up, down = stacks
        outputs = add_expert_ffn(ctx, gate_up, down, rows, ggml.ggml_reshape_2d(ctx, slots, n_used, 1), extras)
        weighted = ggml.ggml_mul(ctx, outputs, ggml.ggml_reshape_3d(ctx, self._weights, 1, n_used, 1))
        flat = ggml.ggml_reshape_2d(ctx, weighted, self._n_embd, n_used)
        ggml.ggml_build_forward_expand(self._graph, ggml.ggml_cpy(ctx, flat, self._outputs))
        return experts


def _add_numbers(ctx: int, extras: ExpertExtras, n: int) -> int:
    return add_input(ctx, Type.I32, n) if extras.biases or extras.scales else 0
