"""Runs steps of a model that is not resident in one memory: segment, MoE step, segment, MoE step, ..., logits."""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from slimoe.offload.errors import DeviceError, DoesNotFitError
from slimoe.offload.experts.device_part import DevicePart
from slimoe.offload.experts.moe_step import MoEStep
from slimoe.offload.experts.single_token import SingleTokenSteps
from slimoe.offload.ggml import ops as ggml
from slimoe.offload.ggml.cpu_backend import Backend, EngineAbortedError
from slimoe.offload.graph.attention import StepShape
from slimoe.offload.graph.batch import Batch, fill_mask, fill_window_mask
from slimoe.offload.graph.graph_pool import BuiltGraph, GraphPool
from slimoe.offload.graph.recurrent import StateViews
from slimoe.offload.graph.runner import Hidden, Logits
from slimoe.offload.graph.segment import build_segment, cut_into_segments
from slimoe.offload.graph.token_rows import TokenRows
from slimoe.offload.model.spec import ModelSpec

_MAX_STEPS, _MAX_RECURRENT_STEPS = 6, 8
"""So many shapes of steps are kept, more where layers are recurrent: tokens that are read again after a wrong draft are
of any number. One costs some 60 KB a layer."""


_Key = tuple[int, int, int, int, int, int]
"""Number of a segment, and its step's tokens, cells, those in layers with a window, rows of logits and runs; hashed
many times per token."""


@dataclass(frozen=True, slots=True)
class _Prepared:
    graph: int
    logits: int
    hidden: int
    views: StateViews | None


class TieredRunner:
    """Computes steps over device parts; the experts of the cut layers are an MoE step's, which must be attached.

    With `rows`, the token table of the first part is that tensor, and holds the rows of a step's tokens in their order.
    `n_batch` and `n_out` are the most tokens and rows of logits of a step; a device has memory for them from the start.
    With `has_hidden` each step leaves the last hidden states of all its tokens in `hidden` [n_tokens, n_embd], which
    the next one may overwrite.
    """

    def __init__(
        self,
        spec: ModelSpec,
        parts: Sequence[DevicePart],
        cut_layers: Collection[int],
        prefetch_depth: int,
        rows: TokenRows | None,
        n_batch: int,
        n_out: int,
        *,
        has_hidden: bool = False,
    ) -> None:
        self._has_hidden, self.hidden = has_hidden, np.empty(0, np.float32)
        self.spec, self.parts, self._rows = spec, parts, rows
        self._moe_step: MoEStep | None = None
        self._single: SingleTokenSteps | None = None
        self._segments = cut_into_segments([part.layers for part in parts], cut_layers, prefetch_depth)
        n_graphs = (_MAX_RECURRENT_STEPS if spec.recurrent else _MAX_STEPS) * len(self._segments)
        backends = [part.backend for part in parts]
        self._graphs = [GraphPool(one.buft, self._build, n_graphs, one.check) for one in backends]
        size = next(part.cache.size for part in parts if part.cache is not None)
        self._n_cells = size.n_cells
        try:
            for index, segment in enumerate(self._segments):
                n_most = 1 if backends[segment.part].is_host else n_out
                n_runs = 1 if spec.recurrent else 0
                for n_tokens, n_rows in ((n_batch, n_most), (1, 1)):
                    n_kv = size.n_cells, size.n_window_cells or size.n_cells
                    self._graphs[segment.part].reserve((index, n_tokens, *n_kv, n_rows, n_runs))
        except (DeviceError, DoesNotFitError):
            self.close()
            raise

    def attach(self, moe_step: MoEStep) -> None:
        """Hands over what computes the experts; it is closed with the runner."""
        self._moe_step = moe_step

    def attach_single(self, single: SingleTokenSteps) -> None:
        """Hands over what computes steps of one token while it can; it is closed with the runner."""
        self._single = single

    @property
    def graph_bytes(self) -> int:
        """Host memory for the graphs of segments, which is not touched before the first step."""
        parts = zip(self._graphs, self.parts, strict=True)
        return sum(graphs.n_bytes for graphs, part in parts if part.backend.is_host)

    @property
    def compute_bytes(self) -> int:
        """Size of the buffers in host memory that intermediate results share."""
        exchanges: int = sum(part.exchange.n_bytes for part in self.parts if part.backend.is_host)
        single = 0 if self._single is None else self._single.compute_bytes
        return self.graph_bytes + exchanges + single + (0 if self._moe_step is None else self._moe_step.compute_bytes)

    def run(self, batch: Batch, is_cancelled: Callable[[], bool] | None = None) -> Logits:
        """Reads a batch; logits [n_out, n_vocab] of its last `n_out` tokens, valid until the next step.

        Raises EngineAbortedError, which `is_cancelled` causes between two layers at the latest, and ReadFailedError.
        """
        assert batch.n_kv <= self._n_cells
        if batch.n_tokens == 1 and self._single is not None and self._single.is_ready():
            logits, self.hidden = self._single.run(batch, is_cancelled), self._single.hidden
            return logits
        shape = batch.n_tokens, batch.n_kv, batch.n_window_kv, batch.n_out, len(batch.states)
        begin = time.perf_counter()
        self._write_inputs(batch)
        if self._moe_step is not None:
            self._moe_step.begin(batch)
        for index, segment in enumerate(self._segments):
            part = self.parts[segment.part]
            if index and segment.part != self._segments[index - 1].part:
                handed_over = self.parts[segment.part - 1].exchange.read("residual", batch.n_tokens, self.spec.n_embd)
                part.exchange.write("residual", handed_over)
            prepared = self._graphs[segment.part].get((index, *shape))
            if prepared.views is not None:
                prepared.views.move(batch)
            if is_cancelled is None:
                part.backend.compute(prepared.graph)
            elif is_cancelled():
                raise EngineAbortedError
            else:
                part.backend.compute_until(prepared.graph, is_cancelled)
            if segment.end == "router":
                assert self._moe_step is not None
                is_last = segment.last == self.spec.n_layer - 1
                n_rows = batch.n_out if is_last and not self._has_hidden else batch.n_tokens
                self._moe_step.run(segment, n_rows, is_cancelled)
        if self._moe_step is not None:
            self._moe_step.end()
        if self._has_hidden:
            self.hidden = _read(part.backend, prepared.hidden, batch.n_tokens, self.spec.n_embd)
        logits = _read(part.backend, prepared.logits, batch.n_out, self.spec.n_vocab)
        if not part.backend.is_host and self._moe_step is not None:
            self._moe_step.watch(time.perf_counter() - begin)
        return logits

    def _write_inputs(self, batch: Batch) -> None:
        """Tokens go to the first part, their places in the KV cache and what they see there to all."""
        if self._rows is not None:
            self._rows.load(batch.tokens)
        first = self.parts[0].exchange
        first.write("tokens", batch.tokens if self._rows is None else np.arange(batch.n_tokens))
        for part in self.parts:
            if not part.layers:
                continue
            exchange = part.exchange
            exchange.write("positions", batch.positions)
            exchange.write("cells", batch.cells)
            if temperature := self.spec.attention.temperature:
                exchange.write("temperatures", temperature.factors(batch.positions))
            if recurrent := self.spec.recurrent:
                for name, numbers in batch.state_inputs(recurrent.n_parts).items():
                    exchange.write(name, numbers)
            if has_windows := any(self.spec.windowed):
                exchange.write("window_cells", batch.window_cells)
            for name in ("mask", "window_mask") if has_windows else ("mask",):
                shape = batch.n_tokens, batch.n_kv if name == "mask" else batch.n_window_kv
                mask = exchange.read(name, *shape) if exchange.is_host else np.empty(shape, np.float16)
                if name == "mask":
                    fill_mask(mask, batch)
                else:
                    fill_window_mask(mask, batch, self.spec.n_window)
                if not exchange.is_host:
                    exchange.write(name, mask)

    def _build(self, key: _Key) -> BuiltGraph[_Prepared]:
        segment, shape = self._segments[key[0]], StepShape(*key[1:], self._has_hidden)
        part = self.parts[segment.part]
        built = build_segment(self.spec, part.weights, part.cache, shape, part.exchange, segment)
        return BuiltGraph(
            built.ctx, built.graph, lambda: _Prepared(built.graph, built.logits, built.hidden, built.views)
        )

    def close(self) -> None:
        """Frees the graphs; weights, exchanges and experts' memory are their owners' business."""
        for graphs in self._graphs:
            graphs.close()
        if self._moe_step is not None:
            self._moe_step.close()
        if self._single is not None:
            self._single.close()


def _read(backend: Backend, tensor: int, *shape: int) -> Hidden:
    """An F32 tensor of a graph that has run, itself where the host sees it."""
    if backend.is_host:
        return ggml.array_at(ggml.ggml_get_data(tensor), np.float32, *shape)
    values = np.empty(shape, np.float32)
    backend.get(tensor, values)
    return values
