"""What a plan loses, tried on calibration texts before anything is quantised.

What is removed, merged or trimmed is tried as it is. In place of quantised weights stand weights with noise, of the
size that a type's price says, so that a trial takes seconds where codebooks take hours. It sees what no sum of prices
does: errors that meet, and tokens that move to other experts.
"""

import math
from dataclasses import replace
from functools import cached_property
from zlib import crc32

import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray
from torch import Tensor

from slimoe.converter.budget.planned_source import PlannedSource
from slimoe.converter.forward.pass_time import median_seconds, pass_seconds
from slimoe.converter.forward.stream import Sequences, final_logits, run
from slimoe.converter.layout.layer import Matrix
from slimoe.converter.layout.plan import CompressPlan
from slimoe.converter.quant.mixes import layer_and_role
from slimoe.converter.source.model_source import MatrixKey, ModelSource, expert_key
from slimoe.converter.stats.statistics import Statistics
from slimoe.converter.stats.type_costs import LOSSLESS, TypeCosts, matrix_weights
from slimoe.converter.write.matrix import read_matrix

_WORK, _MOST_WEIGHTS = 1 << 42, 1 << 32
"""Products of weights and tokens in a pass, and weights to read: a trial takes some minutes at most."""
_MOST_TOKENS, _FEWEST_TOKENS = 8192, 1024
_ROWS_AT_ONCE = 512
_BLOCK = 32
"""Neighbours in a row whose errors are of one size."""


def trial_tokens(source: ModelSource) -> int:
    """How many tokens a trial of a model has, by the products that each takes; 0 of a model that is too large."""
    n_weights = n_active = 0.0
    for key, shape in source.shapes.items():
        n_stored = source.layers[layer_and_role(key.name)[0]].n_stored if key.expert >= 0 else 0
        n_weights += math.prod(shape)
        n_active += math.prod(shape) * (source.spec.n_expert_used / n_stored if n_stored else 1)
    n_tokens = min(_MOST_TOKENS, int(_WORK / max(1.0, n_active)))
    return n_tokens if n_tokens >= _FEWEST_TOKENS and n_weights <= _MOST_WEIGHTS else 0


class NoisyMatrices:
    """Values of matrices with noise in place of what their types lose; the same noise for the same matrix each time."""

    def __init__(self, source: ModelSource, statistics: Statistics, costs: TypeCosts | None) -> None:
        self._source, self._statistics, self._costs = source, statistics, costs
        self._sizes: dict[MatrixKey, float] = {}

    def read(self, matrix: Matrix) -> NDArray[np.float32]:
        """The values [n_rows, n_per_row] with the noise of the matrix's type; raises ModelFileError."""
        values = read_matrix(self._source, matrix)
        if matrix.is_constant or matrix.type in LOSSLESS or self._costs is None:
            return values
        keys = [matrix.origin] if matrix.origin is not None else []
        if matrix.expert is not None:
            keys = [expert_key(matrix.block, matrix.projection, member) for member in matrix.expert.members]
        levels = [self._level(key, matrix.type) for key in keys]
        seed = crc32(f"{matrix.key} {matrix.type.name}".encode())
        noise = np.random.default_rng(seed).standard_normal(values.shape, np.float32)
        noise *= np.sqrt(np.float32(np.mean(levels or 0.0)) * _block_squares(values))
        return values + noise

    def _level(self, key: MatrixKey, kind: Type) -> float:
        """The mean square of a type's errors in a matrix over that of the block that they are in."""
        assert self._costs is not None
        if key not in self._costs.costs or kind.name not in self._costs.types:
            return 0.0
        if key not in self._sizes:
            weights, values = matrix_weights(self._source, self._statistics, key), self._source.read(key)
            stack = values.reshape(-1, *values.shape[-2:])
            uses = [weights, *([weights.other] if weights.other else [])]
            self._sizes[key] = 0.5 * sum(
                float(rows.astype(np.float64) @ (_block_squares(values) @ columns))
                for use in uses
                for values, rows, columns in zip(
                    stack, np.atleast_2d(use.rows), np.atleast_2d(use.columns), strict=True
                )
            )
        cost = self._costs.of(key, kind)
        return cost / self._sizes[key] if self._sizes[key] > 0 and math.isfinite(cost) else 0.0


def _block_squares(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """For each weight [n_rows, n_per_row] the mean square of the block that it is in."""
    n_rows, n_per_row = values.shape
    block = _BLOCK if n_per_row % _BLOCK == 0 else n_per_row
    means = np.square(values).reshape(n_rows, -1, block).mean(-1)
    return np.repeat(means, block, axis=1)


class Trial:
    """Knows what the source says of some of the calibration's tokens, and compares plans with it."""

    def __init__(self, source: ModelSource, statistics: Statistics, n_tokens: int) -> None:
        self._source, self._statistics = source, statistics
        step = max(1, round(statistics.n_tokens / max(1, n_tokens)))
        self._sequences = Sequences(statistics.tokens[::step])

    @cached_property
    def _expected(self) -> Tensor:
        return run(self._source, self._sequences)

    def seconds(self, n_plans: int) -> float:
        """Estimates the seconds in which the source and so many plans are tried; raises ModelFileError."""
        keys = [key for key in self._source.shapes if key.expert >= 0] or list(self._source.shapes)
        values = self._source.read(keys[0])

        def with_noise() -> NDArray[np.float32]:
            noise = np.random.default_rng(0).standard_normal(values.shape, np.float32)
            return values + noise * np.sqrt(_block_squares(values.reshape(-1, values.shape[-1]))).reshape(values.shape)

        per_weight = median_seconds(with_noise) / values.size
        n_weights = sum(map(math.prod, self._source.shapes.values()))
        passes = (1 + n_plans) * pass_seconds(self._source, self._sequences)
        return passes + n_plans * per_weight * n_weights

    def divergence(self, plan: CompressPlan, costs: TypeCosts | None) -> float:
        """The mean KL divergence in nats per token of what the plan would make, its types priced by `costs`.

        Without prices types lose nothing. Raises as reading does.
        """
        # What is lost is of no format, and what a format cannot hold is for others to say.
        plan = replace(plan, format="native")
        model = PlannedSource(self._source, plan, NoisyMatrices(self._source, self._statistics, costs))
        return divergence(self._source, self._expected, model, run(model, self._sequences))


def make_trial(source: ModelSource, statistics: Statistics | None) -> Trial | None:
    """What tries plans of a model; None of a model that is too large, and without statistics."""
    n_tokens = 0 if statistics is None else trial_tokens(source)
    return Trial(source, statistics, n_tokens) if statistics is not None and n_tokens else None


def divergence(source: ModelSource, expected: Tensor, model: ModelSource, found: Tensor) -> float:
    """The mean KL divergence in nats per token of hidden states `found` [n, n_embd] of a model behind its last layer.

    `expected` [n, n_embd] are the source's. Raises ModelFileError.
    """
    total = 0.0
    for begin in range(0, len(expected), _ROWS_AT_ONCE):
        rows = slice(begin, begin + _ROWS_AT_ONCE)
        wanted, said = (final_logits(m, h[rows]).log_softmax(-1) for m, h in ((source, expected), (model, found)))
        total += float((wanted.exp() * (wanted - said)).sum(dtype=torch.float64))
    return total / len(expected)
