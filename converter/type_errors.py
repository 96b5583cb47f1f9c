"""What ggml types would cost an expert: squared errors of its answers by requantised matrices, on a sample of picks."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray
from torch import Tensor

from converter.block import Expert, Linear
from converter.model_source import ModelSource, expert_key
from converter.quantize import BadWeightsError, dequantize_rows, quantize_rows
from offload.errors import ModelFileError, UsageError

Importance = tuple[NDArray[np.float32], NDArray[np.float32]]
"""Of the columns of gate and up, and of those of down."""

DEFAULT_TYPES = ("IQ1_S", "IQ2_XXS", "IQ2_S", "Q2_K", "IQ3_XXS", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
_ROWS_AT_ONCE = 256
_FLOATS = {"F32", "F16", "BF16"}


def type_by_name(name: str) -> GGMLQuantizationType:
    """A ggml type that quantises; raises UsageError with those that there are."""
    known = {kind.name: kind for kind in GGML_QUANT_SIZES if _is_quantised(kind)}
    if name not in known:
        raise UsageError(f"{name!r} is no type that weights are quantised to. Choose from {', '.join(known)}.")
    return known[name]


def _is_quantised(kind: GGMLQuantizationType) -> bool:
    activations = {"Q8_K", "Q8_1"}
    return GGML_QUANT_SIZES[kind][0] > 1 and kind.name not in activations


class TypeErrorTable:
    """Measures one layer's `TypeErrors`, expert after expert.

    A type's error is infinite for matrices whose rows do not divide into its blocks.
    """

    def __init__(self, source: ModelSource, layer: int, types: Sequence[str], n_threads: int) -> None:
        self._source, self._layer, self._n_threads = source, layer, n_threads
        self.types = tuple(types)
        self.error = np.zeros((len(types), source.layers[layer].n_stored, 4))

    def measure(self, number: int, expert: Expert, x: Tensor, shares: Tensor, importance: Importance) -> float:
        """Sets an expert's errors over the picks given; the sum over them of share^2 |f|^2, to scale errors by."""
        gate, up = expert.gate(x), expert.up(x)
        hidden = torch.nn.functional.silu(gate) * up
        output = expert.down(hidden)
        for row, name in enumerate(self.types):
            self.error[row, number] = self._errors(
                name, number, expert, importance, (x, gate, up, hidden, output, shares)
            )
        return _weighted_square(output, shares)

    def scale(self, number: int, factor: float) -> None:
        """From the sample of an expert's picks to all."""
        self.error[:, number] *= factor

    def _errors(
        self, name: str, number: int, expert: Expert, importance: Importance, values: tuple[Tensor, ...]
    ) -> list[float]:
        """Of gate, up and down alone, and of all three."""
        x, gate, up, hidden, output, shares = values
        kind, silu = type_by_name(name), torch.nn.functional.silu
        reads_x, reads_hidden = importance

        def changed(projection: str, matrix: Linear, columns: NDArray[np.float32]) -> Linear | None:
            return self._requantised(kind, projection, number, matrix, columns)

        def error(found: Tensor) -> float:
            return _weighted_square(found - output, shares)

        errors = [np.inf] * 4
        other_gate = other_up = None
        if (matrix := changed("gate", expert.gate, reads_x)) is not None:
            other_gate = matrix(x)
            errors[0] = error(expert.down(silu(other_gate) * up))
        if (matrix := changed("up", expert.up, reads_x)) is not None:
            other_up = matrix(x)
            errors[1] = error(expert.down(silu(gate) * other_up))
        if (matrix := changed("down", expert.down, reads_hidden)) is not None:
            errors[2] = error(matrix(hidden))
            if other_gate is not None and other_up is not None:
                errors[3] = error(matrix(silu(other_gate) * other_up))
        return errors

    def _requantised(
        self, kind: GGMLQuantizationType, projection: str, number: int, matrix: Linear, columns: NDArray[np.float32]
    ) -> Linear | None:
        """The matrix after a round trip through the type; None where its rows do not divide into blocks."""
        weight = matrix.weight
        if weight.shape[1] % GGML_QUANT_SIZES[kind][0]:
            return None
        values = weight.cpu().contiguous().numpy()
        target = np.empty_like(values)

        def convert(begin: int) -> None:
            part = slice(begin, begin + _ROWS_AT_ONCE)
            target[part] = dequantize_rows(quantize_rows(values[part], kind, columns), kind, values.shape[1])

        try:
            with ThreadPoolExecutor(self._n_threads) as pool:
                list(pool.map(convert, range(0, len(values), _ROWS_AT_ONCE)))
        except BadWeightsError as error:
            key = expert_key(self._layer, projection, number)
            raise ModelFileError(self._source.path, f"{key} {error}.") from None
        return Linear(torch.from_numpy(target).to(weight.device))


def _weighted_square(vectors: Tensor, shares: Tensor) -> float:
    """Sum over rows of share^2 |vector|^2."""
    return float((shares.double().square() * vectors.double().square().sum(-1)).sum())
