"""An expert's weights as arrays, and the ways to change them that need nothing else."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slimoe.converter.source.model_source import PROJECTIONS, ModelSource, expert_key

Single = NDArray[np.float32]
Int = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ExpertMatrices:
    """`gate` and `up` [n_ff, n_embd], `down` [n_embd, n_ff]. A neuron is a row of the first two and a column of it."""

    gate: Single
    up: Single
    down: Single

    @property
    def n_ff(self) -> int:
        """Neurons."""
        return len(self.gate)

    def reordered(self, neurons: Int) -> "ExpertMatrices":
        """Only these neurons, in this order. With all of them the expert computes the same."""
        return ExpertMatrices(self.gate[neurons], self.up[neurons], self.down[:, neurons])

    def distance(self, other: "ExpertMatrices") -> float:
        """Squared distance of all weights, over the squared norm of both: 0 for equal ones, 1 for orthogonal ones."""
        pairs = ((self.gate, other.gate), (self.up, other.up), (self.down, other.down))
        apart = sum(_square(a - b) for a, b in pairs)
        return apart / max(sum(_square(a) + _square(b) for a, b in pairs), np.finfo(np.float64).tiny)


def _square(values: Single) -> float:
    return float(np.einsum("ij,ij->", values, values, dtype=np.float64))


def read_matrices(source: ModelSource, layer: int, expert: int) -> ExpertMatrices:
    """A stored expert of a model; raises ModelFileError."""
    return ExpertMatrices(*(source.read(expert_key(layer, projection, expert)) for projection in PROJECTIONS))
