"""The time and memory that a calibration needs, from speeds measured for a moment on the model's own weights.

What is tried is what calibrating does, on fewer tokens, rows or neurons. Times are medians of several tries, as a
single one is off by far where another program runs for a moment.
"""

import math
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray
from torch import Tensor

from slimoe.converter.forward.block import read_expert
from slimoe.converter.forward.expert import Expert
from slimoe.converter.forward.pass_time import median_seconds
from slimoe.converter.forward.stream import Sequences, Stream
from slimoe.converter.forward.texts import CalibrationText
from slimoe.converter.neurons.width_errors import WidthErrorTable, n_measured
from slimoe.converter.quant.gain import type_error
from slimoe.converter.quant.mixes import fits
from slimoe.converter.source.held_source import HeldSource
from slimoe.converter.source.model_source import MatrixKey, ModelSource, block_key
from slimoe.converter.stats.forward_pass import N_STREAMS, CalibrationSettings
from slimoe.converter.stats.observer import LayerObserver, Samples
from slimoe.converter.stats.sums import gram_size
from slimoe.converter.stats.type_costs import priced_matrices, sampled_weights, tried_types
from slimoe.converter.stats.type_errors import TypeErrorTable, sampled_rows
from slimoe.offload.model.tensor_list import layer_tensors

_N_TOKENS = 128
_FEWEST_TOKENS, _MOST_TOKENS = 64, 2048
"""Tokens that pass through a layer: twice as many each time, until that takes long enough to be measured."""
_LONG_SECONDS = 0.25
_N_NEURONS = 512
_TRIED_WEIGHTS, _PRICED_WEIGHTS = 1 << 17, 1 << 14
"""Of each matrix of an expert whose types' errors are measured, and of the one whose types are priced."""
_SENSITIVITY_PASSES = 5
"""Products of a pass forward, of the same once more, and of gradients by inputs and outputs."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds by kind of work, and the bytes of all tokens' residual streams."""

    seconds: dict[str, float]
    state_bytes: int

    @property
    def steps(self) -> dict[str, float]:
        """Seconds by the steps that a calibration's progress names."""
        parts = dict(self.seconds)
        layers = sum(parts.pop(name, 0.0) for name in ("read", "pass", "types", "widths"))
        return {"layers": layers, **parts}

    @property
    def total_seconds(self) -> float:
        """The sum of all seconds."""
        return sum(self.seconds.values())


def estimate(source: ModelSource, text: CalibrationText, settings: CalibrationSettings) -> Estimate:
    """Estimates a calibration by trying its steps on one expert of the model. Raises ModelFileError."""
    spec, samples = source.spec, settings.samples
    with_experts = [n for n, layer in enumerate(source.layers) if layer.target]
    state_bytes = N_STREAMS * 4 * text.n_tokens * spec.n_embd
    if not with_experts:
        return Estimate({}, state_bytes)
    first, n_stored = with_experts[0], [source.layers[n].n_stored for n in with_experts]
    n_layer, n_experts = len(source.layers), sum(n_stored)
    begin = time.perf_counter()
    expert = read_expert(source, first, 0, settings.device)
    reading = time.perf_counter() - begin
    x = torch.randn(_N_TOKENS, spec.n_embd_expert, device=settings.device)
    with torch.no_grad():
        per_token = median_seconds(lambda: float(expert(x).sum())) / _N_TOKENS
        n_gram = gram_size(samples.n_gram, text.n_tokens, n_stored[0], spec.n_embd_expert) if samples.n_gram else 0
        seconds = {
            "read": reading * n_experts,
            "pass": n_layer * _layer_seconds(source, first, text, settings.device) + per_token * n_gram * n_experts,
            "types": n_experts * _type_seconds(source, first, expert, samples, settings.n_threads),
        }
        n_ff = expert.down.weight.shape[1]
        n_tried = sum(n_measured(one, n_ff) for one in n_stored) if samples.widths else 0
        if n_tried:
            seconds["widths"] = n_tried * _width_seconds(expert.down.weight)
    if settings.n_sensitivity:
        n_tokens = min(settings.n_sensitivity, text.n_tokens)
        passes = per_token * _experts_of_layer(source, first, expert) * n_layer
        seconds["sensitivity"] = _SENSITIVITY_PASSES * passes * n_tokens + 2 * seconds["read"]
        if settings.prices:
            n_priced = sum(map(sampled_weights, (source.shapes[key] for key in priced_matrices(source))))
            kinds = tried_types(source, expert.down.weight.shape[1])
            seconds["prices"] = price_seconds(expert.down.weight, kinds) * n_priced / settings.n_threads
    return Estimate(seconds, state_bytes)


class _AlikeExperts(HeldSource):
    """The source with the first expert of a layer in the place of all, so that only one is read."""

    def read(self, key: MatrixKey) -> NDArray[np.float32]:
        return super().read(replace(key, expert=0) if key.expert > 0 else key)


def _experts_of_layer(source: ModelSource, layer: int, expert: Expert) -> float:
    """What a token passes in a layer, counted in experts."""
    n_weights: int = sum(matrix.weight.numel() for matrix in (*expert.inner, expert.down))
    roles = dict.fromkeys(tensor.role for tensor in layer_tensors(source.spec, layer))
    shapes = (source.shapes.get(block_key(layer, role), ()) for role in roles)
    return source.spec.n_expert_used + sum(math.prod(shape) for shape in shapes if shape) / n_weights


def _layer_seconds(source: ModelSource, layer: int, text: CalibrationText, device: str) -> float:
    """Seconds in which all tokens pass through a layer and are summed up, without what is measured of each expert."""
    alike, samples, times = _AlikeExperts(source), Samples(types=(), n_gram=0, widths=False), list[tuple[int, float]]()
    n_tokens = _FEWEST_TOKENS
    while True:
        sequences = _first_tokens(text, n_tokens)
        with closing(Stream(alike, sequences, device)) as stream:

            def tried(stream: Stream = stream, n_rows: int = sequences.n_rows) -> None:
                stream.h.normal_()
                observer = LayerObserver(alike, layer, n_rows, samples, device)
                stream.pass_layer(layer, observer, observer.read_expert)

            times.append((sequences.n_rows, median_seconds(tried)))
        is_long = times[-1][1] > _LONG_SECONDS and len(times) > 1
        if is_long or n_tokens >= min(_MOST_TOKENS, text.n_tokens):
            break
        n_tokens *= 2
    (few, of_few), (many, of_many) = times[0 if len(times) == 1 else -2], times[-1]
    per_token = max(0.0, of_many - of_few) / max(1, many - few)
    return of_many + per_token * (text.n_tokens - many)


def _first_tokens(text: CalibrationText, n_tokens: int) -> Sequences:
    kept: list[tuple[int, ...]] = []
    for tokens in text.tokens:
        if (left := n_tokens - sum(map(len, kept))) > 0:
            kept.append(tokens[:left])
    return Sequences(tuple(kept))


def _type_seconds(source: ModelSource, layer: int, expert: Expert, samples: Samples, n_threads: int) -> float:
    """Seconds to measure the errors of all types for an expert, from those for few rows of it."""
    n_embd, n_ff = expert.down.weight.shape
    types = tuple(name for name in samples.types if fits(Type[name], n_embd) or fits(Type[name], n_ff))
    if not types:
        return 0.0
    n_rows = sampled_rows(samples.n_rows, n_embd, n_ff)
    many: int = min(n_rows, max(4, _TRIED_WEIGHTS // max(n_embd, n_ff)))
    x = torch.randn(samples.n_tokens, n_embd, device=expert.down.weight.device)
    weights = torch.full((len(x),), 1 / source.spec.n_expert_used, device=x.device)
    importance = np.ones(n_embd, np.float32), np.ones(n_ff, np.float32)

    def seconds(n_rows: int) -> float:
        table = TypeErrorTable(source, layer, types, n_rows, n_threads)
        return median_seconds(lambda: table.measure(0, expert, x, weights, importance))

    of_many = seconds(many)
    if many == n_rows:
        return of_many
    per_row = max(0.0, of_many - seconds(many // 2)) / (many - many // 2)
    return of_many + per_row * (n_rows - many)


def _width_seconds(down: Tensor) -> float:
    """Seconds to find out what an expert would lose if it were narrower, from one of few neurons and outputs."""
    n_embd, n_ff = down.shape
    few = min(n_ff, _N_NEURONS)
    part = down[: max(1, n_embd * few // n_ff), :few]
    table, rows = WidthErrorTable(1, few), torch.arange(4 * few)

    def measured() -> None:
        table.begin(0, few)
        table.add(rows, torch.randn(len(rows), few, device=down.device), torch.ones(len(rows), device=down.device))
        table.end(part)

    cubes: float = (n_ff / few) ** 3
    return median_seconds(measured) * cubes


def price_seconds(matrix: Tensor, types: Sequence[str]) -> float:
    """Seconds of one thread to find out what these types, as far as they fit its rows, cost a weight of a matrix."""
    n_rows = min(len(matrix), max(1, _PRICED_WEIGHTS // matrix.shape[1]))
    rows = matrix[:n_rows].cpu().contiguous().numpy()
    ones = np.ones(n_rows, np.float32), np.ones(rows.shape[1], np.float32)
    kinds = [Type[name] for name in types if fits(Type[name], rows.shape[1])]

    def priced() -> None:
        for kind in kinds:
            type_error(rows, kind, *ones)

    n_weights: int = rows.size
    return median_seconds(priced) / n_weights
