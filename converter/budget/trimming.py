"""Narrower experts: the calibration's tokens are run once more, for what each expert's neurons do together."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from slimoe.converter.budget.structure import Structure
from slimoe.converter.forward.block import read_expert
from slimoe.converter.forward.pass_time import median_seconds, pass_seconds
from slimoe.converter.forward.routing import Routing
from slimoe.converter.forward.stream import Observer, Sequences, Stream
from slimoe.converter.layout.plan import LayerPlan
from slimoe.converter.neurons.hidden_sums import HiddenCollector, HiddenSums, hidden_sums, shrunk_covariance
from slimoe.converter.neurons.trim import TrimmedExpert, trim
from slimoe.converter.source.model_source import ModelSource, expert_key
from slimoe.converter.stats.statistics import Statistics

Progress = Callable[[str, int, int], None]
"""Called with what is being done, and how much of how much is done."""

_SAMPLE = 2048
"""Tokens of a layer that stand for all of them."""


_MOST_TOKENS = 32768
_N_NEURONS = 512
"""Of the expert that is trimmed to see how long that takes."""
STEP = "trimming experts"


def trimmed(source: ModelSource, statistics: Statistics, structure: Structure, on_progress: Progress) -> Structure:
    """The structure with the neurons chosen of all experts that have a width only; raises as reading does."""
    by_block = {layer.block: layer for layer in structure.layers}
    last = max((block for block, layer in by_block.items() if _open_widths(layer)), default=-1)
    stream = Stream(source, _sequences(statistics))
    try:
        stream.embed()
        for block in range(last + 1):
            layer = by_block.get(block)
            if layer is None or not _open_widths(layer):
                stream.pass_layer(block, Observer())
            else:
                trimmer = _Trimmer(source, layer)
                stream.pass_layer(block, trimmer)
                trimmer.finish()
                by_block[block] = trimmer.trimmed()
            on_progress(STEP, block + 1, last + 1)
    finally:
        stream.close()
    return replace(structure, layers=tuple(by_block[layer.block] for layer in structure.layers))


def trimming_seconds(source: ModelSource, statistics: Statistics) -> float:
    """Estimates the seconds in which all experts are trimmed, to half of their width; raises ModelFileError."""
    spec, sequences = source.spec, _sequences(statistics)
    n_ff, n_stored = spec.n_ff, [layer.n_stored for layer in source.layers if layer.target]
    few = min(n_ff, _N_NEURONS)
    hidden, down = torch.randn(2 * few, few), np.ones((max(1, spec.n_embd_expert * few // n_ff), few), np.float32)
    multiplying = median_seconds(lambda: hidden.T @ hidden) / (4 * few**3)
    covariance = (hidden.T @ hidden).numpy().astype(np.float64)
    choosing = median_seconds(lambda: trim(down, covariance, [max(1, few // 2)])) * (n_ff / few) ** 3
    # Each expert's own tokens, and the sample that stands for any.
    n_products = 2 * n_ff**2 * (len(n_stored) * spec.n_expert_used * sequences.n_rows + sum(n_stored) * _SAMPLE)
    n_products += sum(n_stored) * _SAMPLE * 4 * spec.n_embd_expert * n_ff
    return float(pass_seconds(source, sequences) + sum(n_stored) * choosing + n_products * multiplying)


def _sequences(statistics: Statistics) -> Sequences:
    """The tokens that are run."""
    step = max(1, sum(map(len, statistics.tokens)) // _MOST_TOKENS)
    return Sequences(statistics.tokens[::step])


def _open_widths(layer: LayerPlan) -> dict[int, int]:
    """The widths of the experts whose neurons are yet to be chosen, by their numbers in the source."""
    open_ones = (one for one in layer.experts if one.kept is not None and one.down is None)
    return {one.members[0]: len(one.kept) for one in open_ones if one.kept is not None}


class _Trimmer(HiddenCollector):
    """Trims one layer's experts, each when its tokens have passed, so that one covariance is held at a time."""

    def __init__(self, source: ModelSource, layer: LayerPlan) -> None:
        self._source, self._plan, self._widths = source, layer, _open_widths(layer)
        self._inputs: list[Tensor] = []
        self._found: dict[int, TrimmedExpert] = {}
        super().__init__(layer.block, self._trim)

    def routed(self, layer: int, first_row: int, x: Tensor, read: Tensor, routing: Routing) -> None:
        if sum(map(len, self._inputs)) < _SAMPLE:
            self._inputs.append(read)

    def trimmed(self) -> LayerPlan:
        """The layer; experts that no token selected are trimmed by any tokens."""
        for number in sorted(self._widths.keys() - self._found.keys()):
            self._trim(number, None)
        pairs = ((expert, self._found.get(expert.members[0])) for expert in self._plan.experts)
        return replace(
            self._plan,
            experts=tuple(one if how is None else replace(one, kept=how.kept, down=how.down) for one, how in pairs),
        )

    def _trim(self, number: int, sums: HiddenSums | None) -> None:
        if number not in self._widths:
            return
        block = self._plan.block
        anyone = hidden_sums(read_expert(self._source, block, number), torch.cat(self._inputs)[:_SAMPLE])
        covariance = shrunk_covariance(sums or anyone, anyone)
        down = self._source.read(expert_key(block, "down", number))
        (self._found[number],) = trim(down, covariance, [self._widths[number]])
