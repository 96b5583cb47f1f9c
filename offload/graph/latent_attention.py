"""Multi-head latent attention (MLA), in llama.cpp's order: absorbed, or decompressed to heads as in old files."""

from dataclasses import dataclass

from slimoe.offload.ggml import ops as ggml
from slimoe.offload.graph.attention import AttentionBuilder
from slimoe.offload.graph.linear import add_linear, add_rms_norm, last_rows
from slimoe.offload.graph.weights import LatentWeights, LayerWeights
from slimoe.offload.model.attention_spec import LatentSpec


@dataclass(frozen=True, slots=True)
class LatentAttentionBuilder(AttentionBuilder):
    """Adds latent attention to the graph of a step.

    The last `n_rot` values of a head's query rotate, and so does a row of as many that all heads have as the end of
    their keys; the rest of the keys, and the values, come from a row of low rank.
    """

    def add(self, index: int, layer: LayerWeights, hidden: int, n_queries: int) -> int:
        """The attention output of layer `index`, [n_embd, n_queries], for the last tokens of its normalised input."""
        ctx, spec, latent, weights = self.ctx, self.spec, self.spec.attention.latent, layer.latent
        assert latent is not None
        assert weights is not None
        query = self._query(layer, weights, latent, last_rows(ctx, hidden, n_queries))
        row, rotated = self._shared_row(index, layer, latent, hidden)
        add = self._add_absorbed if latent.is_absorbed else self._add_decompressed
        output = add(index, weights, latent, (query, row, rotated), n_queries)
        joined = ggml.ggml_reshape_2d(ctx, output, spec.attention.n_output, n_queries)
        return add_linear(ctx, layer.attn_output, joined)

    def store(self, index: int, layer: LayerWeights, hidden: int) -> None:
        """Stores keys and values of layer `index` for its normalised input, whose output nobody wants."""
        latent, weights = self.spec.attention.latent, layer.latent
        assert latent is not None
        assert weights is not None
        row, rotated = self._shared_row(index, layer, latent, hidden)
        if latent.is_absorbed:
            self._store_row(index, latent, row, rotated)
        else:
            self._store_heads(index, weights, latent, row, rotated)

    def _shared_row(self, index: int, layer: LayerWeights, latent: LatentSpec, hidden: int) -> tuple[int, int]:
        """What the keys of all heads are made of: normalised rows of low rank, and what rotates, rotated."""
        ctx, spec = self.ctx, self.spec
        both = add_linear(ctx, layer.qkv[1], hidden)
        n_tokens, stride = self.shape.n_tokens, ggml.tensor_at(both).nb[1]
        row = ggml.ggml_view_2d(ctx, both, latent.n_lora_kv, n_tokens, stride, 0)
        rotated = ggml.ggml_view_3d(ctx, both, spec.rope.n_rot, 1, n_tokens, stride, stride, 4 * latent.n_lora_kv)
        rotated = self._rope(rotated, index)
        return add_rms_norm(ctx, row, layer.k_norm, spec.rms_eps), rotated

    def _query(self, layer: LayerWeights, weights: LatentWeights, latent: LatentSpec, hidden: int) -> int:
        """Queries [n_embd_head_k, n_head, n_queries], not yet rotated."""
        query = add_linear(self.ctx, layer.qkv[0], hidden)
        if weights.q.weight:
            query = add_linear(self.ctx, weights.q, add_rms_norm(self.ctx, query, layer.q_norm, self.spec.rms_eps))
        n_queries = ggml.tensor_at(query).ne[1]
        return int(ggml.ggml_reshape_3d(self.ctx, query, latent.n_embd_head_k, self.spec.n_head, n_queries))

    def _add_absorbed(
        self, index: int, weights: LatentWeights, latent: LatentSpec, parts: tuple[int, int, int], n_queries: int
    ) -> int:
        """Values [n_embd_head_v, n_head, n_queries] of attention in the space of the low-rank rows."""
        ctx, n_head, n_rot = self.ctx, self.spec.n_head, self.spec.rope.n_rot
        query, row, rotated = parts
        _, by_head, by_token = ggml.tensor_at(query).nb[:3]
        n_plain = latent.n_embd_head_k - n_rot
        plain = ggml.ggml_view_3d(ctx, query, n_plain, n_head, n_queries, by_head, by_token, 0)
        turning = ggml.ggml_view_3d(ctx, query, n_rot, n_head, n_queries, by_head, by_token, 4 * n_plain)
        turning = self._rope(turning, index)
        absorbed = ggml.ggml_mul_mat(ctx, weights.k.weight, ggml.ggml_permute(ctx, plain, 0, 2, 1, 3))
        absorbed = ggml.ggml_permute(ctx, absorbed, 0, 2, 1, 3)
        query = self._at_temperature(ggml.ggml_concat(ctx, absorbed, turning, 0), n_queries)
        self._store_row(index, latent, row, rotated)
        attended = ggml.ggml_permute(ctx, self._attend(index, query, n_queries, self.spec.attention_scale), 0, 2, 1, 3)
        values = ggml.ggml_mul_mat(ctx, weights.v.weight, attended)
        return int(ggml.ggml_cont(ctx, ggml.ggml_permute(ctx, values, 0, 2, 1, 3)))

    def _add_decompressed(
        self, index: int, weights: LatentWeights, latent: LatentSpec, parts: tuple[int, int, int], n_queries: int
    ) -> int:
        """Values [n_embd_head_v, n_head, n_queries] of attention whose keys and values are each head's own."""
        query, row, rotated = parts
        query = self._rope(query, index)
        n_plain = latent.n_embd_head_k - self.spec.rope.n_rot
        query = self._at_temperature(ggml.ggml_rope_set_offset(query, n_plain), n_queries)
        self._store_heads(index, weights, latent, row, rotated)
        return self._attend(index, query, n_queries, self.spec.attention_scale)

    def _store_row(self, index: int, latent: LatentSpec, row: int, rotated: int) -> None:
        """Stores the row that all heads share as their key; its beginning is their value."""
        ctx = self.ctx
        row = ggml.ggml_reshape_3d(ctx, row, latent.n_lora_kv, 1, self.shape.n_tokens)
        self._store(index, ggml.ggml_concat(ctx, row, rotated, 0))

    def _store_heads(self, index: int, weights: LatentWeights, latent: LatentSpec, row: int, rotated: int) -> None:
        """Stores each head's own keys and values."""
        ctx, n_head, n_rot, n_tokens = self.ctx, self.spec.n_head, self.spec.rope.n_rot, self.shape.n_tokens
        n_plain, n_value = latent.n_embd_head_k - n_rot, latent.n_embd_head_v
        both = add_linear(ctx, weights.k, row)
        strides = 4 * (n_plain + n_value), 4 * (n_plain + n_value) * n_head
        plain = ggml.ggml_view_3d(ctx, both, n_plain, n_head, n_tokens, *strides, 0)
        value = ggml.ggml_cont(ctx, ggml.ggml_view_3d(ctx, both, n_value, n_head, n_tokens, *strides, 4 * n_plain))
        key = ggml.ggml_concat(ctx, plain, ggml.ggml_repeat_4d(ctx, rotated, n_rot, n_head, n_tokens, 1), 0)
        self._store(index, key, value)

    def _at_temperature(self, query: int, n_queries: int) -> int:
        """Queries, multiplied by their token's temperature where the model has one."""
        if not self.inputs.temperatures:
            return query
        factors = self._last(self.inputs.temperatures, n_queries)
        return int(ggml.ggml_mul(self.ctx, query, ggml.ggml_reshape_3d(self.ctx, factors, 1, 1, n_queries)))
