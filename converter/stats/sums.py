"""What experts answer: sums over the tokens that picked them."""

import numpy as np
import torch
from torch import Tensor

from slimoe.converter.stats.statistics import OutputSums


class OutputTotals:
    """Gathers one layer's `OutputSums`, in double precision, from parts of an expert's tokens."""

    def __init__(self, n_stored: int, n_embd: int) -> None:
        self._scalars = np.zeros((5, n_stored))
        self._n_pick = np.zeros(n_stored, np.int64)
        self._largest = np.zeros(n_stored)
        self._vectors = np.zeros((4, n_stored, n_embd))

    def add(self, expert: int, shares: Tensor, output: Tensor) -> None:
        """Answers [n, n_embd] of one expert and each one's share [n]."""
        f, share = output.double(), shares.double()
        square = f.square()
        norm_square = square.sum(-1)
        norm, share_square = norm_square.sqrt(), share.square()
        scalars = (norm, norm_square, share * norm, share_square * norm_square, share_square)
        vectors = torch.stack((f.sum(0), square.sum(0), share @ f, share_square @ f))
        self._n_pick[expert] += len(f)
        self._scalars[:, expert] += torch.stack([value.sum() for value in scalars]).cpu().numpy()
        self._largest[expert] = max(self._largest[expert], float(f.abs().max()))
        self._vectors[:, expert] += vectors.cpu().numpy()

    def weighted_square(self, expert: int) -> float:
        """Sum over an expert's picks of share^2 |f|^2."""
        return float(self._scalars[3, expert])

    def means(self) -> Tensor:
        """Each expert's mean output weighted by the square of its share [E, n_embd] float64.

        That of an expert that no token picked is the mean over all picks of the layer.
        """
        weights, sums = self._scalars[4], self._vectors[3]
        weight = weights.sum()
        overall = sums.sum(0) / (weight if weight > 0 else 1.0)
        divided = sums / np.where(weights > 0, weights, 1.0)[:, None]
        return torch.from_numpy(np.where(weights[:, None] > 0, divided, overall))

    def finish(self) -> OutputSums:
        """The sums."""
        norm, norm_square, share_norm, share_square_norm_square, share_square = self._scalars
        output, output_square, share_output, share_square_output = self._vectors.astype(np.float32)
        return OutputSums(
            n_pick=self._n_pick,
            norm=norm,
            norm_square=norm_square,
            share_norm=share_norm,
            share_square_norm_square=share_square_norm_square,
            largest=self._largest,
            share_square=share_square,
            output=output,
            output_square=output_square,
            share_output=share_output,
            share_square_output=share_square_output,
        )
