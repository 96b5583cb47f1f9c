"""Runs steps of a resident model: keeps a graph per shape, fills its inputs, computes, and returns the logits."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from slimoe.offload.ggml import ops as ggml
from slimoe.offload.ggml.cpu_backend import CpuBackend
from slimoe.offload.graph.attention import StepShape
from slimoe.offload.graph.batch import Batch, fill_mask, fill_window_mask
from slimoe.offload.graph.expert_lookup import ExpertLookup
from slimoe.offload.graph.graph_pool import BuiltGraph, GraphPool
from slimoe.offload.graph.recurrent import StateViews
from slimoe.offload.graph.step import build_step
from slimoe.offload.graph.token_rows import TokenRows
from slimoe.offload.graph.weights import ModelWeights
from slimoe.offload.memory.kv_cache import KVCache
from slimoe.offload.model.spec import ModelSpec

Logits = NDArray[np.float32]
Hidden = NDArray[np.float32]

_MAX_GRAPHS = 24
_NONE = np.empty(0, np.float32)


@dataclass(frozen=True, slots=True)
class _Prepared:
    """An allocated graph and its inputs as arrays."""

    graph: int
    tokens: NDArray[np.int32]
    positions: NDArray[np.int32] | None
    cells: NDArray[np.int64] | None
    mask: NDArray[np.float16] | None
    window_cells: NDArray[np.int64] | None
    window_mask: NDArray[np.float16] | None
    temperatures: NDArray[np.float32]
    states: dict[str, NDArray[Any]]
    logits: Logits
    hidden: Hidden
    views: StateViews | None
    ranked: tuple[tuple[int, NDArray[np.int32]], ...]


class UseCounter(Protocol):
    """Counts how often experts were selected."""

    def add(self, layer: int, rows: NDArray[np.int32]) -> None:
        """Counts the rows of a layer's router that tokens selected, [n_tokens, n_used]."""


class Runner:
    """Computes steps over one KV cache.

    `weights` are those for steps of a number of tokens: the same numbers, arranged for the kernels that are fastest
    there. With `rows`, their token table is that tensor, filled for each step. With a `lookup`
    for the experts all steps are of one token. At most `n_graphs` graphs are kept. With `has_hidden` each step leaves
    the last hidden states of all its tokens in `hidden` [n_tokens, n_embd], which the next one overwrites.
    """

    def __init__(
        self,
        spec: ModelSpec,
        backend: CpuBackend,
        cache: KVCache,
        weights: Callable[[int], ModelWeights],
        rows: TokenRows | None,
        n_batch: int,
        uses: UseCounter,
        lookup: ExpertLookup | None = None,
        n_graphs: int = _MAX_GRAPHS,
        *,
        has_hidden: bool = False,
    ) -> None:
        self._has_hidden, self.hidden = has_hidden, _NONE
        self.spec, self.backend, self.cache, self._lookup = spec, backend, cache, lookup
        self._weights, self._rows, self._uses = weights, rows, uses
        self._graphs = GraphPool(backend.buft, self._build, n_graphs)
        n_runs = 1 if spec.recurrent else 0
        n_kv = cache.size.n_cells, cache.size.n_window_cells or cache.size.n_cells
        self._graphs.reserve(StepShape(n_batch, *n_kv, 1, n_runs, has_hidden))
        self._graphs.reserve(StepShape(1, *n_kv, 1, n_runs, has_hidden))

    @property
    def compute_bytes(self) -> int:
        """Size of the buffer that all intermediate results share."""
        return self._graphs.n_bytes

    def run(self, batch: Batch, is_cancelled: Callable[[], bool] | None = None) -> Logits:
        """Reads a batch; logits [n_out, n_vocab] of its last `n_out` tokens.

        The array is the engine's own memory and is overwritten by the next step. Raises EngineAbortedError.
        """
        assert batch.n_kv <= self.cache.size.n_cells
        prepared = self._graphs.get(replace(StepShape.of(batch), has_hidden=self._has_hidden))
        if self._rows is None:
            prepared.tokens[:] = batch.tokens
        else:
            self._rows.load(batch.tokens)
            prepared.tokens[:] = np.arange(batch.n_tokens)
        if prepared.positions is not None:
            prepared.positions[:] = batch.positions
        if temperature := self.spec.attention.temperature:
            prepared.temperatures[:] = temperature.factors(batch.positions)
        if prepared.states:
            assert self.spec.recurrent is not None
            for name, numbers in batch.state_inputs(self.spec.recurrent.n_parts).items():
                if name in prepared.states:
                    prepared.states[name][:] = numbers
        if prepared.mask is not None:
            assert prepared.cells is not None
            prepared.cells[:] = batch.cells
            fill_mask(prepared.mask, batch)
        if prepared.window_mask is not None:
            assert prepared.window_cells is not None
            prepared.window_cells[:] = batch.window_cells
            fill_window_mask(prepared.window_mask, batch, self.spec.n_window)
        if prepared.views is not None:
            prepared.views.move(batch)
        if is_cancelled is None:
            self.backend.compute(prepared.graph)
        else:
            self.backend.compute_until(prepared.graph, is_cancelled)
        for layer, ranked in prepared.ranked:
            self._uses.add(layer, ranked)
        self.hidden = prepared.hidden
        return prepared.logits

    def _build(self, shape: StepShape) -> BuiltGraph[_Prepared]:
        step = build_step(self.spec, self._weights(shape.n_tokens), self.cache, shape, self._lookup)

        def prepare() -> _Prepared:
            self._graphs.advise(step.logits)
            inputs, n_tokens, n_used = step.inputs, shape.n_tokens, self.spec.n_expert_used
            ranked = ((layer, _array(one, np.int32, *ggml.tensor_at(one).ne[1::-1])) for layer, one in step.ranked)
            return _Prepared(
                step.graph,
                tokens=_array(inputs.tokens, np.int32, n_tokens),
                positions=_array(inputs.positions, np.int32, n_tokens) if inputs.positions else None,
                cells=_array(inputs.cells, np.int64, n_tokens) if inputs.cells else None,
                mask=_array(inputs.mask, np.float16, n_tokens, shape.n_kv) if inputs.mask else None,
                window_cells=_array(inputs.window_cells, np.int64, n_tokens) if inputs.window_cells else None,
                window_mask=_array(inputs.window_mask, np.float16, n_tokens, shape.n_window_kv)
                if inputs.window_mask
                else None,
                temperatures=_array(inputs.temperatures, np.float32, n_tokens) if inputs.temperatures else _NONE,
                states={
                    name: _array(tensor, dtype, ggml.tensor_at(tensor).ne[0])
                    for name, tensor, dtype in (
                        ("states_from", inputs.states_from, np.int32),
                        ("states_to", inputs.states_to, np.int64),
                        ("states_read", inputs.states_read, np.int32),
                    )
                    if tensor
                },
                logits=_array(step.logits, np.float32, shape.n_out, self.spec.n_vocab),
                hidden=_array(step.hidden, np.float32, n_tokens, self.spec.n_embd) if shape.has_hidden else _NONE,
                views=step.views,
                ranked=tuple((layer, rows[:, :n_used]) for layer, rows in ranked),
            )

        return BuiltGraph(step.ctx, step.graph, prepare)

    def close(self) -> None:
        """Frees graphs and buffer."""
        self._graphs.close()


def _array(tensor: int, dtype: type[np.generic], *shape: int) -> NDArray[Any]:
    return ggml.array_at(ggml.ggml_get_data(tensor), dtype, *shape)
