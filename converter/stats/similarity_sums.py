"""How little a part of a layer does: cosines and updates, in double precision.

In bfloat16, the cosines of most layers of a large model are the same number.
"""

import numpy as np
import torch
from torch import Tensor

from slimoe.converter.stats.statistics import SimilaritySums

_LEAST = 1e-300


class SimilarityTotals:
    """Gathers one layer's `SimilaritySums` from one sequence after the other."""

    def __init__(self) -> None:
        self._sums = np.zeros(5)

    def add(self, h: Tensor, middle: Tensor, after: Tensor, x: Tensor | None) -> None:
        """Streams [n, n_embd] before the block, after attention, after the block; what its feed-forward part read."""
        h, middle, after = h.double(), middle.double(), after.double()
        y = after - middle
        cosines = [_cosine(h, after), _cosine(h, middle), _cosine(middle, after)]
        cosines.append(torch.zeros_like(cosines[0]) if x is None else _cosine(x.double(), y))
        relative = y.square().sum(-1) / middle.square().sum(-1).clamp(min=_LEAST)
        self._sums += torch.stack([*cosines, relative]).sum(-1).cpu().numpy()

    def finish(self) -> SimilaritySums:
        """The sums."""
        return SimilaritySums(*self._sums.tolist())


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Of rows; 0 where one of them is 0."""
    lengths = a.square().sum(-1) * b.square().sum(-1)
    return (a * b).sum(-1) / lengths.clamp(min=_LEAST).sqrt()
