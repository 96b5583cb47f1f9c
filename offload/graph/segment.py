"""Builds the graphs of a step that is cut at routers whose experts are not all at hand.

A segment begins with the token rows, or with the sum of the experts' outputs of the layer where the one before ended.
It ends at the next cut layer's router, at the last layer of a backend, or with the logits. Everything between is
`BlockBuilder`'s, in llama.cpp's order, so that the cut changes no bit. The last operations of a cut layer also compute
what the routers of the next cut layers would say to this layer's input, from which the experts to prefetch are
predicted: most of a model changes its hidden states little from layer to layer.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from slimoe.offload.ggml import ops as ggml
from slimoe.offload.graph.attention import StepInputs, StepShape
from slimoe.offload.graph.exchange import Exchange
from slimoe.offload.graph.expert_ffn import expert_input
from slimoe.offload.graph.linear import add_norm, add_scaled
from slimoe.offload.graph.recurrent import StateViews
from slimoe.offload.graph.router import Selection, add_choice, add_router, router_input
from slimoe.offload.graph.step import BlockBuilder, add_ones, new_graph
from slimoe.offload.graph.weights import ModelWeights
from slimoe.offload.memory.kv_cache import KVCache
from slimoe.offload.model.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Segment:
    """Layers `first` to `last`, on the device part number `part`; `first` is `last` + 1 where there is none.

    It begins with the sum of layer `summed`'s experts or, where that is -1, with the tokens or what another part handed
    over. It ends with the router of layer `last`, with that layer's whole output, or with the logits. `predicted` are
    later cut layers whose routers are asked early.
    """

    part: int
    summed: int
    first: int
    last: int
    end: Literal["router", "hidden", "logits"]
    predicted: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class SegmentGraph:
    """A built graph; `logits` F32 [n_vocab, n_out] is 0 in every segment but the last, as is `hidden`.

    The `views` must be moved before each run.
    """

    ctx: int
    graph: int
    logits: int
    hidden: int
    views: StateViews | None


def cut_into_segments(
    parts: Sequence[Sequence[int]], cut_layers: Collection[int], prefetch_depth: int
) -> tuple[Segment, ...]:
    """The segments of a step.

    `parts` are the consecutive layers of each device part, none for one that only looks tokens up. `cut_layers` are
    those whose experts are not all in a graph; a segment asks the routers of the next `prefetch_depth` of its part.
    """
    segments = []
    for part, layers in enumerate(parts):
        cut = [layer for layer in layers if layer in cut_layers]
        summed, first, last = -1, *((layers[0], layers[-1]) if layers else (0, -1))
        for index, layer in enumerate(cut):
            predicted = tuple(cut[index + 1 : index + 1 + prefetch_depth])
            segments.append(Segment(part, summed, first, layer, "router", predicted))
            summed, first = layer, layer + 1
        segments.append(Segment(part, summed, first, last, "logits" if part == len(parts) - 1 else "hidden"))
    return tuple(segments)


def build_segment(
    spec: ModelSpec,
    weights: ModelWeights,
    cache: KVCache | None,
    shape: StepShape,
    exchange: Exchange,
    segment: Segment,
) -> SegmentGraph:
    """Builds the graph of one segment, whose inputs and outputs lie in the exchange of its device part."""
    ctx, graph = new_graph(spec, 1 + segment.last - segment.first)
    vectors = (exchange.tensor(name) for name in ("tokens", "positions", "cells", "temperatures", "window_cells"))
    tokens, positions, cells, temperatures, window_cells = (
        int(ggml.ggml_view_1d(ctx, vector, shape.n_tokens, 0)) for vector in vectors
    )
    mask = 0 if cache is None else exchange.view(ctx, "mask", (shape.n_kv, shape.n_tokens))
    has_windows = cache is not None and any(spec.windowed)
    window_mask = exchange.view(ctx, "window_mask", (shape.n_window_kv, shape.n_tokens)) if has_windows else 0
    temperatures = temperatures if spec.attention.temperature else 0
    states = [0, 0, 0]
    if spec.recurrent:
        n_rows = shape.n_runs * spec.recurrent.n_parts
        lengths = {"states_from": n_rows, "states_to": n_rows, "states_read": shape.n_runs}
        states = [int(ggml.ggml_view_1d(ctx, exchange.tensor(name), n, 0)) for name, n in lengths.items()]
    inputs = StepInputs(tokens, positions, cells, mask, window_cells, window_mask, temperatures, *states)
    views = StateViews() if shape.n_runs == 1 and exchange.is_host else None
    ones = add_ones(ctx, spec, shape.n_tokens) if exchange.on_cpu else 0
    blocks = BlockBuilder(ctx, graph, spec, weights, cache, shape, inputs, views=views, ones=ones)
    hidden = _first_hidden(blocks, exchange, segment)
    for index in range(segment.first, segment.last + 1):
        hidden = blocks.add_attention(index, hidden)
        if index < segment.last or segment.end != "router":
            hidden = blocks.add_feed_forward(index, hidden)
    if segment.end == "logits":
        normed = blocks.add_output_norm(hidden)
        return SegmentGraph(ctx, graph, blocks.add_logits(normed), normed, views)
    if segment.end == "router":
        _add_selection(blocks, exchange, segment, hidden)
    else:
        _hand_out(blocks, exchange, hidden, "residual", (spec.n_embd, shape.n_tokens))
    return SegmentGraph(ctx, graph, 0, 0, views)


def _first_hidden(blocks: BlockBuilder, exchange: Exchange, segment: Segment) -> int:
    """What the first layer of a segment reads, [n_embd, n_rows]."""
    ctx, spec = blocks.ctx, blocks.spec
    if segment.summed >= 0:
        n_used, n_rows, length = spec.n_expert_used, blocks.n_rows(segment.summed), spec.n_embd_expert
        outputs = ggml.ggml_view_3d(
            ctx, exchange.tensor("outputs"), length, n_used, n_rows, 4 * length, 4 * length * n_used, 0
        )
        residual = exchange.view(ctx, "residual", (spec.n_embd, n_rows))
        normed = _shared_input(blocks, exchange, segment.summed, residual)
        ranked = exchange.view(ctx, "ranked", (spec.layer_shape(segment.summed).n_expert, n_rows))
        aux = exchange.view(ctx, "aux_weights", (spec.n_expert_aux, n_rows)) if spec.n_expert_aux else 0
        return blocks.add_experts(segment.summed, outputs, normed, residual, Selection(ranked, 0, aux))
    if segment.part == 0:
        return blocks.add_embeddings()
    residual = exchange.view(ctx, "residual", (spec.n_embd, blocks.shape.n_tokens))
    if spec.layer_shape(segment.first).has_attention:
        return residual
    # Without attention, rows of it would be handed out over themselves: they must lie elsewhere.
    return int(ggml.ggml_scale(ctx, residual, 1.0))


def _shared_input(blocks: BlockBuilder, exchange: Exchange, index: int, residual: int) -> int:
    """What the shared expert of a layer reads, which is what the others read unless these read fewer values."""
    spec, layer = blocks.spec, blocks.weights.layers[index]
    if not layer.expert_latent:
        return exchange.view(blocks.ctx, "normed", (spec.n_embd, blocks.n_rows(index)))
    assert layer.ffn_norm is not None
    return add_norm(blocks.ctx, residual, layer.ffn_norm, spec.rms_eps)


def _add_selection(blocks: BlockBuilder, exchange: Exchange, segment: Segment, hidden: int) -> None:
    """Hands out the residual stream, the experts' input, the router's selection, and what later routers say to it."""
    ctx, spec, n_rows = blocks.ctx, blocks.spec, blocks.n_rows(segment.last)
    layer = blocks.weights.layers[segment.last]
    assert layer.ffn_norm is not None
    plain = int(ggml.ggml_rms_norm(ctx, hidden, spec.rms_eps))
    normed = add_scaled(ctx, plain, layer.ffn_norm)
    selection = add_router(ctx, spec, layer, router_input(ctx, spec, layer, plain, normed))
    n_expert = int(ggml.tensor_at(selection.ranked).ne[0])
    _hand_out(blocks, exchange, hidden, "residual", (spec.n_embd, n_rows))
    _hand_out(blocks, exchange, expert_input(ctx, layer, normed), "normed", (spec.n_embd_expert, n_rows))
    _hand_out(blocks, exchange, selection.weights, "expert_weights", (spec.n_expert_used, n_rows))
    if selection.aux_weights:
        _hand_out(blocks, exchange, selection.aux_weights, "aux_weights", (spec.n_expert_aux, n_rows))
    _hand_out(blocks, exchange, selection.ranked, "ranked", (n_expert, n_rows))
    for row, index in enumerate(segment.predicted if n_rows == 1 else ()):
        later = blocks.weights.layers[index]
        assert later.ffn_norm is not None
        read = router_input(ctx, spec, later, plain, add_scaled(ctx, plain, later.ffn_norm))
        logits = add_choice(ctx, spec, later, read)
        n_expert = int(ggml.tensor_at(logits).ne[0])
        target = exchange.view(ctx, "early_logits", (n_expert, 1), row * spec.n_expert)
        flat = ggml.ggml_reshape_2d(ctx, logits, n_expert, 1)
        ggml.ggml_build_forward_expand(blocks.graph, ggml.ggml_cpy(ctx, flat, target))


def _hand_out(blocks: BlockBuilder, exchange: Exchange, tensor: int, name: str, ne: tuple[int, int]) -> None:
    """Copies a tensor to the beginning of one of the exchange's."""
    shaped = ggml.ggml_reshape_2d(blocks.ctx, tensor, *ne)
    copied = ggml.ggml_cpy(blocks.ctx, shaped, exchange.view(blocks.ctx, name, ne))
    ggml.ggml_build_forward_expand(blocks.graph, copied)
