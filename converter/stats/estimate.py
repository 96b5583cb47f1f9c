"""The time and memory that a calibration needs, from speeds measured for a moment on the model's own weights."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from gguf import GGMLQuantizationType

from slimoe.converter.forward.block import read_expert
from slimoe.converter.forward.texts import CalibrationText
from slimoe.converter.neurons.trim import trim
from slimoe.converter.neurons.width_errors import n_measured, narrower_widths
from slimoe.converter.quant.mixes import fits
from slimoe.converter.quant.quantize import quantize_rows
from slimoe.converter.source.model_source import ModelSource, block_key
from slimoe.converter.stats.forward_pass import N_STREAMS, CalibrationSettings
from slimoe.converter.stats.sums import gram_size
from slimoe.converter.stats.type_costs import CANDIDATES, priced_matrices, sampled_weights
from slimoe.converter.stats.type_errors import sampled_rows
from slimoe.offload.model.tensor_list import layer_tensors

T = TypeVar("T")

_N_TOKENS = 128
_N_ROWS = 8
_N_NEURONS = 512
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
    """Estimates a calibration by reading and running one expert of the model. Raises ModelFileError."""
    spec, samples = source.spec, settings.samples
    with_experts = [n for n, layer in enumerate(source.layers) if layer.target]
    n_experts = sum(source.layers[n].n_stored for n in with_experts)
    state_bytes = N_STREAMS * 4 * text.n_tokens * spec.n_embd
    if not with_experts:
        return Estimate({}, state_bytes)
    read_seconds, expert = _timed(lambda: read_expert(source, with_experts[0], 0, settings.device))
    x = torch.randn(_N_TOKENS, spec.n_embd, device=settings.device)
    expert(x)
    per_token, _ = _timed(lambda: float(expert(x).sum()))
    per_token /= _N_TOKENS
    n_expert_weights = sum(matrix.weight.numel() for matrix in (expert.gate, expert.up, expert.down))
    roles = dict.fromkeys(tensor.role for tensor in layer_tensors(spec, with_experts[0]))
    shapes = (source.shapes.get(block_key(with_experts[0], role), ()) for role in roles)
    per_layer = spec.n_expert_used + sum(math.prod(shape) for shape in shapes if shape) / n_expert_weights
    passes = per_token * per_layer * len(source.layers)
    n_gram = gram_size(samples.n_gram, text.n_tokens, source.layers[with_experts[0]].n_stored, spec.n_embd)
    seconds = {
        "read": read_seconds * n_experts,
        "pass": passes * text.n_tokens + per_token * (n_gram if samples.n_gram else 0) * n_experts,
        "types": _type_seconds(expert.down.weight, samples.types) * n_experts / settings.n_threads,
    }
    n_ff = expert.down.weight.shape[1]
    n_rows = sampled_rows(samples.n_rows, spec.n_embd, n_ff)
    seconds["types"] *= min(n_rows, spec.n_embd) * n_ff + 2 * min(n_rows, n_ff) * spec.n_embd
    n_tried = sum(n_measured(source.layers[layer].n_stored, n_ff) for layer in with_experts)
    seconds["widths"] = n_tried * _width_seconds(n_ff) if n_tried else 0.0
    if settings.n_sensitivity:
        n_tokens = min(settings.n_sensitivity, text.n_tokens)
        seconds["sensitivity"] = _SENSITIVITY_PASSES * passes * n_tokens + 2 * seconds["read"]
        if settings.prices:
            n_priced = sum(map(sampled_weights, (source.shapes[key] for key in priced_matrices(source))))
            seconds["prices"] = _type_seconds(expert.down.weight, CANDIDATES) * n_priced / settings.n_threads
    return Estimate(seconds, state_bytes)


def _width_seconds(n_ff: int) -> float:
    """Seconds to find out what an expert would lose if it were narrower, from one of few neurons."""
    few = min(n_ff, _N_NEURONS)
    hidden = np.random.default_rng(0).standard_normal((2 * few, few))
    covariance, down = hidden.T @ hidden, np.ones((_N_ROWS, few), np.float32)
    seconds, _ = _timed(lambda: trim(down, covariance, narrower_widths(few)))
    return seconds * (n_ff / few) ** 3


def _type_seconds(weight: torch.Tensor, types: tuple[str, ...]) -> float:
    """Seconds to quantise one weight to all types."""
    rows = weight[:_N_ROWS].cpu().contiguous().numpy()
    importance = abs(rows[0]) + 1.0
    kinds = [GGMLQuantizationType[name] for name in types if fits(GGMLQuantizationType[name], rows.shape[1])]
    total = 0.0
    for kind in kinds:
        quantize_rows(rows[:1], kind, importance)
        seconds, _ = _timed(partial(quantize_rows, rows, kind, importance))
        total += seconds
    return total / float(rows.size)


def _timed(work: Callable[[], T]) -> tuple[float, T]:
    begin = time.perf_counter()
    result = work()
    return time.perf_counter() - begin, result
