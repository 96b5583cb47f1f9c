"""Builds the computation of one step of a llama-architecture model, dense or mixture-of-experts.

The operations are those of llama.cpp's `llama` architecture, in its order, so that the logits are its logits to the
last bit: with quantised weights a difference in the last bit of a sum soon rounds an activation to another integer,
and sometimes chooses another expert. Two things save work: joined matrices are multiplied once, and in the last layer
only the rows whose logits are wanted pass through the queries and the feed-forward part (few rows may take another
attention kernel than many, so these logits are equal within rounding; what the cache holds is the same).
"""

from dataclasses import dataclass

from gguf import GGMLQuantizationType as Type

from slimoe.offload.ggml import ops as ggml
from slimoe.offload.graph.kv_cache import KVCache
from slimoe.offload.graph.weights import LayerWeights, Linear, ModelWeights
from slimoe.offload.model.spec import ModelSpec

_BATCH_QUERIES = 64
"""From so many queries on ggml's attention takes its kernel for batches, which rounds differently."""


@dataclass(frozen=True, slots=True)
class StepShape:
    """What makes one graph differ from another: tokens read, cache cells looked at, rows of logits wanted."""

    n_tokens: int
    n_kv: int
    n_out: int

    @property
    def n_queries(self) -> int:
        """Tokens, counted from the last, whose queries the last layer computes."""
        return min(self.n_tokens, max(self.n_out, _BATCH_QUERIES))


@dataclass(frozen=True, slots=True)
class StepInputs:
    """Tensor addresses to fill before a run.

    tokens I32 [n_tokens], positions I32 [n_tokens], cells I64 [n_tokens] (where in the cache each token goes),
    mask F16 [n_kv, n_tokens] (0 or -inf).
    """

    tokens: int
    positions: int
    cells: int
    mask: int


@dataclass(frozen=True, slots=True)
class StepGraph:
    """A built graph: its ggml context (owned by whoever holds this), inputs, and F32 logits [n_vocab, n_out]."""

    ctx: int
    graph: int
    inputs: StepInputs
    logits: int


def build_step(spec: ModelSpec, weights: ModelWeights, cache: KVCache, shape: StepShape) -> StepGraph:
    """Builds the graph of one step; nothing is allocated for it yet."""
    return StepBuilder(spec, weights, cache, shape).build()


class StepBuilder:
    """Adds a model's operations to one graph; tensors are addresses."""

    def __init__(self, spec: ModelSpec, weights: ModelWeights, cache: KVCache | None, shape: StepShape) -> None:
        self.spec, self.weights, self.cache, self.shape = spec, weights, cache, shape
        n_nodes = 64 + self._n_layers() * (48 + 2 * spec.n_expert_used)
        n_bytes = n_nodes * ggml.ggml_tensor_overhead() + ggml.ggml_graph_overhead_custom(n_nodes, False)
        self.ctx = ggml.ggml_init(ggml.InitParams(n_bytes, None, True))
        self.graph = ggml.ggml_new_graph_custom(self.ctx, n_nodes, False)
        self.inputs = self._inputs()

    def _n_layers(self) -> int:
        """Layers of this graph."""
        return self.spec.n_layer

    def _input(self, kind: Type, *ne: int) -> int:
        make = ggml.ggml_new_tensor_1d if len(ne) == 1 else ggml.ggml_new_tensor_2d
        tensor: int = make(self.ctx, kind, *ne)
        ggml.ggml_set_input(tensor)
        return tensor

    def _inputs(self) -> StepInputs:
        n_tokens, n_kv = self.shape.n_tokens, self.shape.n_kv
        return StepInputs(
            tokens=self._input(Type.I32, n_tokens),
            positions=self._input(Type.I32, n_tokens),
            cells=self._input(Type.I64, n_tokens),
            mask=self._input(Type.F16, n_kv, n_tokens),
        )

    def build(self) -> StepGraph:
        """The whole step as one graph."""
        hidden = ggml.ggml_get_rows(self.ctx, self.weights.token_embd, self.inputs.tokens)
        for index in range(self.spec.n_layer):
            hidden = self._feed_forward(index, self._attend(index, hidden))
        logits = self._linear(self.weights.output, self._norm(hidden, self.weights.output_norm))
        ggml.ggml_set_output(logits)
        ggml.ggml_build_forward_expand(self.graph, logits)
        return StepGraph(self.ctx, self.graph, self.inputs, logits)

    def _n_rows(self, index: int) -> int:
        """Rows that leave a layer: in the last one only those whose logits are wanted."""
        return self.shape.n_out if index == self.spec.n_layer - 1 else self.shape.n_tokens

    def _attend(self, index: int, hidden: int) -> int:
        """The first half of a block: [n_embd, n_tokens] to [n_embd, n_rows]; a block can be without one."""
        layer, n_rows = self.weights.layers[index], self._n_rows(index)
        if not layer.attn_norm:
            return self._tail(hidden, n_rows)
        n_queries = self.shape.n_queries if index == self.spec.n_layer - 1 else self.shape.n_tokens
        attention = self._attention(index, layer, self._norm(hidden, layer.attn_norm), n_queries)
        return int(ggml.ggml_add(self.ctx, self._tail(attention, n_rows), self._tail(hidden, n_rows)))

    def _feed_forward(self, index: int, hidden: int) -> int:
        """The second half of a block, [n_embd, n_rows]; a block can be without one."""
        layer = self.weights.layers[index]
        if not layer.ffn_norm:
            return hidden
        normed = self._norm(hidden, layer.ffn_norm)
        if not layer.router:
            return self._dense(layer, normed, hidden)
        return self._experts(layer, normed, hidden, self._n_rows(index))

    def _tail(self, matrix: int, n_rows: int) -> int:
        """The last `n_rows` rows of a matrix."""
        tensor = ggml.tensor_at(matrix)
        n_skipped = tensor.ne[1] - n_rows
        if not n_skipped:
            return matrix
        offset = n_skipped * tensor.nb[1]
        return int(ggml.ggml_view_2d(self.ctx, matrix, tensor.ne[0], n_rows, tensor.nb[1], offset))

    def _norm(self, hidden: int, weight: int) -> int:
        normed = ggml.ggml_rms_norm(self.ctx, hidden, self.spec.rms_eps)
        return int(ggml.ggml_mul(self.ctx, normed, weight))

    def _linear(self, linear: Linear, hidden: int) -> int:
        product: int = ggml.ggml_mul_mat(self.ctx, linear.weight, hidden)
        return int(ggml.ggml_add(self.ctx, product, linear.bias)) if linear.bias else product

    # --- attention -----------------------------------------------------------------------------------------

    def _attention(self, index: int, layer: LayerWeights, hidden: int, n_queries: int) -> int:
        ctx, spec = self.ctx, self.spec
        query, key, value = self._qkv(layer.qkv, hidden, n_queries)
        query = self._rope(query, self._tail_positions(n_queries))
        assert self.cache is not None
        self._store(self.cache.keys[index], self._rope(key, self.inputs.positions))
        self._store(self.cache.values[index], value)
        attended = ggml.ggml_flash_attn_ext(
            ctx,
            ggml.ggml_permute(ctx, query, 0, 2, 1, 3),
            self._cached(self.cache.keys[index]),
            self._cached(self.cache.values[index]),
            self._tail(self.inputs.mask, n_queries),
            spec.attention_scale,
            0.0,
            0.0,
        )
        ggml.ggml_prec_set_acc(attended, ggml.PREC_F32)
        joined = ggml.ggml_reshape_2d(ctx, attended, spec.n_embd_head * spec.n_head, n_queries)
        return self._linear(layer.attn_output, joined)

    def _tail_positions(self, n_rows: int) -> int:
        """Positions of the last `n_rows` tokens, I32 [n_rows]."""
        if n_rows == self.shape.n_tokens:
            return self.inputs.positions
        offset = (self.shape.n_tokens - n_rows) * 4
        return int(ggml.ggml_view_2d(self.ctx, self.inputs.positions, n_rows, 1, n_rows * 4, offset))

    def _qkv(self, qkv: tuple[Linear, ...], hidden: int, n_queries: int) -> tuple[int, int, int]:
        """Queries [n_embd_head, n_head, n_queries], keys and values [n_embd_head, n_head_kv, n_tokens]."""
        spec, n_tokens = self.spec, self.shape.n_tokens
        heads = (spec.n_head, spec.n_head_kv, spec.n_head_kv)
        if len(qkv) == 3:
            counts = (n_queries, n_tokens, n_tokens)
            parts = [self._linear(part, self._tail(hidden, count)) for part, count in zip(qkv, counts, strict=True)]
            query, key, value = (
                int(ggml.ggml_reshape_3d(self.ctx, part, spec.n_embd_head, n_head, count))
                for part, n_head, count in zip(parts, heads, counts, strict=True)
            )
            return query, key, value
        assert n_queries == n_tokens, "the last layer's queries must stand alone"
        joined = self._linear(qkv[0], hidden)
        head_bytes = spec.n_embd_head * 4
        row_bytes = sum(heads) * head_bytes
        begins = (0, spec.n_head * head_bytes, (spec.n_head + spec.n_head_kv) * head_bytes)
        query, key, value = (
            int(ggml.ggml_view_3d(self.ctx, joined, spec.n_embd_head, n, n_tokens, head_bytes, row_bytes, begin))
            for n, begin in zip(heads, begins, strict=True)
        )
        return query, key, value

    def _rope(self, heads: int, positions: int) -> int:
        rope = self.spec.rope
        rotated = ggml.ggml_rope_ext(
            self.ctx,
            heads,
            positions,
            self.weights.rope_freqs or None,
            rope.n_rot,
            0,
            rope.n_ctx_orig,
            rope.freq_base,
            rope.freq_scale,
            rope.ext_factor,
            rope.attn_factor,
            rope.beta_fast,
            rope.beta_slow,
        )
        return int(rotated)

    def _store(self, cache: int, heads: int) -> None:
        """Writes this step's keys or values into their cells; attention must come after it in the graph."""
        by_head = ggml.ggml_permute(self.ctx, heads, 0, 2, 1, 3)
        stored = ggml.ggml_set_rows(self.ctx, cache, by_head, self.inputs.cells)
        ggml.ggml_build_forward_expand(self.graph, stored)

    def _cached(self, cache: int) -> int:
        """The first n_kv cells of a layer's keys or values: [n_embd_head, n_kv, n_head_kv]."""
        spec = self.spec
        strides = ggml.tensor_at(cache).nb
        view = ggml.ggml_view_3d(
            self.ctx, cache, spec.n_embd_head, self.shape.n_kv, spec.n_head_kv, strides[1], strides[2], 0
        )
        return int(view)

    # --- feed-forward --------------------------------------------------------------------------------------

    def _dense(self, layer: LayerWeights, normed: int, residual: int) -> int:
        if len(layer.gate_up) == 2:
            gate, up = (self._linear(part, normed) for part in layer.gate_up)
            activated = ggml.ggml_swiglu_split(self.ctx, gate, up)
        else:
            activated = ggml.ggml_swiglu(self.ctx, self._linear(layer.gate_up[0], normed))
        return int(ggml.ggml_add(self.ctx, self._linear(layer.down, activated), residual))

    def _experts(self, layer: LayerWeights, normed: int, residual: int, n_rows: int) -> int:
        ctx, spec = self.ctx, self.spec
        chosen, shares = self._route(layer.router, normed, n_rows)
        rows = ggml.ggml_reshape_3d(ctx, normed, spec.n_embd, 1, n_rows)
        if len(layer.gate_up) == 2:
            gate, up = (ggml.ggml_mul_mat_id(ctx, part.weight, rows, chosen) for part in layer.gate_up)
            activated = ggml.ggml_swiglu_split(ctx, gate, up)
        else:
            activated = ggml.ggml_swiglu(ctx, ggml.ggml_mul_mat_id(ctx, layer.gate_up[0].weight, rows, chosen))
        outputs = ggml.ggml_mul_mat_id(ctx, layer.down.weight, activated, chosen)
        return self._combine(ggml.ggml_mul(ctx, outputs, shares), residual, n_rows)

    def _route(self, router: int, normed: int, n_rows: int) -> tuple[int, int]:
        """The chosen experts, I32 [n_expert_used, n_rows], and their shares, F32 [1, n_expert_used, n_rows]."""
        ranked, shares = self._ranked(router, normed, n_rows)
        stride = ggml.tensor_at(ranked).nb[1]
        chosen = ggml.ggml_view_2d(self.ctx, ranked, self.spec.n_expert_used, n_rows, stride, 0)
        return chosen, shares

    def _ranked(self, router: int, normed: int, n_rows: int) -> tuple[int, int]:
        """All experts from the likeliest on, I32 [n_expert, n_rows], and the chosen ones' shares."""
        ctx, spec = self.ctx, self.spec
        logits = ggml.ggml_mul_mat(ctx, router, normed)
        n_expert = int(ggml.tensor_at(logits).ne[0])
        probabilities = ggml.ggml_soft_max(ctx, logits)
        ranked = int(ggml.ggml_argsort(ctx, probabilities, ggml.SORT_DESCENDING))
        chosen = ggml.ggml_view_2d(ctx, ranked, spec.n_expert_used, n_rows, ggml.tensor_at(ranked).nb[1], 0)
        picked = ggml.ggml_get_rows(ctx, ggml.ggml_reshape_3d(ctx, probabilities, 1, n_expert, n_rows), chosen)
        shares = ggml.ggml_reshape_2d(ctx, picked, spec.n_expert_used, n_rows)
        shares = ggml.ggml_div(ctx, shares, ggml.ggml_sum_rows(ctx, shares))
        if spec.expert_weights_scale not in (0.0, 1.0):
            shares = ggml.ggml_scale(ctx, shares, spec.expert_weights_scale)
        return ranked, int(ggml.ggml_reshape_3d(ctx, shares, 1, spec.n_expert_used, n_rows))

    def _combine(self, outputs: int, residual: int, n_rows: int) -> int:
        """Sums the experts' weighted outputs [n_embd, n_expert_used, n_rows], and the residual [n_embd, n_rows]."""
        strides = ggml.tensor_at(outputs).nb
        total, *others = (
            ggml.ggml_view_2d(self.ctx, outputs, self.spec.n_embd, n_rows, strides[2], index * strides[1])
            for index in range(self.spec.n_expert_used)
        )
        for one in others:
            total = ggml.ggml_add(self.ctx, total, one)
        return int(ggml.ggml_add(self.ctx, total, residual))
