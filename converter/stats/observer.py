"""Learns one layer's statistics while a stream passes it."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from slimoe.converter.forward.block import AttentionPass, Expert, Routing, read_expert, read_tensor, rms_norm
from slimoe.converter.forward.stream import Observer
from slimoe.converter.source.model_source import ModelSource, block_key
from slimoe.converter.stats.routing_sums import Foresight, Picks, RoutingSums
from slimoe.converter.stats.statistics import LayerStatistics, SimilaritySums, TypeErrors
from slimoe.converter.stats.statistics_file import to_arrays
from slimoe.converter.stats.sums import (
    InputTotals,
    OutputTotals,
    SimilarityTotals,
    SketchRows,
    TraceRows,
    sketch_size,
    spread_rows,
)
from slimoe.converter.stats.type_errors import DEFAULT_TYPES, TypeErrorTable
from slimoe.offload.errors import ModelFileError


@dataclass(frozen=True, slots=True)
class Samples:
    """What is measured on a sample: errors of `types` on so many picks of each expert and so many rows of its matrices,
    none if empty, and the sketch of so many tokens, none if 0.
    """

    types: tuple[str, ...] = DEFAULT_TYPES
    n_picks: int = 512
    n_rows: int = 512
    n_sketch: int = 2048


@dataclass(frozen=True, slots=True)
class LayerFindings:
    """A layer's statistics, and what the next routers would pick from its input; the sums of both are linked later."""

    statistics: LayerStatistics
    foreseen: Picks | None


class LayerObserver(Observer):
    """Feeds every sum of one layer; `read_expert` is to be the pass's source of experts."""

    def __init__(
        self, source: ModelSource, layer: int, n_rows: int, samples: Samples, device: str = "cpu", n_threads: int = 1
    ) -> None:
        self._source, self._layer, self._device = source, layer, device
        self._of = source.layers[layer]
        self._inputs = InputTotals(source, layer)
        self._similarity = SimilarityTotals()
        norm = block_key(layer, "ffn_norm")
        self._norm = read_tensor(source, norm) if norm in source.shapes else None
        self._experts = _ExpertObserver(source, layer, n_rows, samples, device, n_threads) if self._of.target else None

    def read_expert(self, expert: int) -> Expert:
        """The layer's own expert, of which all that needs its weights is measured before the next is read."""
        assert self._experts is not None
        return self._experts.read(expert, self._inputs)

    def attention(self, layer: int, first_row: int, h: Tensor, seen: AttentionPass) -> None:
        """Sums over its inputs."""
        self._check(seen.update)
        self._inputs.add_attention(seen.x, seen.mixed)
        if self._experts is not None:
            self._experts.trace.add_attention(first_row, seen.received)

    def routed(self, layer: int, first_row: int, x: Tensor, routing: Routing) -> None:
        """Sums over the router's answers."""
        assert self._experts is not None
        self._check(routing.logits)
        self._inputs.add_router(x)
        self._experts.add_routing(first_row, x, routing)

    def expert(self, layer: int, expert: int, rows: Tensor, x: Tensor, hidden: Tensor, shares: Tensor) -> None:
        """Sums over an expert's inputs."""
        assert self._experts is not None
        self._inputs.add_expert(expert, x, hidden)
        self._experts.keep_sample(x, shares)

    def output(self, layer: int, expert: int, rows: Tensor, shares: Tensor, output: Tensor) -> None:
        """Sums over its answers."""
        assert self._experts is not None
        self._check(output)
        self._experts.outputs.add(expert, shares, output)

    def block(self, layer: int, first_row: int, h: Tensor, middle: Tensor, after: Tensor) -> None:
        """Similarities."""
        self._check(after)
        x = None if self._norm is None else rms_norm(middle, self._norm, self._source.spec.rms_eps)
        self._similarity.add(h, middle, after, x)
        if self._experts is not None and self._experts.sketch is not None:
            self._experts.sketch.add_middle(first_row, middle)

    def _check(self, values: Tensor) -> None:
        if not bool(values.isfinite().all()):
            raise self._no_numbers()

    def _no_numbers(self) -> ModelFileError:
        problem = f"layer {self._layer} computes NaN or infinity."
        hint = "Its weights are damaged, or too large for float32; download or convert it again."
        return ModelFileError(self._source.path, problem, hint)

    def finish(self) -> LayerFindings:
        """Everything; the pass must be over. Raises ModelFileError for sums beyond float32."""
        similarity = self._similarity.finish()
        with np.errstate(over="ignore"):
            if self._experts is None:
                return LayerFindings(LayerStatistics(similarity, self._inputs.finish()), None)
            found = self._experts.finish(similarity, self._inputs)
        parts = (found.statistics.inputs, found.statistics.outputs, found.statistics.sketch)
        # The squares of large answers overflow where the answers themselves do not.
        arrays = [array for part in parts if part is not None for array in to_arrays(part).values()]
        if not all(np.isfinite(array).all() for array in arrays):
            raise self._no_numbers()
        return found


class _ExpertObserver:
    """What a layer with experts has beside the rest."""

    def __init__(
        self, source: ModelSource, layer: int, n_rows: int, samples: Samples, device: str, n_threads: int
    ) -> None:
        self._source, self._layer, self._device, self._samples = source, layer, device, samples
        self._target = np.array(source.layers[layer].target)
        n_stored, n_row, n_embd = source.layers[layer].n_stored, len(self._target), source.spec.n_embd
        self._routing = RoutingSums(n_row, source.spec.n_expert_used)
        self._foresight = Foresight(source, layer, n_rows, device)
        self.trace = TraceRows(n_rows, source.spec.n_expert_used)
        self.outputs = OutputTotals(n_stored, n_embd)
        self._errors: TypeErrorTable | None = None
        if samples.types:
            self._errors = TypeErrorTable(source, layer, samples.types, samples.n_rows, n_threads)
        self.sketch: SketchRows | None = None
        if samples.n_sketch:
            rows = spread_rows(n_rows, sketch_size(samples.n_sketch, n_rows, n_stored, n_embd))
            self.sketch = SketchRows(rows, n_stored, n_row, n_embd)
        self._current: tuple[int, Expert] | None = None
        self._sampled: list[tuple[Tensor, Tensor]] = []
        self._wanted, self._n_seen = np.empty(0, np.int64), 0

    def add_routing(self, first_row: int, x: Tensor, routing: Routing) -> None:
        """One sequence's."""
        self._routing.add(routing)
        self._foresight.add(first_row, x)
        self.trace.add_routing(first_row, x, routing)
        if self.sketch is not None:
            self.sketch.add_routing(first_row, x, routing.logits)

    def read(self, expert: int, inputs: InputTotals) -> Expert:
        """The next expert's weights."""
        self._finish_current(inputs)
        weights = read_expert(self._source, self._layer, expert, self._device)
        self._current = (expert, weights)
        n_picks = int(self._routing.n_picks[self._target == expert].sum())
        self._wanted, self._n_seen = spread_rows(n_picks, self._samples.n_picks), 0
        if self.sketch is not None:
            self.sketch.add_expert(expert, weights)
        return weights

    def keep_sample(self, x: Tensor, shares: Tensor) -> None:
        """Keeps those of the current expert's next picks that are in the sample."""
        begin, end = np.searchsorted(self._wanted, (self._n_seen, self._n_seen + len(x))).tolist()
        own = torch.from_numpy(self._wanted[begin:end] - self._n_seen).to(x.device)
        self._sampled.append((x[own], shares[own]))
        self._n_seen += len(x)

    def _finish_current(self, inputs: InputTotals) -> None:
        """Measures what types cost the expert whose picks have all been seen."""
        if self._current is not None and self._errors is not None:
            number, weights = self._current
            x, shares = (torch.cat(part) for part in zip(*self._sampled, strict=True))
            of_sample = self._errors.measure(number, weights, x, shares, inputs.of_expert(number))
            of_all = self.outputs.weighted_square(number)
            self._errors.scale(number, of_all / of_sample if of_sample > 0 else 1.0)
        self._sampled, self._current = [], None

    def finish(self, similarity: SimilaritySums, inputs: InputTotals) -> LayerFindings:
        """Everything, also of experts that no token picked."""
        self._finish_current(inputs)
        sketch = None
        if self.sketch is not None:
            for expert in self.sketch.missing:
                self.sketch.add_expert(expert, read_expert(self._source, self._layer, expert, self._device))
            sketch = self.sketch.finish(self.outputs.means())
        errors = None if self._errors is None else TypeErrors(self._errors.types, self._errors.error)
        return LayerFindings(
            LayerStatistics(
                similarity=similarity,
                inputs=inputs.finish(),
                router=self._routing.finish(),
                outputs=self.outputs.finish(),
                trace=self.trace.finish(),
                type_errors=errors,
                sketch=sketch,
            ),
            self._foresight.picks,
        )
