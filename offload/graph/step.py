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
from slimoe.offload.graph.attention import AttentionBuilder, StepInputs, StepShape
from slimoe.offload.graph.expert_ffn import add_dense_ffn, add_expert_ffn, add_expert_sum
from slimoe.offload.graph.kv_cache import KVCache
from slimoe.offload.graph.linear import add_linear, add_rms_norm, last_rows
from slimoe.offload.graph.router import add_router, select_experts
from slimoe.offload.graph.weights import LayerWeights, ModelWeights
from slimoe.offload.model.spec import ModelSpec


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
        self.spec, self.weights, self.shape = spec, weights, shape
        n_nodes = 64 + self._n_layers() * (56 + 2 * spec.n_expert_used)
        n_bytes = n_nodes * ggml.ggml_tensor_overhead() + ggml.ggml_graph_overhead_custom(n_nodes, False)
        self.ctx = ggml.ggml_init(ggml.InitParams(n_bytes, None, True))
        self.graph = ggml.ggml_new_graph_custom(self.ctx, n_nodes, False)
        self.inputs = self._inputs()
        self._attention: AttentionBuilder | None = None
        if cache is not None:
            frequencies = weights.rope_freqs
            self._attention = AttentionBuilder(self.ctx, self.graph, spec, cache, shape, self.inputs, frequencies)

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
        return StepGraph(self.ctx, self.graph, self.inputs, self._logits(hidden))

    def _logits(self, hidden: int) -> int:
        """The model's output, F32 [n_vocab, n_out]."""
        logits = add_linear(self.ctx, self.weights.output, self._norm(hidden, self.weights.output_norm))
        ggml.ggml_set_output(logits)
        ggml.ggml_build_forward_expand(self.graph, logits)
        return logits

    def _n_rows(self, index: int) -> int:
        """Rows that leave a layer: in the last one only those whose logits are wanted."""
        return self.shape.n_out if index == self.spec.n_layer - 1 else self.shape.n_tokens

    def _attend(self, index: int, hidden: int) -> int:
        """The first half of a block: [n_embd, n_tokens] to [n_embd, n_rows]; a block can be without one."""
        layer, n_rows = self.weights.layers[index], self._n_rows(index)
        if not layer.attn_norm:
            return last_rows(self.ctx, hidden, n_rows)
        n_queries = self.shape.n_queries if index == self.spec.n_layer - 1 else self.shape.n_tokens
        assert self._attention is not None
        output = self._attention.add(index, layer, self._norm(hidden, layer.attn_norm), n_queries)
        return int(ggml.ggml_add(self.ctx, last_rows(self.ctx, output, n_rows), last_rows(self.ctx, hidden, n_rows)))

    def _feed_forward(self, index: int, hidden: int) -> int:
        """The second half of a block, [n_embd, n_rows]; a block can be without one."""
        layer = self.weights.layers[index]
        if not layer.ffn_norm:
            return hidden
        normed = self._norm(hidden, layer.ffn_norm)
        if not layer.router:
            return int(ggml.ggml_add(self.ctx, add_dense_ffn(self.ctx, layer, normed), hidden))
        return self._experts(layer, normed, hidden)

    def _experts(self, layer: LayerWeights, normed: int, residual: int) -> int:
        ctx, spec = self.ctx, self.spec
        ranked, weights = add_router(ctx, spec, layer.router, normed)
        rows = ggml.ggml_reshape_3d(ctx, normed, spec.n_embd, 1, ggml.tensor_at(normed).ne[1])
        stacks = [part.weight for part in layer.gate_up]
        outputs = add_expert_ffn(ctx, stacks, layer.down.weight, rows, select_experts(ctx, spec, ranked))
        return add_expert_sum(ctx, ggml.ggml_mul(ctx, outputs, weights), residual)

    def _norm(self, hidden: int, weight: int) -> int:
        return add_rms_norm(self.ctx, hidden, weight, self.spec.rms_eps)
