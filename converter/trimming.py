"""Narrower experts: the calibration's tokens are run once more, for what each expert's neurons do together."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from converter.block import Routing, read_expert
from converter.methods.hidden_sums import HiddenCollector, HiddenSums, hidden_sums, shrunk_covariance
from converter.methods.trim import trim
from converter.model_source import ModelSource, expert_key
from converter.slim_plan import LayerPlan
from converter.statistics import Statistics
from converter.stream import Observer, Sequences, Stream
from converter.structure import Structure
from offload.errors import UsageError

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
    by_block = {layer.block: layer for layer in structure.layers}
    if any(len(expert.members) > 1 for layer in structure.layers for expert in layer.experts):
        raise UsageError("Experts that are merged cannot be trimmed as well. Leave out --merge or --width.")
    layers: dict[int, LayerPlan] = {}
    stream = Stream(source, Sequences(statistics.tokens))
    try:
        stream.embed()
        for block in range(source.spec.n_layer):
            layer = by_block.get(block)
            seen = _LayerSums(block)
            stream.pass_layer(block, seen if layer and layer.experts else Observer())
            seen.finish()
            if layer is not None:
                layers[block] = _trim_layer(source, layer, seen, width) if layer.experts else layer
            on_progress("trimming experts", block + 1, source.spec.n_layer)
    finally:
        stream.close()
    return replace(structure, layers=tuple(layers[layer.block] for layer in structure.layers))


class _LayerSums(HiddenCollector):
    """One layer's sums by expert, and inputs of some of its tokens."""

    def __init__(self, layer: int) -> None:
        self.sums: dict[int, HiddenSums] = {}
        self.inputs: list[Tensor] = []
        super().__init__(layer, self.sums.__setitem__)

    def routed(self, layer: int, first_row: int, x: Tensor, routing: Routing) -> None:
        if sum(map(len, self.inputs)) < _SAMPLE:
            self.inputs.append(x)


def _trim_layer(source: ModelSource, layer: LayerPlan, seen: _LayerSums, width: int) -> LayerPlan:
    """Each expert by the covariance of its own tokens, drawn towards that of any tokens of the layer."""
    x = torch.cat(seen.inputs)[:_SAMPLE]
    experts = []
    for expert in layer.experts:
        number = expert.members[0]
        anyone = hidden_sums(read_expert(source, layer.block, number), x)
        covariance = shrunk_covariance(seen.sums.get(number, anyone), anyone)
        (found,) = trim(source.read(expert_key(layer.block, "down", number)), covariance, [width])
        experts.append(replace(expert, kept=found.kept, down=found.down))
    return replace(layer, experts=tuple(experts))
