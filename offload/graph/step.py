"""Builds the computation of one step of a model, dense or mixture-of-experts.

The operations are llama.cpp's for the same architecture, in its order, so that the logits are its logits to the last
bit: with quantised weights a difference in the last bit of a sum soon rounds an activation to another integer, and
sometimes selects another expert. Two things save work: joined matrices are multiplied once, and in the last layer only
the rows whose logits are wanted pass through the queries and the feed-forward part (few rows may take another attention
kernel than many, so these logits are equal within rounding; what the KV cache holds is the same).
"""

from dataclasses import dataclass

import numpy as np
from gguf import GGMLQuantizationType as Type

from slimoe.offload.ggml import ops as ggml
from slimoe.offload.graph.attention import AttentionBuilder, StepInputs, StepShape
from slimoe.offload.graph.expert_ffn import (
    add_aux_experts,
    add_dense_ffn,
    add_expert_ffn,
    add_expert_sum,
    add_shared_expert,
    expert_input,
    layer_extras,
)
from slimoe.offload.graph.expert_lookup import NODES_PER_EXPERT, NODES_PER_LAYER, ExpertLookup
from slimoe.offload.graph.latent_attention import LatentAttentionBuilder
from slimoe.offload.graph.linear import (
    add_factors,
    add_linear,
    add_norm,
    add_rms_norm,
    add_scaled,
    in_parts,
    last_rows,
)
from slimoe.offload.graph.recurrent import RecurrentBuilder, StateViews
from slimoe.offload.graph.router import Selection, add_router, aux_experts, router_input, select_experts
from slimoe.offload.graph.weights import LayerWeights, ModelWeights
from slimoe.offload.memory.kv_cache import KVTensors
from slimoe.offload.model.spec import ModelSpec

WATCHED_TOKENS = 4
"""Steps of at most so many tokens tell which experts they selected, as answers do and prompts do not."""


@dataclass(frozen=True, slots=True)
class StepGraph:
    """A built graph: its ggml context (owned by whoever holds this), inputs, and F32 logits [n_vocab, n_out].

    `hidden` F32 [n_embd, n_tokens] are the hidden states that logits are made of, where they are wanted. `ranked` are
    the layers whose experts stay to be looked at, each with them ranked, I32 [n_expert, n_rows]. `views` must be moved
    before each run.
    """

    ctx: int
    graph: int
    inputs: StepInputs
    logits: int
    hidden: int
    views: StateViews | None
    ranked: tuple[tuple[int, int], ...] = ()


def build_step(
    spec: ModelSpec, weights: ModelWeights, cache: KVTensors, shape: StepShape, lookup: ExpertLookup | None = None
) -> StepGraph:
    """Builds the graph of one whole step in host memory; nothing is allocated for it yet.

    Experts of layers in `lookup`, which is for steps of one token, are not in the `weights`.
    """
    ctx, graph = new_graph(spec, spec.n_layer, is_looked_up=lookup is not None)
    has_window = {spec.window(layer) > 0 for layer in spec.attention_layers}
    views = StateViews() if shape.n_runs == 1 else None
    n_states = shape.n_runs * spec.recurrent.n_parts if spec.recurrent and views is None else 0
    reads_whole = spec.recurrent is not None and spec.recurrent.reads_whole
    masks = [
        int(ggml.ggml_new_tensor_2d(ctx, Type.F16, n_kv, shape.n_tokens)) if is_used in has_window else 0
        for is_used, n_kv in ((False, shape.n_kv), (True, shape.n_window_kv))
    ]
    inputs = StepInputs(
        tokens=int(ggml.ggml_new_tensor_1d(ctx, Type.I32, shape.n_tokens)),
        positions=int(ggml.ggml_new_tensor_1d(ctx, Type.I32, shape.n_tokens)) if spec.rope.n_rot else 0,
        cells=int(ggml.ggml_new_tensor_1d(ctx, Type.I64, shape.n_tokens)) if masks[0] else 0,
        mask=masks[0],
        window_cells=int(ggml.ggml_new_tensor_1d(ctx, Type.I64, shape.n_tokens)) if masks[1] else 0,
        window_mask=masks[1],
        temperatures=int(ggml.ggml_new_tensor_1d(ctx, Type.F32, shape.n_tokens)) if spec.attention.temperature else 0,
        states_from=int(ggml.ggml_new_tensor_1d(ctx, Type.I32, n_states)) if n_states else 0,
        states_to=int(ggml.ggml_new_tensor_1d(ctx, Type.I64, n_states)) if n_states else 0,
        states_read=int(ggml.ggml_new_tensor_1d(ctx, Type.I32, shape.n_runs)) if reads_whole else 0,
    )
    vectors = inputs.tokens, inputs.positions, inputs.cells, inputs.temperatures
    states = inputs.states_from, inputs.states_to, inputs.states_read
    for tensor in (*vectors, *states, inputs.window_cells, inputs.mask, inputs.window_mask):
        if tensor:
            ggml.ggml_set_input(tensor)
    ranked: list[tuple[int, int]] | None = [] if shape.n_tokens <= WATCHED_TOKENS else None
    ones = add_ones(ctx, spec, shape.n_tokens)
    blocks = BlockBuilder(ctx, graph, spec, weights, cache, shape, inputs, ranked, lookup, views, ones)
    if lookup is not None:
        lookup.begin(ctx, graph)
    hidden = blocks.add_embeddings()
    for index in range(spec.n_layer):
        hidden = blocks.add_feed_forward(index, blocks.add_attention(index, hidden))
    normed = blocks.add_output_norm(hidden)
    return StepGraph(ctx, graph, inputs, blocks.add_logits(normed), normed, views, tuple(ranked or ()))


def new_graph(spec: ModelSpec, n_layers: int, *, is_looked_up: bool = False) -> tuple[int, int]:
    """A ggml context and an empty graph in it, with room for so many of the model's blocks."""
    n_nodes, n_bytes = _graph_size(spec, n_layers, is_looked_up=is_looked_up)
    ctx = int(ggml.ggml_init(ggml.InitParams(n_bytes, None, True)))
    return ctx, int(ggml.ggml_new_graph_custom(ctx, n_nodes, False))


def graph_bytes(spec: ModelSpec, *, is_looked_up: bool) -> int:
    """Bytes of a whole step's graph itself, without its intermediate results."""
    return _graph_size(spec, spec.n_layer, is_looked_up=is_looked_up)[1]


def _graph_size(spec: ModelSpec, n_layers: int, *, is_looked_up: bool) -> tuple[int, int]:
    """The most tensors of a graph, and its bytes."""
    n_nodes = 64 + n_layers * (128 + 2 * spec.n_expert_used + 4 * spec.n_expert_aux)
    if is_looked_up:
        n_nodes += n_layers * (NODES_PER_LAYER + NODES_PER_EXPERT * spec.n_expert_used)
    n_bytes = n_nodes * ggml.ggml_tensor_overhead() + ggml.ggml_graph_overhead_custom(n_nodes, False)
    return n_nodes, n_bytes


def add_ones(ctx: int, spec: ModelSpec, n_tokens: int) -> int:
    """Ones F32 [1, n, n_tokens] for as many experts as a token selects."""
    n = max(1, spec.n_expert_used, spec.n_expert_aux)
    return int(ggml.ggml_fill(ctx, ggml.ggml_new_tensor_3d(ctx, Type.F32, 1, n, n_tokens), 1.0))


def add_embeddings(ctx: int, spec: ModelSpec, table: int, tokens: int) -> int:
    """The token rows of a step, [n_embd, n_tokens], from the table's."""
    return _times(ctx, int(ggml.ggml_get_rows(ctx, table, tokens)), spec.multipliers.embedding)


def _times(ctx: int, tensor: int, factor: float) -> int:
    return tensor if factor == 1.0 else int(ggml.ggml_scale(ctx, tensor, factor))


def _inverse(factor: float) -> float:
    """One over a factor, in F32."""
    return float(np.float32(1.0) / np.float32(factor))


@dataclass(frozen=True, slots=True)
class BlockBuilder:
    """Adds a model's blocks to one graph; tensors are addresses. A graph without blocks needs no `cache`."""

    ctx: int
    graph: int
    spec: ModelSpec
    weights: ModelWeights
    cache: KVTensors | None
    shape: StepShape
    inputs: StepInputs
    ranked: list[tuple[int, int]] | None = None
    """Where layers and their ranked experts go, which then outlive the graph's run; None where nobody looks at them."""
    lookup: ExpertLookup | None = None
    views: StateViews | None = None
    ones: int = 0
    """What `add_ones` gives, where the CPU computes the graph."""

    @property
    def on_cpu(self) -> bool:
        """Whether the CPU computes the graph."""
        return bool(self.ones)

    def add_embeddings(self) -> int:
        """The token rows of a step, [n_embd, n_tokens]."""
        return add_embeddings(self.ctx, self.spec, self.weights.token_embd, self.inputs.tokens)

    def _scaled(self, tensor: int, factor: float) -> int:
        return _times(self.ctx, tensor, factor)

    def n_rows(self, index: int) -> int:
        """Rows that leave layer `index`: in the last one only those that are wanted."""
        return self.shape.n_last if index == self.spec.n_layer - 1 else self.shape.n_tokens

    def add_attention(self, index: int, hidden: int) -> int:
        """The first half of a block, from [n_embd, n_tokens] to [n_embd, n_rows]; a block can be without one."""
        ctx, spec, layer, n_rows = self.ctx, self.spec, self.weights.layers[index], self.n_rows(index)
        if layer.attn_norm is None:
            return last_rows(ctx, hidden, n_rows)
        assert self.cache is not None
        if layer.recurrent is not None:
            assert spec.recurrent is not None
            shape, inputs = self.shape, self.inputs
            tensors = self.cache, shape, inputs, self.views
            recurrent = RecurrentBuilder(ctx, self.graph, spec, spec.recurrent, *tensors, self.on_cpu)
            output = recurrent.add(index, layer, add_norm(ctx, hidden, layer.attn_norm, spec.rms_eps))
            return self._added(layer, output, hidden, n_rows)
        builder = AttentionBuilder if layer.latent is None else LatentAttentionBuilder
        attention = builder(ctx, self.graph, spec, self.cache, self.shape, self.inputs, self.weights.rope_freqs)
        n_queries = self.shape.n_queries if index == spec.n_layer - 1 else self.shape.n_tokens
        output = attention.add(index, layer, add_norm(ctx, hidden, layer.attn_norm, spec.rms_eps), n_queries)
        return self._added(layer, output, hidden, n_rows)

    def _added(self, layer: LayerWeights, output: int, hidden: int, n_rows: int) -> int:
        """The last rows of a block's first half added to the residual stream."""
        update = self._normed(last_rows(self.ctx, output, n_rows), layer.post.attention)
        update = self._scaled(update, self.spec.multipliers.residual)
        return int(ggml.ggml_add(self.ctx, update, last_rows(self.ctx, hidden, n_rows)))

    def add_feed_forward(self, index: int, hidden: int) -> int:
        """The second half of a block, [n_embd, n_rows], dense or of experts; a block can be without one."""
        ctx, spec, layer = self.ctx, self.spec, self.weights.layers[index]
        if layer.ffn_norm is None:
            return self._finished(layer, hidden)
        plain = int(ggml.ggml_rms_norm(ctx, hidden, spec.rms_eps))
        normed = add_scaled(ctx, plain, layer.ffn_norm)
        if layer.router is None:
            update = add_dense_ffn(ctx, layer, normed, spec.architecture.activation)
            return int(ggml.ggml_add(ctx, self._scaled(update, spec.multipliers.residual), hidden))
        selection = add_router(ctx, spec, layer, router_input(ctx, spec, layer, plain, normed))
        if self.ranked is not None:
            ggml.ggml_set_output(selection.ranked)
            self.ranked.append((index, selection.ranked))
        ids, read = select_experts(ctx, spec, selection.ranked), expert_input(ctx, layer, normed)
        if self.lookup is not None and index in self.lookup:
            outputs = self.lookup.add(ctx, self.graph, index, read, ids)
        else:
            rows = ggml.ggml_reshape_3d(ctx, read, spec.n_embd_expert, 1, ggml.tensor_at(read).ne[1])
            stacks = [part.weight for part in layer.gate_up]
            extras = layer_extras(ctx, spec.architecture, layer, ids, on_cpu=self.on_cpu)
            outputs = add_expert_ffn(ctx, stacks, layer.down.weight, rows, ids, extras)
        weighted = add_factors(ctx, outputs, selection.weights, on_cpu=self.on_cpu)
        return self.add_experts(index, weighted, normed, hidden, selection)

    def add_experts(self, index: int, outputs: int, normed: int, hidden: int, selection: Selection) -> int:
        """The end of a block of experts, [n_embd, n_rows]: the residual stream `hidden`, the weighted `outputs`
        [n_embd_expert, n_expert_used, n_rows] of the computed experts, what stands for others that are selected, and
        the shared expert's output for the input `normed`.
        """
        ctx, layer = self.ctx, self.weights.layers[index]
        update, shared = add_expert_sum(ctx, outputs, self.ones), layer.shared
        if selection.aux_weights:
            ids = aux_experts(ctx, self.spec, selection.ranked)
            update = add_aux_experts(ctx, layer, update, ids, selection.aux_weights, self.ones)
        if layer.expert_latent:
            update = add_linear(ctx, layer.expert_latent[1], update)
        update = self._normed(update, layer.post.experts)
        if shared is not None:
            read = self._normed(hidden, shared.norm) if shared.norm else normed
            beside = add_shared_expert(ctx, shared, read, self.spec.architecture, on_cpu=self.on_cpu)
            update = int(ggml.ggml_add(ctx, update, self._normed(beside, shared.post_norm)))
        update = self._scaled(self._normed(update, layer.post.ffn), self.spec.multipliers.residual)
        return self._finished(layer, int(ggml.ggml_add(ctx, update, hidden)))

    def _normed(self, rows: int, norm: int) -> int:
        """Rows that are normalised where there is a norm."""
        return add_rms_norm(self.ctx, rows, norm, self.spec.rms_eps) if norm else rows

    def _finished(self, layer: LayerWeights, hidden: int) -> int:
        """The residual stream as it leaves a block."""
        if not layer.post.scale:
            return hidden
        return add_factors(self.ctx, hidden, layer.post.scale, on_cpu=self.on_cpu)

    def add_output_norm(self, hidden: int) -> int:
        """The last layer's output, normalised, [n_embd, n_last]; the graph's own output where it is wanted."""
        normed = add_norm(self.ctx, hidden, self.weights.output_norm, self.spec.rms_eps)
        if self.shape.has_hidden:
            ggml.ggml_set_output(normed)
        return normed

    def add_logits(self, normed: int) -> int:
        """The logits of the last hidden states, F32 [n_vocab, n_out], as the graph's own output."""
        rows = last_rows(self.ctx, normed, self.shape.n_out)
        logits = self._scaled(add_linear(self.ctx, self.weights.output, rows), self.spec.multipliers.logits)
        if softcap := self.spec.multipliers.softcap:
            ne, parts = ggml.tensor_at(logits).ne[:2], in_parts(self.ctx, logits)
            bounded = ggml.ggml_tanh(self.ctx, ggml.ggml_scale(self.ctx, parts, _inverse(softcap)))
            logits = int(ggml.ggml_reshape_2d(self.ctx, ggml.ggml_scale(self.ctx, bounded, softcap), *ne))
        ggml.ggml_set_output(logits)
        ggml.ggml_build_forward_expand(self.graph, logits)
        return logits
