"""Runs the block that predicts a further token (MTP): its keys and values for what was read, and its logits.

The operations are llama.cpp's, in its order. The block has a KV cache of its own, with the model's cells: the keys and
values in a token's cell are of that token and of the hidden states of the tokens before it.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from slimoe.offload.ggml import ops as ggml
from slimoe.offload.ggml.cpu_backend import Backend, CpuBackend
from slimoe.offload.graph.attention import AttentionBuilder, StepInputs, StepShape
from slimoe.offload.graph.batch import Batch, fill_mask
from slimoe.offload.graph.graph_pool import BuiltGraph, GraphPool
from slimoe.offload.graph.latent_attention import LatentAttentionBuilder
from slimoe.offload.graph.linear import add_linear, add_norm, add_rms_norm
from slimoe.offload.graph.runner import Hidden, Logits
from slimoe.offload.graph.step import BlockBuilder, add_embeddings, add_ones, new_graph
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


_INPUT_TYPES = (np.float32, np.float32, np.int32, np.int64, np.float16)
"""Of token rows, hidden states before, positions, cells and the mask."""


class _Key(NamedTuple):
    """What makes one graph differ from another: a step's sizes, and whether it predicts or only stores."""

    n_tokens: int
    n_kv: int
    n_out: int
    predicts: bool


@dataclass(frozen=True, slots=True)
class _Prepared:
    """An allocated graph, the tensors that are filled before it runs, as in `_INPUT_TYPES`, and its results."""

    graph: int
    inputs: tuple[int, ...]
    logits: int
    last: int


class TokenEmbedder:
    """Makes the token rows of a step F32, by the CPU: devices do not know every type of table.

    `rows` is filled for each step, of at most `n_batch` tokens.
    """

    def __init__(self, spec: ModelSpec, cpu: CpuBackend, rows: TokenRows, n_batch: int) -> None:
        self._spec, self._cpu, self._rows = spec, cpu, rows
        self._graphs = GraphPool(cpu.buft, self._build, _MAX_GRAPHS)
        self._graphs.reserve(n_batch)

    def embed(self, tokens: NDArray[np.int32]) -> Hidden:
        """The rows [n_tokens, n_embd], valid until the next step; raises ReadFailedError."""
        graph, numbers, result = self._graphs.get(len(tokens))
        self._rows.load(tokens)
        numbers[:] = np.arange(len(tokens))
        self._cpu.compute(graph)
        return result

    def _build(self, n_tokens: int) -> BuiltGraph[tuple[int, NDArray[np.int32], Hidden]]:
        ctx, graph = new_graph(self._spec, 0)
        numbers = int(ggml.ggml_new_tensor_1d(ctx, Type.I32, n_tokens))
        ggml.ggml_set_input(numbers)
        result = add_embeddings(ctx, self._spec, self._rows.tensor, numbers)
        ggml.ggml_set_output(result)
        ggml.ggml_build_forward_expand(graph, result)

        def prepare() -> tuple[int, NDArray[np.int32], Hidden]:
            filled, made = (ggml.ggml_get_data(tensor) for tensor in (numbers, result))
            rows = ggml.array_at(made, np.float32, n_tokens, self._spec.n_embd)
            return graph, ggml.array_at(filled, np.int32, n_tokens), rows

        return BuiltGraph(ctx, graph, prepare)

    def close(self) -> None:
        """Frees graphs and buffer."""
        self._graphs.close()


class MtpRunner:
    """Computes steps of the block, of at most `n_batch` tokens, of which at most `n_parallel` are predicted from.

    `spec` is that of the model with the block as its last layer, whose keys and values `cache` has. Cache and weights
    lie in the backend's memory.
    """

    def __init__(
        self,
        spec: ModelSpec,
        backend: Backend,
        cache: KVCache,
        weights: MtpWeights,
        embedder: TokenEmbedder,
        n_batch: int,
        n_parallel: int,
    ) -> None:
        self.spec, self._backend, self._cache, self._weights, self._embedder = spec, backend, cache, weights, embedder
        self._graphs = GraphPool(backend.buft, self._build, _MAX_GRAPHS, backend.check)
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

        The hidden states, [n_out, n_embd], stand for the model's.
        """
        prepared = self._run(batch, hidden, _Key(batch.n_tokens, batch.n_kv, batch.n_out, predicts=True))
        logits = np.empty((batch.n_out, self.spec.n_vocab), np.float32)
        last = np.empty((batch.n_out, self.spec.n_embd), np.float32)
        self._backend.get(prepared.logits, logits)
        self._backend.get(prepared.last, last)
        return logits, last

    def _run(self, batch: Batch, hidden: Hidden, key: _Key) -> _Prepared:
        prepared = self._graphs.get(key)
        mask = np.empty((batch.n_tokens, batch.n_kv if key.predicts else 0), np.float16)
        if key.predicts:
            fill_mask(mask, batch)
        values = self._embedder.embed(batch.tokens), hidden, batch.positions, batch.cells, mask
        kinds = _INPUT_TYPES[: len(prepared.inputs)]
        filled = [np.ascontiguousarray(one, kind) for one, kind in zip(values, kinds, strict=False)]
        for tensor, one in zip(prepared.inputs, filled, strict=True):
            self._backend.set_async(tensor, one)
        self._backend.compute(prepared.graph)
        return prepared

    def _build(self, key: _Key) -> BuiltGraph[_Prepared]:
        spec, weights, n_tokens, index = self.spec, self._weights, key.n_tokens, self.spec.n_layer - 1
        ctx, graph = new_graph(spec, 1)
        rows, before = (int(ggml.ggml_new_tensor_2d(ctx, Type.F32, spec.n_embd, n_tokens)) for _ in range(2))
        positions, cells = (int(ggml.ggml_new_tensor_1d(ctx, kind, n_tokens)) for kind in (Type.I32, Type.I64))
        mask = int(ggml.ggml_new_tensor_2d(ctx, Type.F16, key.n_kv, n_tokens)) if key.predicts else 0
        filled = (rows, before, positions, cells, *((mask,) if mask else ()))
        for tensor in filled:
            ggml.ggml_set_input(tensor)
        inputs, shape = StepInputs(0, positions, cells, mask), StepShape(n_tokens, key.n_kv, key.n_kv, key.n_out)
        ones = add_ones(ctx, spec, n_tokens) if isinstance(self._backend, CpuBackend) else 0
        blocks = BlockBuilder(ctx, graph, spec, weights.model, self._cache, shape, inputs, ones=ones)
        token = add_rms_norm(ctx, rows, weights.token_norm, spec.rms_eps)
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
            builder = AttentionBuilder if layer.latent is None else LatentAttentionBuilder
            attention = builder(ctx, graph, spec, self._cache, shape, inputs, weights.model.rope_freqs)
            attention.store(index, layer, add_norm(ctx, hidden, layer.attn_norm, spec.rms_eps))
        return BuiltGraph(ctx, graph, lambda: _Prepared(graph, filled, logits, last))

    def close(self) -> None:
        """Frees graphs and buffer; weights and cache are their owners' business."""
        self._graphs.close()
