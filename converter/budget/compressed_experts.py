"""Fewer computed experts: the calibration's tokens are run once more, for vectors that stand for the experts left out.

The model and its result run side by side. The vectors of a layer are fitted to what the result lacks behind that layer,
so that later layers make up for what earlier ones could not.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slimoe.converter.budget.structure import Structure
from slimoe.converter.forward.block import read_latent_space
from slimoe.converter.forward.expert import AuxVectors
from slimoe.converter.forward.pass_time import pass_seconds
from slimoe.converter.forward.routing import Routing
from slimoe.converter.forward.stream import Observer, Sequences, Stream
from slimoe.converter.layout.plan import AuxPlan
from slimoe.converter.methods.compressed_experts import AuxSample, FittedVectors, fit_vectors, held_out_rows
from slimoe.converter.source.held_source import HeldSource
from slimoe.converter.source.model_source import MatrixKey, ModelSource, block_key
from slimoe.converter.stats.statistics import Statistics
from slimoe.offload.errors import UnsupportedModelError, UsageError
from slimoe.offload.model.spec import ModelSpec
from slimoe.offload.model.tensor_list import AUX_GAIN, AUX_SHIFT

Progress = Callable[[str, int, int], None]
"""Called with what is being done, and how much of how much is done."""

_MOST_TOKENS = 32768
STEP = "compressing experts"


class CompressedSource(HeldSource):
    """A ModelSource of a model of which only the first `n_main` experts that a token selects are computed.

    For the others stand the vectors that it is given, and until then vectors of zeros, with which they say nothing.
    """

    def __init__(self, source: ModelSource, n_main: int, vectors: Mapping[int, AuxVectors] | None = None) -> None:
        super().__init__(source)
        experts = source.spec.experts
        assert 0 < n_main < experts.n_expert_used
        own = replace(experts, n_expert_used=n_main, n_selected=experts.n_expert_used)
        self._spec = replace(source.spec, experts=own, is_native=True)
        self._shapes = dict(source.shapes)
        for block, layer in enumerate(source.layers):
            for role in (AUX_GAIN, AUX_SHIFT) if layer.target else ():
                self._shapes[block_key(block, role)] = len(layer.target), source.spec.n_embd_expert
        for block, one in (vectors or {}).items():
            self.take(block, one)

    @property
    def spec(self) -> ModelSpec:
        """The sizes of the source, with fewer experts that are computed."""
        return self._spec

    @property
    def shapes(self) -> Mapping[MatrixKey, tuple[int, ...]]:
        """All matrices and vectors of the source, and those that stand for experts."""
        return self._shapes

    def take(self, block: int, vectors: AuxVectors) -> None:
        """Has these vectors in a layer from now on."""
        self._values[block_key(block, AUX_GAIN)] = vectors.gain.numpy()
        self._values[block_key(block, AUX_SHIFT)] = vectors.shift.numpy()

    def read(self, key: MatrixKey) -> NDArray[np.float32]:
        """Returns the values; raises ModelFileError."""
        if key in self._values:
            return self._values[key]
        return self._source.read(key) if key in self._source.shapes else np.zeros(self._shapes[key], np.float32)


@dataclass(frozen=True, slots=True)
class CompressedExperts:
    """The fitted vectors of each layer that has experts, by its number."""

    layers: Mapping[int, FittedVectors]

    @property
    def vectors(self) -> dict[int, AuxVectors]:
        """The vectors alone."""
        return {block: one.vectors for block, one in self.layers.items()}


def fit_compressed_experts(
    source: ModelSource,
    tokens: Sequence[tuple[int, ...]],
    n_main: int,
    on_progress: Progress = lambda _what, _done, _total: None,
) -> CompressedExperts:
    """Fits the vectors of all layers to sequences of tokens; holds two residual streams of them."""
    sequences = Sequences(tuple(tokens))
    compressed = CompressedSource(source, n_main)
    is_held = held_out_rows([len(one) for one in sequences.tokens])
    streams = Stream(source, sequences), Stream(compressed, sequences)
    found, n_layer, residual = {}, source.spec.n_layer, source.spec.multipliers.residual
    try:
        for stream in streams:
            stream.embed()
        for block in range(n_layer):
            seen = _MainExperts(len(is_held), source.spec.n_embd_expert)
            streams[0].pass_layer(block, Observer())
            streams[1].pass_layer(block, seen)
            if source.layers[block].target:
                space, missing = read_latent_space(source, block), (streams[0].h - streams[1].h) / residual
                sample = seen.sample(missing if space is None else space.taken_back(missing), n_main)
                one = found[block] = fit_vectors(sample, len(source.layers[block].target), is_held)
                chosen = sample.selected, sample.weights
                update = sample.total * (one.vectors.gains(*chosen) - 1) + one.vectors.shifts(*chosen)
                streams[1].h += residual * (update if space is None else space.up(update))
            on_progress(STEP, block + 1, n_layer)
    finally:
        for stream in streams:
            stream.close()
    return CompressedExperts(found)


def fitting_seconds(source: ModelSource, statistics: Statistics) -> float:
    """Estimates the seconds that `fit_compressed_experts` takes; raises ModelFileError."""
    return 2 * pass_seconds(source, Sequences(tuple(_fitted_tokens(statistics))))


def _fitted_tokens(statistics: Statistics) -> Sequence[tuple[int, ...]]:
    """The sequences that vectors are fitted to."""
    length = max(map(len, statistics.tokens))
    return statistics.tokens[:: max(1, len(statistics.tokens) * length // _MOST_TOKENS)]


class _MainExperts(Observer):
    """Sums up what the main experts of a layer say to each of `n` tokens, and keeps which others were selected."""

    def __init__(self, n: int, n_embd: int) -> None:
        self._total = torch.zeros(n, n_embd)
        self._routings: list[Routing] = []

    def routed(self, layer: int, first_row: int, x: Tensor, read: Tensor, routing: Routing) -> None:
        self._routings.append(routing)

    def output(self, layer: int, expert: int, rows: Tensor, weights: Tensor, output: Tensor) -> None:
        self._total.index_add_(0, rows, (weights[:, None] * output).cpu())

    def sample(self, missing: Tensor, n_main: int) -> AuxSample:
        """What was seen, with what the experts' sum lacks [n, n_embd_expert]."""
        selected, weights = (
            torch.cat([getattr(one, name)[:, n_main:] for one in self._routings]).cpu()
            for name in ("selected", "weights")
        )
        return AuxSample(self._total, missing, selected, weights)


def with_compressed_experts(
    source: ModelSource, statistics: Statistics | None, structure: Structure, n_main: int, on_progress: Progress
) -> Structure:
    """The structure with vectors for the experts that are not computed.

    Raises UnsupportedModelError for a model whose tokens select one expert, UsageError for as many as they select, and
    without statistics.
    """
    n_used = source.spec.n_expert_used
    if n_used < 2:
        problem = f"a token selects {n_used or 'no'} expert{'s' * (not n_used)}, which leaves none to compress."
        raise UnsupportedModelError(source.path, problem, "Convert it without main experts.")
    if not 0 < n_main < n_used:
        problem = f"A token selects {n_used} experts, of which {n_main} main experts leave none to compress."
        raise UsageError(f"{problem} Choose 1 to {n_used - 1}.")
    if any(target < 0 for layer in source.layers for target in layer.target):
        problem = "the model has constants in place of experts, which compressed experts do not go with."
        raise UnsupportedModelError(source.path, problem, "Compress the model that it was made from.")
    if statistics is None:
        raise UsageError("Compressed experts are fitted to texts. Run slimoe calibrate first, and give --stats FILE.")
    fitted = fit_compressed_experts(source, _fitted_tokens(statistics), n_main, on_progress)
    layers = []
    for layer in structure.layers:
        one = fitted.layers.get(layer.block)
        aux = None if one is None else AuxPlan(one.vectors.gain.numpy(), one.vectors.shift.numpy())
        layers.append(replace(layer, aux=aux))
    return replace(structure, layers=tuple(layers))
