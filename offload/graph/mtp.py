"""Runs the block that predicts a further token (MTP): its keys and values for what was read, and its logits.

The operations are llama.cpp's, in its order. The block has a KV cache of its own, with the model's cells: the keys and
values in a token's cell are of that token and of the hidden states of the tokens before it.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from slimoe.offload.ggml import ops as ggml
from slimoe.offload.ggml.cpu_backend import CpuBackend
from slimoe.offload.graph.attention import AttentionBuilder, StepInputs, StepShape
from slimoe.offload.graph.batch import Batch, fill_mask
from slimoe.offload.graph.graph_pool import BuiltGraph, GraphPool
from slimoe.offload.graph.linear import add_linear, add_norm, add_rms_norm
from slimoe.offload.graph.runner import Hidden, Logits
from slimoe.offload.graph.step import BlockBuilder, new_graph
from slimoe.offload.graph.token_rows import TokenRows
from slimoe.offload.graph.weights import Linear, ModelWeights
from slimoe.offload.memory.kv_cache import KVCache
from slimoe.offload.model.spec import ModelSpec

_MAX_GRAPHS, _LEAST_PREDICTED = 32, 16
"""Tokens that are read again are predicted from together with the last one."""


@dataclass(frozen=True, slots=True)
class MtpWeights:
    """Tensor addresses of the block: those of the model whose last layer it is, and as in `MtpBlock`."""

    model: ModelWeights
    joint: Linear
    token_norm: int
    hidden_norm: int


class _Key(NamedTuple):
    """What makes one graph differ from another: a step's sizes, and whether it predicts or only stores."""

    n_tokens: int
    n_kv: int
    n_out: int
    predicts: bool


@dataclass(frozen=True, slots=True)
class _Prepared:
    graph: int
    tokens: NDArray[np.int32]
    positions: NDArray[np.int32]
    cells: NDArray[np.int64]
    hidden: Hidden
    mask: NDArray[np.float16]
    logits: Logits
    last: Hidden


class MtpRunner:
    """Computes steps of the block, of at most `n_batch` tokens, of which at most `n_parallel` are predicted from.

    `spec` is that of the model with the block as its last layer, whose keys and values `cache` has. `rows` is the
    tensor of the token table in `weights`, filled for each step.
    """

    def __init__(
        self,
        spec: ModelSpec,
        backend: CpuBackend,
        cache: KVCache,
        weights: MtpWeights,
        rows: TokenRows,
        n_batch: int,
        n_parallel: int,
    ) -> None:
        self.spec, self._backend, self._cache, self._weights, self._rows = spec, backend, cache, weights, rows
        self._graphs = GraphPool(backend.buft, self._build, _MAX_GRAPHS)
        self._graphs.reserve(_Key(n_batch, cache.size.n_cells, 0, predicts=False))
        self._graphs.reserve(_Key(max(n_parallel, _LEAST_PREDICTED), cache.size.n_cells, n_parallel, predicts=True))

    @property
    def compute_bytes(self) -> int:
        """Size of the buffer that all intermediate results share."""
        return self._graphs.n_bytes

    def store(self, batch: Batch, hidden: Hidden) -> None:
        """Stores the keys and values of a batch's tokens, each with the hidden states before it, [n_tokens, n_embd]."""
        self._run(batch, hidden, _Key(batch.n_tokens, 0, 0, predicts=False))

    def predict(self, batch: Batch, hidden: Hidden) -> tuple[Logits, Hidden]:
        """The same, and logits [n_out, n_vocab] for what follows on the last tokens, with hidden states of the block.

        Both are valid until the next step. The hidden states, [n_out, n_embd], stand for the model's.
        """
        prepared = self._run(batch, hidden, _Key(batch.n_tokens, batch.n_kv, batch.n_out, predicts=True))
        return prepared.logits, prepared.last

    def _run(self, batch: Batch, hidden: Hidden, key: _Key) -> _Prepared:
        prepared = self._graphs.get(key)
        self._rows.load(batch.tokens)
        prepared.tokens[:] = np.arange(batch.n_tokens)
        prepared.positions[:] = batch.positions
        prepared.cells[:] = batch.cells
        prepared.hidden[:] = hidden
        if key.predicts:
            fill_mask(prepared.mask, batch)
        self._backend.compute(prepared.graph)
        return prepared

    def _build(self, key: _Key) -> BuiltGraph[_Prepared]:
        spec, weights, n_tokens, index = self.spec, self._weights, key.n_tokens, self.spec.n_layer - 1
        ctx, graph = new_graph(spec, 1)
        tokens, positions, cells = (
            int(ggml.ggml_new_tensor_1d(ctx, kind, n_tokens)) for kind in (Type.I32, Type.I32, Type.I64)
        )
        before = int(ggml.ggml_new_tensor_2d(ctx, Type.F32, spec.n_embd, n_tokens))
        mask = int(ggml.ggml_new_tensor_2d(ctx, Type.F16, key.n_kv, n_tokens)) if key.predicts else 0
        for tensor in (tokens, positions, cells, before, *((mask,) if mask else ())):
            ggml.ggml_set_input(tensor)
        inputs, shape = StepInputs(tokens, positions, cells, mask), StepShape(n_tokens, key.n_kv, key.n_kv, key.n_out)
        blocks = BlockBuilder(ctx, graph, spec, weights.model, self._cache, shape, inputs)
        token = add_rms_norm(ctx, blocks.add_embeddings(), weights.token_norm, spec.rms_eps)
        past = add_rms_norm(ctx, before, weights.hidden_norm, spec.rms_eps)
        hidden = add_linear(ctx, weights.joint, int(ggml.ggml_concat(ctx, token, past, 0)))
        logits = last = 0
        if key.predicts:
            last = blocks.add_output_norm(blocks.add_feed_forward(index, blocks.add_attention(index, hidden)))
            ggml.ggml_set_output(last)
            logits = blocks.add_logits(last)
        else:
            layer = weights.model.layers[index]
            assert layer.attn_norm is not None
            attention = AttentionBuilder(ctx, graph, spec, self._cache, shape, inputs, weights.model.rope_freqs)
            attention.store(index, layer, add_norm(ctx, hidden, layer.attn_norm, spec.rms_eps))

        def array(tensor: int, kind: type[np.generic], *sizes: int) -> NDArray[Any]:
            return ggml.array_at(ggml.ggml_get_data(tensor), kind, *sizes) if tensor else np.empty(0, kind)

        def prepare() -> _Prepared:
            return _Prepared(
                graph,
                array(tokens, np.int32, n_tokens),
                array(positions, np.int32, n_tokens),
                array(cells, np.int64, n_tokens),
                array(before, np.float32, n_tokens, spec.n_embd),
                array(mask, np.float16, n_tokens, key.n_kv),
                array(logits, np.float32, key.n_out, spec.n_vocab),
                array(last, np.float32, key.n_out, spec.n_embd),
            )

        return BuiltGraph(ctx, graph, prepare)

    def close(self) -> None:
        """Frees graphs and buffer; weights and cache are their owners' business."""
        self._graphs.close()
