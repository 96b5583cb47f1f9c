"""Compressed experts in torch: vectors that stand for a token's selected experts that are not computed.

Source: arXiv 2503.00634. Of the experts that a token selects the first are computed, the main ones. Each of the others,
the auxiliary ones, changes what the main ones say: it has a `gain` on their sum, and a `shift` that is added to it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

LEAST_SUM = 2.0**-14
"""What the weights of a token's auxiliary experts are divided by at least, as in the engine."""


@dataclass(frozen=True, slots=True)
class AuxVectors:
    """The vectors of all rows of a router, `gain` and `shift` [n_row, n_embd]."""

    gain: Tensor
    shift: Tensor

    def gains(self, selected: Tensor, weights: Tensor) -> Tensor:
        """What the sum of the main experts is multiplied with [n, n_embd], by auxiliary experts [n, n_aux]."""
        return 1 + _mixed(self.gain, selected, aux_shares(weights))

    def shifts(self, selected: Tensor, weights: Tensor) -> Tensor:
        """What is added to it after that [n, n_embd]."""
        return _mixed(self.shift, selected, weights)


def aux_shares(weights: Tensor) -> Tensor:
    """The weights [n, n_aux] of a token's auxiliary experts over their sum."""
    return weights / weights.sum(-1, keepdim=True).clamp(min=LEAST_SUM)


def _mixed(vectors: Tensor, selected: Tensor, factors: Tensor) -> Tensor:
    """The sums [n, n_embd] of selected vectors times their factors, one rank after the other."""
    selected, factors = selected.to(vectors.device), factors.to(vectors.device)
    total = torch.zeros(len(selected), vectors.shape[1], device=vectors.device)
    for rank in range(selected.shape[1]):
        total += factors[:, rank, None] * vectors[selected[:, rank]]
    return total
