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

    `weight_rows` I32 [n] are the columns again, as `get_rows` takes them. `tokens` is 0 where no rows are gathered, and
    `experts` I32 [n], the numbers by which experts have biases and scales, where they have none.
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

    def add(
        self, stacks: Sequence[int], slots: int, n_pairs: int, extras: ExpertExtras = NO_EXTRAS, *, gathers: bool = True
    ) -> PairInputs:
        """Writes the weighted output of each pair to its column.

        `stacks` are gate, up and down [ne0, ne1, n_stacked], `slots` I32 [n_pairs] the places of the pairs' experts in
        them. `extras` are what the experts have beside their matrices, but for the ids. Unless it gathers the pairs'
        rows, they are those of a single token, and no two of the same expert.
        """
        ctx, n_embd = self._ctx, self._n_embd
        inputs = PairInputs(
            tokens=add_input(ctx, Type.I32, n_pairs) if gathers else 0,
            columns=add_input(ctx, Type.I64, n_pairs),
            weight_rows=add_input(ctx, Type.I32, n_pairs),
            experts=add_input(ctx, Type.I32, n_pairs) if extras.biases or extras.scales else 0,
        )
        gathered = ggml.ggml_get_rows(ctx, self._normed, inputs.tokens) if gathers else self._normed
        n_rows = n_pairs if gathers else 1
        rows = ggml.ggml_reshape_3d(ctx, gathered, n_embd, 1, n_rows)
        ids = ggml.ggml_reshape_2d(ctx, slots, n_pairs // n_rows, n_rows)
        if inputs.experts:
            numbers = int(ggml.ggml_reshape_2d(ctx, inputs.experts, n_pairs // n_rows, n_rows))
            extras = replace(extras, ids=numbers)
        *gate_up, down = stacks
        outputs = add_expert_ffn(ctx, gate_up, down, rows, ids, extras)
        weights = ggml.ggml_get_rows(ctx, self._weights, inputs.weight_rows)
        weighted = ggml.ggml_mul(ctx, outputs, ggml.ggml_reshape_3d(ctx, weights, 1, n_pairs // n_rows, n_rows))
        flat = ggml.ggml_reshape_2d(ctx, weighted, n_embd, n_pairs)
        written = ggml.ggml_set_rows(ctx, self._outputs, flat, inputs.columns)
        ggml.ggml_build_forward_expand(self._graph, written)
        return inputs
