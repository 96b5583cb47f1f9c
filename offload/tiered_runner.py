"""Runs steps of a model that is not resident everywhere: segment, experts, segment, experts, ..., logits."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from offload import ggml
from offload.backend import Backend, EngineAbortedError
from offload.batch import Batch, fill_mask
from offload.exchange import Exchange
from offload.expert_stage import ExpertStage
from offload.graph import StepShape
from offload.graph_pool import BuiltGraph, GraphPool
from offload.kv_cache import KVCache
from offload.model_spec import ModelSpec
from offload.runner import Logits
from offload.segment import Segment, SegmentBuilder, cut_into_segments
from offload.token_rows import TokenRows
from offload.weights import ModelWeights

_MAX_STEPS = 6
"""So many shapes of steps are kept; one costs some 60 KB a layer."""


@dataclass(frozen=True, slots=True)
class _Key:
    segment: Segment
    shape: StepShape


@dataclass(frozen=True, slots=True)
class _Prepared:
    graph: int
    logits: int


class TieredRunner:
    """Computes steps over one KV cache, with `stage` for the experts of the cut layers.

    With `rows`, the model's token table is that tensor, and holds the rows of a step's tokens in their order.
    """

    def __init__(
        self,
        spec: ModelSpec,
        backend: Backend,
        cache: KVCache,
        weights: ModelWeights,
        exchange: Exchange,
        stage: ExpertStage,
        rows: TokenRows | None,
        n_batch: int,
    ) -> None:
        self.spec, self.backend, self.cache = spec, backend, cache
        self._weights, self._exchange, self._stage, self._rows = weights, exchange, stage, rows
        self._segments = cut_into_segments(spec.n_layer, stage.layers, stage.n_ahead)
        self._graphs = GraphPool(backend.buft, self._build, _MAX_STEPS * len(self._segments))
        for segment in self._segments:
            self._graphs.reserve(_Key(segment, StepShape(n_batch, cache.n_cells, 1)))
            self._graphs.reserve(_Key(segment, StepShape(1, cache.n_cells, 1)))

    @property
    def compute_bytes(self) -> int:
        """Size of the buffers that all intermediate results share."""
        return int(self._graphs.n_bytes + self._exchange.n_bytes + self._stage.compute_bytes)

    def run(self, batch: Batch, is_cancelled: Callable[[], bool] | None = None) -> Logits:
        """Reads a batch; logits [n_out, n_vocab] of its last `n_out` tokens, valid until the next step.

        Raises EngineAbortedError, which `is_cancelled` causes between two layers at the latest, and ReadFailedError.
        """
        assert batch.n_kv <= self.cache.n_cells
        shape = StepShape(batch.n_tokens, batch.n_kv, batch.n_out)
        self._write_inputs(batch)
        self._stage.begin(batch)
        for segment in self._segments:
            prepared = self._graphs.get(_Key(segment, shape))
            if is_cancelled is None:
                self.backend.compute(prepared.graph)
            elif is_cancelled():
                raise EngineAbortedError
            else:
                self.backend.compute_until(prepared.graph, is_cancelled)
            if segment.end < self.spec.n_layer:
                is_last = segment.end == self.spec.n_layer - 1
                self._stage.run(segment, batch.n_out if is_last else batch.n_tokens, is_cancelled)
        self._stage.end()
        return self._logits(prepared.logits, batch.n_out)

    def _write_inputs(self, batch: Batch) -> None:
        exchange = self._exchange
        if self._rows is None:
            exchange.write("tokens", batch.tokens)
        else:
            self._rows.load(batch.tokens)
            exchange.write("tokens", np.arange(batch.n_tokens))
        exchange.write("positions", batch.positions)
        exchange.write("cells", batch.cells)
        if exchange.is_host:
            fill_mask(exchange.read("mask", batch.n_tokens, batch.n_kv), batch)
        else:
            mask = np.empty((batch.n_tokens, batch.n_kv), np.float16)
            fill_mask(mask, batch)
            exchange.write("mask", mask)

    def _logits(self, tensor: int, n_out: int) -> Logits:
        if self.backend.is_host:
            return ggml.array_at(ggml.ggml_get_data(tensor), np.float32, n_out, self.spec.n_vocab)
        logits = np.empty((n_out, self.spec.n_vocab), np.float32)
        self.backend.get(tensor, logits)
        return logits

    def _build(self, key: _Key) -> BuiltGraph[_Prepared]:
        builder = SegmentBuilder(self.spec, self._weights, self.cache, key.shape, self._exchange, key.segment)
        built = builder.build_segment()
        return BuiltGraph(built.ctx, built.graph, lambda: _Prepared(built.graph, built.logits))

    def close(self) -> None:
        """Frees graphs and buffers; weights and experts are their owners' business."""
        self._graphs.close()
        self._stage.close()
        self._exchange.close()
