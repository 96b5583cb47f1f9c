"""Gathers the statistics of one layer while the residual stream of texts passes through it."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slimoe.converter.forward.attention_pass import AttentionPass
from slimoe.converter.forward.block import read_expert, read_ffn_norm, read_latent_space
from slimoe.converter.forward.expert import Expert
from slimoe.converter.forward.routing import Routing
from slimoe.converter.forward.stream import Observer
from slimoe.converter.neurons.width_errors import WidthErrorTable
from slimoe.converter.source.model_source import ModelSource
from slimoe.converter.stats.routing_sums import RouterPrediction, RoutingSums, Selected
from slimoe.converter.stats.statistics import LayerStatistics, SimilaritySums, TypeErrors, WidthErrors
from slimoe.converter.stats.statistics_file import to_arrays
from slimoe.converter.stats.sums import (
    GramRows,
    InputTotals,
    OutputTotals,
    SimilarityTotals,
    TraceRows,
    gram_size,
    spread_rows,
)
from slimoe.converter.stats.type_errors import DEFAULT_TYPES, TypeErrorTable
from slimoe.offload.errors import ModelFileError


@dataclass(frozen=True, slots=True)
class Samples:
    """What is measured on a sample of the tokens, and how large the samples are.

    The errors of `types`, none if empty, are measured on `n_tokens` tokens of each expert and `n_rows` rows of its
    matrices; Gram matrices of the experts' outputs on `n_gram` tokens of the layer, none if 0. With `widths`, what
    experts would lose if they were narrower is measured on all tokens.
    """

    types: tuple[str, ...] = DEFAULT_TYPES
    n_tokens: int = 512
    n_rows: int = 512
    n_gram: int = 2048
    widths: bool = True

    def stored(self) -> dict[str, Any]:
        """The samples under the names that the notes of statistics files and interrupted passes have for them."""
        sizes = {"types": self.types, "n_picks": self.n_tokens, "n_rows": self.n_rows, "n_sketch": self.n_gram}
        return sizes if self.widths else {**sizes, "widths": False}


@dataclass(frozen=True, slots=True)
class LayerFindings:
    """A layer's statistics, and the rows that the next layers' routers select from this layer's input.

    `link` adds the sums that compare both with the next layers.
    """

    statistics: LayerStatistics
    predicted: Selected | None


class LayerObserver(Observer):
    """Gathers all sums of one layer; the pass must read experts by `read_expert`."""

    def __init__(
        self, source: ModelSource, layer: int, n_rows: int, samples: Samples, device: str = "cpu", n_threads: int = 1
    ) -> None:
        self._source, self._layer, self._device = source, layer, device
        self._of = source.layers[layer]
        self._inputs = InputTotals(source, layer)
        self._similarity = SimilarityTotals()
        self._norm = read_ffn_norm(source, layer) if self._of.has_ffn else None
        self._space = read_latent_space(source, layer)
        self._experts = _ExpertObserver(source, layer, n_rows, samples, device, n_threads) if self._of.target else None

    def read_expert(self, expert: int) -> Expert:
        """Reads an expert of the layer, after measuring everything that needs the matrices of the one before it."""
        assert self._experts is not None
        return self._experts.read(expert, self._inputs)

    def attention(self, layer: int, first_row: int, h: Tensor, seen: AttentionPass) -> None:
        """Adds a sequence's inputs of the attention."""
        self._check(seen.update)
        self._inputs.add_attention(seen.reads)
        if self._experts is not None:
            self._experts.trace.add_attention(first_row, seen.received)

    def routed(self, layer: int, first_row: int, x: Tensor, read: Tensor, routing: Routing) -> None:
        """Adds a sequence's routing."""
        assert self._experts is not None
        self._check(routing.logits)
        self._inputs.add_router(x)
        self._experts.add_routing(first_row, x, read, routing)

    def expert(self, layer: int, expert: int, rows: Tensor, x: Tensor, hidden: Tensor, weights: Tensor) -> None:
        """Adds tokens of an expert: the inputs of its matrices."""
        assert self._experts is not None
        self._inputs.add_expert(expert, x, hidden)
        self._experts.keep_sample(x, weights)
        self._experts.widths.add(rows, hidden, weights)

    def always(self, layer: int, x: Tensor, hidden: Tensor) -> None:
        """Adds tokens of a dense layer or a shared expert: the inputs of its matrices."""
        self._inputs.add_always(x, hidden)

    def summed(self, layer: int, total: Tensor) -> None:
        """Adds what the matrix behind the experts reads, where there is one."""
        if self._space is not None:
            self._inputs.add_sum(total)

    def output(self, layer: int, expert: int, rows: Tensor, weights: Tensor, output: Tensor) -> None:
        """Adds tokens of an expert: its outputs."""
        assert self._experts is not None
        self._check(output)
        self._experts.outputs.add(expert, weights, output)

    def block(self, layer: int, first_row: int, h: Tensor, middle: Tensor, after: Tensor) -> None:
        """Adds a sequence's residual streams, to compare before and after."""
        self._check(after)
        x = None if self._norm is None else self._norm(middle)
        self._similarity.add(h, middle, after, x)
        if self._experts is not None and self._experts.gram is not None:
            # What is added to the stream is scaled first in some models: experts' outputs are not, so the stream is.
            stream = middle / self._source.spec.multipliers.residual
            self._experts.gram.add_middle(first_row, self._space.taken_back(stream) if self._space else stream)

    def _check(self, values: Tensor) -> None:
        if not bool(values.isfinite().all()):
            raise self._no_numbers()

    def _no_numbers(self) -> ModelFileError:
        problem = f"layer {self._layer} computes NaN or infinity."
        hint = "Its weights are damaged, or too large for float32; download or convert it again."
        return ModelFileError(self._source.path, problem, hint)

    def finish(self) -> LayerFindings:
        """The layer's statistics, after the pass; raises ModelFileError for sums beyond float32."""
        similarity = self._similarity.finish()
        with np.errstate(over="ignore"):
            if self._experts is None:
                return LayerFindings(LayerStatistics(similarity, self._inputs.finish()), None)
            found = self._experts.finish(similarity, self._inputs)
        parts = (found.statistics.inputs, found.statistics.outputs, found.statistics.sketch)
        # The squares of large outputs overflow where the outputs themselves do not.
        arrays = [array for part in parts if part is not None for array in to_arrays(part).values()]
        if not all(np.isfinite(array).all() for array in arrays):
            raise self._no_numbers()
        return found


class _ExpertObserver:
    """Gathers what only a layer with experts has: routing, outputs, errors of types, and Gram matrices."""

    def __init__(
        self, source: ModelSource, layer: int, n_rows: int, samples: Samples, device: str, n_threads: int
    ) -> None:
        self._source, self._layer, self._device, self._samples = source, layer, device, samples
        self._target = np.array(source.layers[layer].target)
        n_stored, n_row, n_embd = source.layers[layer].n_stored, len(self._target), source.spec.n_embd_expert
        self._routing = RoutingSums(n_row, source.spec.n_expert_used)
        self._prediction = RouterPrediction(source, layer, n_rows, device)
        self.trace = TraceRows(n_rows, source.spec.n_expert_used)
        self.outputs = OutputTotals(n_stored, n_embd)
        self._errors: TypeErrorTable | None = None
        if samples.types:
            self._errors = TypeErrorTable(source, layer, samples.types, samples.n_rows, n_threads)
        self.widths = WidthErrorTable(n_stored, source.spec.layer_shape(layer).n_ff, is_wanted=samples.widths)
        self.gram: GramRows | None = None
        if samples.n_gram:
            rows = spread_rows(n_rows, gram_size(samples.n_gram, n_rows, n_stored, n_embd))
            self.gram = GramRows(rows, n_stored, n_row, n_embd)
        self._current: tuple[int, Expert] | None = None
        self._sampled: list[tuple[Tensor, Tensor]] = []
        self._wanted, self._n_seen = np.empty(0, np.int64), 0

    def add_routing(self, first_row: int, x: Tensor, read: Tensor, routing: Routing) -> None:
        """Adds a sequence's routing, the inputs [n, n_embd] of its router, and those of its experts."""
        self._routing.add(routing)
        self._prediction.add(first_row, x)
        self.trace.add_routing(first_row, x, routing)
        if self.gram is not None:
            self.gram.add_routing(first_row, read, routing.logits)

    def read(self, expert: int, inputs: InputTotals) -> Expert:
        """Reads the matrices of the next expert, after finishing the one before it."""
        self._finish_current(inputs)
        matrices = read_expert(self._source, self._layer, expert, self._device)
        self._current = (expert, matrices)
        self.widths.begin(expert, matrices.down.weight.shape[1])
        n_tokens = int(self._routing.n_selected[self._target == expert].sum())
        self._wanted, self._n_seen = spread_rows(n_tokens, self._samples.n_tokens), 0
        if self.gram is not None:
            self.gram.add_expert(expert, matrices)
        return matrices

    def keep_sample(self, x: Tensor, weights: Tensor) -> None:
        """Keeps those of the current expert's next tokens that are in the sample: inputs and expert weights."""
        begin, end = np.searchsorted(self._wanted, (self._n_seen, self._n_seen + len(x))).tolist()
        own = torch.from_numpy(self._wanted[begin:end] - self._n_seen).to(x.device)
        self._sampled.append((x[own], weights[own]))
        self._n_seen += len(x)

    def _finish_current(self, inputs: InputTotals) -> None:
        """Measures the errors of types and widths for the current expert, all of whose tokens have been seen."""
        if self._current is not None:
            self.widths.end(self._current[1].down.weight)
        if self._current is not None and self._errors is not None:
            number, matrices = self._current
            x, weights = (torch.cat(part) for part in zip(*self._sampled, strict=True))
            of_sample = self._errors.measure(number, matrices, x, weights, inputs.of_expert(number))
            of_all = self.outputs.weighted_square(number)
            self._errors.scale(number, of_all / of_sample if of_sample > 0 else 1.0)
        self._sampled, self._current = [], None

    def finish(self, similarity: SimilaritySums, inputs: InputTotals) -> LayerFindings:
        """The layer's statistics; the Gram matrices also have the experts that no token selected."""
        self._finish_current(inputs)
        gram = None
        if self.gram is not None:
            for expert in self.gram.missing:
                self.gram.add_expert(expert, read_expert(self._source, self._layer, expert, self._device))
            gram = self.gram.finish(self.outputs.means())
        errors = None if self._errors is None else TypeErrors(self._errors.types, self._errors.error)
        outputs = self.outputs.finish()
        self.widths.finish(outputs.share_square_norm_square)
        return LayerFindings(
            LayerStatistics(
                similarity=similarity,
                inputs=inputs.finish(),
                router=self._routing.finish(),
                outputs=outputs,
                trace=self.trace.finish(),
                type_errors=errors,
                sketch=gram,
                widths=self._width_errors(),
            ),
            self._prediction.selected,
        )

    def _width_errors(self) -> WidthErrors | None:
        """Those of all experts; None where experts are too large, or too narrow already, to measure any."""
        found = self.widths
        if not found.error.any():
            return None
        return WidthErrors(np.array(found.widths, np.int64), found.error, found.type_share)
