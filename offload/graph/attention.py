"""Attention over the cells of the KV cache: what one step adds to them, and what it reads."""

from dataclasses import dataclass

from gguf import GGMLQuantizationType

from slimoe.offload.ggml import ops as ggml
from slimoe.offload.graph.batch import Batch
from slimoe.offload.graph.linear import add_linear, add_rms_norm, last_rows
from slimoe.offload.graph.weights import LayerWeights
from slimoe.offload.memory.kv_cache import KVTensors, hadamard_lengths
from slimoe.offload.model.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class StepShape:
    """What makes one graph differ from another: tokens read, cache cells looked at, in layers with a window and
    in others, rows of logits wanted.

    Where layers are recurrent, the tokens are of `n_runs` sequences, the same number of each; else it is 0. With
    `has_hidden` the last hidden states of all tokens are wanted, not only of those whose logits are.
    """

    n_tokens: int
    n_kv: int
    n_window_kv: int
    n_out: int
    n_runs: int = 0
    has_hidden: bool = False

    @classmethod
    def of(cls, batch: Batch) -> "StepShape":
        """The shape of a batch's graph."""
        return cls(batch.n_tokens, batch.n_kv, batch.n_window_kv, batch.n_out, len(batch.states))

    @property
    def n_last(self) -> int:
        """Tokens, counted from the last, that leave the last layer."""
        return self.n_tokens if self.has_hidden else self.n_out

    @property
    def n_queries(self) -> int:
        """Tokens, counted from the last, whose queries the last layer computes."""
        return min(self.n_tokens, max(self.n_last, ggml.BATCH_QUERIES))


@dataclass(frozen=True, slots=True)
class StepInputs:
    """Tensor addresses to fill before a run.

    tokens I32 [n_tokens], positions I32 [n_tokens], cells I64 [n_tokens] (where in the cache each token goes), mask
    F16 [n_kv, n_tokens] (0 or -inf), other cells and another mask [n_window_kv, n_tokens] for layers with a window,
    temperatures F32 [n_tokens], by which queries are multiplied, `states_from` I32 and `states_to` I64 [n_runs *
    n_parts], the rows of what recurrent layers keep of each sequence, before and after, and where operations read whole
    states their numbers `states_read` I32 [n_runs]; 0 for what no layer has.
    """

    tokens: int
    positions: int
    cells: int
    mask: int
    window_cells: int = 0
    window_mask: int = 0
    temperatures: int = 0
    states_from: int = 0
    states_to: int = 0
    states_read: int = 0


@dataclass(frozen=True, slots=True)
class AttentionBuilder:
    """Adds attention to the graph of a step; `rope_freqs` are RoPE's frequency factors, 0 without."""

    ctx: int
    graph: int
    spec: ModelSpec
    cache: KVTensors
    shape: StepShape
    inputs: StepInputs
    rope_freqs: int

    def add(self, index: int, layer: LayerWeights, hidden: int, n_queries: int) -> int:
        """The attention output of layer `index`, [n_embd, n_queries], for the last tokens of its normalised input."""
        ctx, spec = self.ctx, self.spec
        query, key, value, gate = self._qkv(index, layer, hidden, n_queries)
        query, scale = self._normed_head(self._rope(query, index), layer.q_norm), spec.attention_scale
        if spec.architecture.scales_queries:
            query, scale = int(ggml.ggml_scale(ctx, query, scale)), 1.0
        self._store(index, self._normed_head(self._rope(key, index), layer.k_norm), value)
        attended = self._attend(index, query, n_queries, scale, layer.sinks)
        joined = int(ggml.ggml_reshape_2d(ctx, attended, spec.attention_of(index).n_output, n_queries))
        if gate:
            joined = int(ggml.ggml_mul(ctx, joined, ggml.ggml_sigmoid(ctx, gate)))
        return add_linear(ctx, layer.attn_output, joined)

    def store(self, index: int, layer: LayerWeights, hidden: int) -> None:
        """Stores keys and values of layer `index` for its normalised input, whose output nobody wants."""
        key, value = (add_linear(self.ctx, layer.qkv[part], hidden) for part in (1, -1))
        key, value = self._key_and_value(index, layer, key, value)
        self._store(index, self._normed_head(self._rope(key, index), layer.k_norm), value)

    def _last(self, vector: int, n: int) -> int:
        """The last `n` elements, of 4 bytes each, of a vector of one for each token."""
        n_before = self.shape.n_tokens - n
        return int(ggml.ggml_view_2d(self.ctx, vector, n, 1, n * 4, n_before * 4)) if n_before else vector

    def _attend(self, index: int, query: int, n_queries: int, scale: float, sinks: int = 0) -> int:
        """What queries [n_embd_head, n_head, n_queries] make of the cached values, [n_value, n_head, n_queries].

        `scale` is the factor on their products with keys, `sinks` F32 [n_head] a logit of each head to no token.
        """
        has_window, own = self.spec.window(index) > 0, self.spec.attention_of(index)
        of_keys, of_values = self._pieces(index)
        query = self._transformed(query, of_keys)
        keys = self._cached(index, self.cache.keys[index], own.key_length)
        # Without values of their own, those of MLA are the beginning of the keys.
        held = self.cache.values.get(index, self.cache.keys[index])
        attended = ggml.ggml_flash_attn_ext(
            self.ctx,
            ggml.ggml_permute(self.ctx, query, 0, 2, 1, 3),
            keys,
            self._cached(index, held, own.value_length),
            last_rows(self.ctx, self.inputs.window_mask if has_window else self.inputs.mask, n_queries),
            scale,
            0.0,
            0.0,
        )
        if sinks:
            ggml.ggml_flash_attn_ext_add_sinks(attended, sinks)
        ggml.ggml_prec_set_acc(attended, ggml.PREC_F32)
        return self._transformed(int(attended), of_values)

    def _pieces(self, index: int) -> tuple[int, int]:
        """The lengths of the pieces in which a layer's keys, and values, are rotated before they are stored."""
        kind = GGMLQuantizationType(ggml.tensor_at(self.cache.keys[index]).type)
        return hadamard_lengths(self.spec.attention_of(index), kind)

    def _transformed(self, heads: int, length: int) -> int:
        """The Hadamard transform of each piece of `length` of heads [width, n_head, n]; the same heads for 0."""
        if not length:
            return heads
        ctx, (width, n_head, n), strides = self.ctx, ggml.tensor_at(heads).ne[:3], ggml.tensor_at(heads).nb[1:3]
        is_one_piece = strides == [4 * width, 4 * width * n_head]
        flat = ggml.ggml_reshape_2d if is_one_piece else ggml.ggml_cont_2d
        pieces = flat(ctx, heads, length, width * n_head * n // length)
        product = ggml.ggml_mul_mat(ctx, self.cache.hadamards[length], pieces)
        ggml.ggml_mul_mat_set_hint(product, ggml.HINT_HADAMARD)
        return int(ggml.ggml_reshape_3d(ctx, product, width, n_head, n))

    def _qkv(self, index: int, layer: LayerWeights, hidden: int, n_queries: int) -> tuple[int, int, int, int]:
        """Queries [n_embd_head, n_head, n_queries], keys and values [n_embd_head, n_head_kv, n_tokens], and the gate
        [n_output, n_queries] of what attention makes of them, 0 without one.
        """
        ctx, n_tokens, own = self.ctx, self.shape.n_tokens, self.spec.attention_of(index)
        if len(layer.qkv) > 1:
            seen = [last_rows(ctx, hidden, n_rows) for n_rows in (n_queries, n_tokens, n_tokens)]
            parts = [add_linear(ctx, linear, rows) for linear, rows in zip(layer.qkv, seen, strict=False)]
        else:
            assert n_queries == n_tokens, "the last layer's queries must stand alone"
            joined, begin, parts = add_linear(ctx, layer.qkv[0], hidden), 0, []
            n_rows, stride = ggml.tensor_at(joined).ne[0], ggml.tensor_at(joined).nb[1]
            widths = (own.n_query_rows, own.n_embd_head * own.n_head_kv, own.n_embd_head * own.n_head_kv)
            for width in widths if sum(widths) == n_rows else widths[:2]:
                parts.append(int(ggml.ggml_view_2d(ctx, joined, width, n_tokens, stride, begin)))
                begin += 4 * width
        gate = self._gate(parts[0]) if own.is_gated else 0
        query = self._heads(parts[0], layer.q_norm, own.n_head, own.n_embd_head)
        return query, *self._key_and_value(index, layer, parts[1], parts[-1]), gate

    def _key_and_value(self, index: int, layer: LayerWeights, key: int, value: int) -> tuple[int, int]:
        """Rows of keys and values [n_embd_head * n_head_kv, n] as heads, each normalised where there is a norm."""
        own = self.spec.attention_of(index)
        keys = self._heads(key, layer.k_norm, own.n_head_kv, own.n_embd_head)
        values = self._heads(value, 0, own.n_head_kv, own.n_embd_head)
        if self.spec.architecture.norms_values:
            values = int(ggml.ggml_rms_norm(self.ctx, values, self.spec.rms_eps))
        return keys, values

    def _gate(self, rows: int) -> int:
        """The second half of each head of rows [2 * n_embd_head * n_head, n], [n_embd_head * n_head, n]."""
        ctx, width, n_head = self.ctx, self.spec.n_embd_head, self.spec.n_head
        n_tokens, stride = ggml.tensor_at(rows).ne[1], ggml.tensor_at(rows).nb[1]
        halves = ggml.ggml_view_3d(ctx, rows, width, n_head, n_tokens, 8 * width, stride, 4 * width)
        return int(ggml.ggml_cont_2d(ctx, halves, width * n_head, n_tokens))

    def _heads(self, rows: int, norm: int, n_head: int, width: int) -> int:
        """Rows as heads [width, n_head, n], normalised where there is a `norm`.

        They are [width * n_head, n], where heads of queries may be followed by their gates.
        """
        spec = self.spec
        if norm and spec.architecture.qk_norm == "row":
            rows = add_rms_norm(self.ctx, rows, norm, spec.rms_eps)
        n_tokens, stride = ggml.tensor_at(rows).ne[1], ggml.tensor_at(rows).nb[1]
        apart = 4 * ggml.tensor_at(rows).ne[0] // n_head
        heads = int(ggml.ggml_view_3d(self.ctx, rows, width, n_head, n_tokens, apart, stride, 0))
        if norm and spec.architecture.qk_norm == "head":
            return add_rms_norm(self.ctx, heads, norm, spec.rms_eps)
        return heads

    def _normed_head(self, heads: int, norm: int) -> int:
        """Heads that are normalised after the rotation."""
        if not norm or self.spec.architecture.qk_norm != "head_after_rope":
            return heads
        return add_rms_norm(self.ctx, heads, norm, self.spec.rms_eps)

    def _rope(self, heads: int, index: int) -> int:
        """Heads of the last tokens of layer `index`, rotated by their positions if anything rotates."""
        if not self.spec.rope.n_rot:
            return heads
        rope, has_window = self.spec.rope, self.spec.window(index) > 0
        has_own = has_window and self.spec.architecture.has_window_heads
        positions = self._last(self.inputs.positions, ggml.tensor_at(heads).ne[2])
        rotated = ggml.ggml_rope_ext(
            self.ctx,
            heads,
            positions,
            None if has_own else self.rope_freqs or None,
            self.spec.n_rot(index),
            self.spec.architecture.rope,
            rope.n_ctx_orig,
            rope.window_freq_base if has_window and rope.window_freq_base else rope.freq_base,
            rope.freq_scale,
            rope.ext_factor,
            rope.attn_factor,
            rope.beta_fast,
            rope.beta_slow,
        )
        return int(rotated)

    def _store(self, index: int, keys: int, values: int = 0) -> None:
        """Writes this step's keys and values, if there are any, into their cells; attention must come after it."""
        lengths, cells = self._pieces(index), self.inputs.cells
        if self.spec.window(index):
            cells = self.inputs.window_cells
        for held, heads, length in zip((self.cache.keys, self.cache.values), (keys, values), lengths, strict=True):
            if heads:
                by_head = ggml.ggml_permute(self.ctx, self._transformed(heads, length), 0, 2, 1, 3)
                stored = ggml.ggml_set_rows(self.ctx, held[index], by_head, cells)
                ggml.ggml_build_forward_expand(self.graph, stored)

    def _cached(self, index: int, cache: int, length: int) -> int:
        """The cells of layer `index` that are looked at, and of each as many values: [length, n_kv, n_head_kv]."""
        n_kv = self.shape.n_window_kv if self.spec.window(index) else self.shape.n_kv
        strides, n_head_kv = ggml.tensor_at(cache).nb, ggml.tensor_at(cache).ne[2]
        return int(ggml.ggml_view_3d(self.ctx, cache, length, n_kv, n_head_kv, strides[1], strides[2], 0))
