"""How an expert's activations go together: sums of their products, for trimming the expert's width.

At n_ff^2 numbers per expert it is the largest statistic, so it is never stored: a pass over one layer hands over the
sums of each expert as soon as all of the expert's tokens have been seen.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slimoe.converter.forward.expert import Expert
from slimoe.converter.forward.stream import Observer

_ROWS_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class HiddenSums:
    """Sums over an expert's tokens: `product` [n_ff, n_ff] of w^2 a a^T and `weight_square` of w^2.

    Here a [n_ff] are the activations that `down` reads, and w is the token's expert weight. A change of `down` by D
    adds tr(D product D^T) to the sum of w^2 |change of the output|^2. `n_token` is the number of tokens.
    """

    product: NDArray[np.float32]
    weight_square: float
    n_token: int

    def covariance(self) -> NDArray[np.float64]:
        """The mean of a a^T [n_ff, n_ff], tokens weighted by w^2; zeros without tokens."""
        return self.product.astype(np.float64) / max(self.weight_square, np.finfo(np.float64).tiny)


def hidden_sums(expert: Expert, x: Tensor) -> HiddenSums:
    """The sums over any inputs [n, n_embd] with expert weight 1, whether or not a token selected the expert."""
    product = torch.zeros(len(expert.up.weight), len(expert.up.weight), device=expert.up.weight.device)
    with torch.no_grad():
        for rows in x.split(_ROWS_AT_ONCE):
            hidden = expert.hidden(rows.to(product.device))
            product.addmm_(hidden.T, hidden)
    return HiddenSums(product.cpu().numpy(), float(len(x)), len(x))


def shrunk_covariance(own: HiddenSums, layer: HiddenSums | None = None) -> NDArray[np.float64]:
    """The covariance [n_ff, n_ff] of an expert's own tokens, mixed with that of any tokens of the `layer`.

    The layer's weighs like n_ff tokens: with only a few tokens of its own, an expert would leave neurons undetermined
    that other tokens need. Takes 16 bytes times n_ff^2.
    """
    covariance = own.covariance()
    if layer is None:
        return covariance
    weight = len(covariance) / (len(covariance) + own.n_token)
    covariance *= 1 - weight
    covariance += weight * layer.covariance()
    return covariance


class HiddenCollector(Observer):
    """Calls `take(expert, sums)` for each expert of one layer that a token selected, in the order of their numbers.

    Holds 4 bytes times n_ff^2, for one expert at a time: 0.8 GB for 14336 neurons. Call `finish` after the pass, which
    hands over the last expert.
    """

    def __init__(self, layer: int, take: Callable[[int, HiddenSums], None]) -> None:
        self.layer, self._take = layer, take
        self._expert = -1
        self._product = torch.zeros(0, 0)
        self._weight_square, self._n_token = 0.0, 0

    def expert(  # noqa: D102 (the Observer's)
        self, layer: int, expert: int, rows: Tensor, x: Tensor, hidden: Tensor, weights: Tensor
    ) -> Tensor | None:
        if layer != self.layer:
            return None
        if expert != self._expert:
            assert expert > self._expert, "experts come in order, each at once"
            self.finish()
            self._expert = expert
            self._product = torch.zeros(hidden.shape[1], hidden.shape[1], device=hidden.device)
            self._weight_square, self._n_token = 0.0, 0
        weighted = hidden * weights[:, None]
        self._product.addmm_(weighted.T, weighted)
        self._weight_square += float(weights.double().square().sum())
        self._n_token += len(rows)
        return None

    def finish(self) -> None:
        """Hands over the sums of the last expert."""
        if self._n_token:
            self._take(self._expert, HiddenSums(self._product.cpu().numpy(), self._weight_square, self._n_token))
            self._n_token = 0
