"""Attention over the cells of the KV cache: what one step adds to them, and what it reads."""

from dataclasses import dataclass

from slimoe.offload.ggml import ops as ggml
from slimoe.offload.graph.kv_cache import KVCache
from slimoe.offload.graph.linear import add_linear, last_rows
from slimoe.offload.graph.weights import LayerWeights, Linear
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
class AttentionBuilder:
    """Adds attention to the graph of a step."""

    ctx: int
    graph: int
    spec: ModelSpec
    cache: KVCache
    shape: StepShape
    inputs: StepInputs
    rope_freqs: int

    def add(self, index: int, layer: LayerWeights, hidden: int, n_queries: int) -> int:
        """The output of layer `index` for its normalised input, [n_embd, n_queries], of the last queries only."""
        ctx, spec = self.ctx, self.spec
        query, key, value = self._qkv(layer.qkv, hidden, n_queries)
        query = self._rope(query, self._tail_positions(n_queries))
        self._store(self.cache.keys[index], self._rope(key, self.inputs.positions))
        self._store(self.cache.values[index], value)
        attended = ggml.ggml_flash_attn_ext(
            ctx,
            ggml.ggml_permute(ctx, query, 0, 2, 1, 3),
            self._cached(self.cache.keys[index]),
            self._cached(self.cache.values[index]),
            last_rows(ctx, self.inputs.mask, n_queries),
            spec.attention_scale,
            0.0,
            0.0,
        )
        ggml.ggml_prec_set_acc(attended, ggml.PREC_F32)
        joined = ggml.ggml_reshape_2d(ctx, attended, spec.n_embd_head * spec.n_head, n_queries)
        return add_linear(ctx, layer.attn_output, joined)

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
            parts = [
                add_linear(self.ctx, part, last_rows(self.ctx, hidden, count))
                for part, count in zip(qkv, counts, strict=True)
            ]
            query, key, value = (
                int(ggml.ggml_reshape_3d(self.ctx, part, spec.n_embd_head, n_head, count))
                for part, n_head, count in zip(parts, heads, counts, strict=True)
            )
            return query, key, value
        assert n_queries == n_tokens, "the last layer's queries must stand alone"
        joined = add_linear(self.ctx, qkv[0], hidden)
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
            self.rope_freqs or None,
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
