"""Narrower experts: the calibration's tokens are run once more, for what each expert's neurons do together."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from slimoe.converter.budget.structure import Structure
from slimoe.converter.forward.block import Routing, read_expert
from slimoe.converter.forward.stream import Observer, Sequences, Stream
from slimoe.converter.layout.plan import LayerPlan
from slimoe.converter.methods.hidden_sums import HiddenCollector, HiddenSums, hidden_sums, shrunk_covariance
from slimoe.converter.methods.trim import TrimmedExpert, trim
from slimoe.converter.source.model_source import ModelSource, expert_key
from slimoe.converter.stats.statistics import Statistics
from slimoe.offload.errors import UsageError

Progress = Callable[[str, int, int], None]
"""Called with what is being done, and how much of how much is done."""

_SAMPLE = 2048
"""Tokens of a layer that stand for all of them."""


def trimmed(
    source: ModelSource, statistics: Statistics | None, structure: Structure, width: int, on_progress: Progress
) -> Structure:
    """The structure with experts of `width` neurons; raises UsageError, as for a width that cannot be."""
    if statistics is None:
        raise UsageError("Neurons are chosen by what they do. Run slimoe calibrate first, and give --stats FILE.")
    width_now = source.spec.n_ff
    if width > width_now:
        raise UsageError(f"Experts of {width_now} neurons cannot keep {width}. Choose a width from 1 to {width_now}.")
    by_block = {layer.block: layer for layer in structure.layers}
    assert all(len(expert.members) == 1 for layer in structure.layers for expert in layer.experts), "merged"
    layers: dict[int, LayerPlan] = {}
    stream = Stream(source, Sequences(statistics.tokens))
    try:
        stream.embed()
        for block in range(source.spec.n_layer):
            layer = by_block.get(block)
            if layer is None or not layer.experts:
                stream.pass_layer(block, Observer())
            else:
                trimmer = _Trimmer(source, layer, width)
                stream.pass_layer(block, trimmer)
                trimmer.finish()
                layer = trimmer.trimmed()
            if layer is not None:
                layers[block] = layer
            on_progress("trimming experts", block + 1, source.spec.n_layer)
    finally:
        stream.close()
    return replace(structure, layers=tuple(layers[layer.block] for layer in structure.layers))


class _Trimmer(HiddenCollector):
    """Trims one layer's experts, each when its tokens have passed, so that one covariance is held at a time."""

    def __init__(self, source: ModelSource, layer: LayerPlan, width: int) -> None:
        self._source, self._plan, self._width = source, layer, width
        self._inputs: list[Tensor] = []
        self._wanted = {expert.members[0] for expert in layer.experts}
        self._found: dict[int, TrimmedExpert] = {}
        super().__init__(layer.block, self._trim)

    def routed(self, layer: int, first_row: int, x: Tensor, routing: Routing) -> None:
        if sum(map(len, self._inputs)) < _SAMPLE:
            self._inputs.append(x)

    def trimmed(self) -> LayerPlan:
        """The layer; experts that no token selected are trimmed by any tokens."""
        for number in sorted(self._wanted - self._found.keys()):
            self._trim(number, None)
        found = ((expert, self._found[expert.members[0]]) for expert in self._plan.experts)
        return replace(
            self._plan, experts=tuple(replace(expert, kept=one.kept, down=one.down) for expert, one in found)
        )

    def _trim(self, number: int, sums: HiddenSums | None) -> None:
        if number not in self._wanted:
            return
        block = self._plan.block
        anyone = hidden_sums(read_expert(self._source, block, number), torch.cat(self._inputs)[:_SAMPLE])
        covariance = shrunk_covariance(sums or anyone, anyone)
        (self._found[number],) = trim(self._source.read(expert_key(block, "down", number)), covariance, [self._width])
