"""Runs steps: keeps one graph per shape, fills its inputs, computes, and hands out the logits."""

import ctypes
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offload import ggml, ggml_backend
from offload.backend import CpuBackend
from offload.batch import Batch, fill_mask
from offload.graph import StepGraph, StepShape, build_step
from offload.kv_cache import KVCache
from offload.memory import advise_huge_pages, out_of_memory
from offload.model_spec import ModelSpec
from offload.weights import ModelWeights

Logits = NDArray[np.float32]

_MAX_GRAPHS = 24


@dataclass(frozen=True, slots=True)
class _Prepared:
    """An allocated graph and its inputs as arrays."""

    step: StepGraph
    tokens: NDArray[np.int32]
    positions: NDArray[np.int32]
    cells: NDArray[np.int64]
    mask: NDArray[np.float16]
    logits: Logits


class Runner:
    """Computes steps over one KV cache.

    `batched` weights serve steps of several tokens, `single` ones those of one: the same numbers, arranged for the
    kernels that are faster there. One allocator serves all graphs, since only one runs at a time.
    """

    def __init__(
        self,
        spec: ModelSpec,
        backend: CpuBackend,
        cache: KVCache,
        batched: ModelWeights,
        single: ModelWeights,
        n_batch: int,
    ) -> None:
        self.spec, self.backend, self.cache = spec, backend, cache
        self._batched, self._single = batched, single
        self._graphs: OrderedDict[StepShape, _Prepared] = OrderedDict()
        self._allocator = ggml_backend.ggml_gallocr_new(ggml_backend.ggml_backend_cpu_buffer_type())
        self._reserve(StepShape(n_batch, cache.n_cells, 1))
        self._reserve(StepShape(1, cache.n_cells, 1))

    @property
    def compute_bytes(self) -> int:
        """Size of the buffer that all intermediate results share."""
        return int(ggml_backend.ggml_gallocr_get_buffer_size(self._allocator, 0))

    def run(self, batch: Batch, is_cancelled: Callable[[], bool] | None = None) -> Logits:
        """Reads a batch; logits [n_out, n_vocab] of its last `n_out` tokens.

        The array is the engine's own memory and is overwritten by the next step. Raises EngineAbortedError.
        """
        assert self._allocator, "the engine is closed"
        assert batch.n_kv <= self.cache.n_cells
        prepared = self._prepare(StepShape(batch.n_tokens, batch.n_kv, batch.n_out))
        prepared.tokens[:] = batch.tokens
        prepared.positions[:] = batch.positions
        prepared.cells[:] = batch.cells
        fill_mask(prepared.mask, batch)
        if is_cancelled is None:
            self.backend.compute(prepared.step.graph)
        else:
            self.backend.compute_until(prepared.step.graph, is_cancelled)
        return prepared.logits

    def _build(self, shape: StepShape) -> StepGraph:
        weights = self._single if shape.n_tokens == 1 else self._batched
        return build_step(self.spec, weights, self.cache, shape)

    def _reserve(self, shape: StepShape) -> None:
        step = self._build(shape)
        reserved = ggml_backend.ggml_gallocr_reserve(self._allocator, step.graph)
        ggml.ggml_free(step.ctx)
        if not reserved:
            raise out_of_memory(self.compute_bytes)

    def _prepare(self, shape: StepShape) -> _Prepared:
        prepared = self._graphs.get(shape)
        if prepared is not None:
            self._graphs.move_to_end(shape)
            return prepared
        step = self._build(shape)
        before = self.compute_bytes
        if not ggml_backend.ggml_gallocr_alloc_graph(self._allocator, step.graph):
            ggml.ggml_free(step.ctx)
            raise out_of_memory(before)
        self._advise(step)
        if self.compute_bytes != before:
            # The buffer has moved, and with it the tensors of every graph that was allocated in it.
            self._drop_graphs(keep=0)
        self._drop_graphs(keep=_MAX_GRAPHS - 1)
        self._graphs[shape] = prepared = _arrays(step, shape, self.spec.n_vocab)
        return prepared

    def _advise(self, step: StepGraph) -> None:
        """Wishes for huge pages under the compute buffer, which only a graph allocated in it leads to."""
        buffer = ggml.tensor_at(step.logits).buffer
        advise_huge_pages(ggml_backend.ggml_backend_buffer_get_base(buffer), self.compute_bytes)

    def _drop_graphs(self, keep: int) -> None:
        while len(self._graphs) > keep:
            _, oldest = self._graphs.popitem(last=False)
            ggml.ggml_free(oldest.step.ctx)

    def close(self) -> None:
        """Frees graphs and the compute buffer."""
        self._drop_graphs(keep=0)
        if self._allocator:
            ggml_backend.ggml_gallocr_free(self._allocator)
            self._allocator = None


def _arrays(step: StepGraph, shape: StepShape, n_vocab: int) -> _Prepared:
    inputs = step.inputs
    return _Prepared(
        step,
        tokens=_array(inputs.tokens, np.int32, shape.n_tokens),
        positions=_array(inputs.positions, np.int32, shape.n_tokens),
        cells=_array(inputs.cells, np.int64, shape.n_tokens),
        mask=_array(inputs.mask, np.float16, shape.n_tokens, shape.n_kv),
        logits=_array(step.logits, np.float32, shape.n_out, n_vocab),
    )


def _array(tensor: int, dtype: type[np.generic], *shape: int) -> NDArray[Any]:
    """A tensor's memory as an array."""
    n_bytes = ggml.ggml_nbytes(tensor)
    memory = (ctypes.c_uint8 * n_bytes).from_address(ggml.ggml_get_data(tensor))
    return np.frombuffer(memory, dtype).reshape(shape)
