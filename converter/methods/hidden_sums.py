"""How an expert's neurons fire together: sums of products of its activations, for trimming its width.

The largest statistic of all, n_ff^2 per expert, so it is never stored: a pass of one layer hands each expert's over as
soon as the expert is done.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slimoe.converter.forward.block import Expert
from slimoe.converter.forward.stream import Observer

_ROWS_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class HiddenSums:
    """Over an expert's tokens: `product` [n_ff, n_ff] of share^2 a a^T, where a is what `down` reads; `share_square`,
    the sum of share^2; and the number of tokens.

    A change of `down` by D then costs tr(D product D^T): the sum of share^2 |change of the output|^2.
    """

    product: NDArray[np.float32]
    share_square: float
    n_token: int

    def covariance(self) -> NDArray[np.float64]:
        """The mean of a a^T, tokens weighted by share^2; zeros without tokens."""
        return self.product.astype(np.float64) / max(self.share_square, np.finfo(np.float64).tiny)


def hidden_sums(expert: Expert, x: Tensor) -> HiddenSums:
    """The sums over any inputs [n, n_embd], each of share 1: what an expert does with tokens that did not pick it."""
    product = torch.zeros(len(expert.gate.weight), len(expert.gate.weight), device=expert.gate.weight.device)
    with torch.no_grad():
        for rows in x.split(_ROWS_AT_ONCE):
            hidden = expert.hidden(rows.to(product.device))
            product.addmm_(hidden.T, hidden)
    return HiddenSums(product.cpu().numpy(), float(len(x)), len(x))


def shrunk_covariance(own: HiddenSums, layer: HiddenSums | None = None) -> NDArray[np.float64]:
    """The covariance [n_ff, n_ff] of an expert's tokens, drawn towards that of any tokens of the layer.

    The latter weighs like n_ff tokens, without which few tokens would leave neurons undetermined that others need.
    Takes 16 bytes times n_ff^2.
    """
    covariance = own.covariance()
    if layer is None:
        return covariance
    weight = len(covariance) / (len(covariance) + own.n_token)
    covariance *= 1 - weight
    covariance += weight * layer.covariance()
    return covariance


class HiddenCollector(Observer):
    """Hands the sums of one layer's experts that were picked to `take(expert, sums)`, in the order of their numbers.

    Holds 4 bytes times n_ff^2, for one expert at a time: 0.8 GB for 14336 neurons. `finish` after the pass hands the
    last one over.
    """

    def __init__(self, layer: int, take: Callable[[int, HiddenSums], None]) -> None:
        self.layer, self._take = layer, take
        self._expert = -1
        self._product = torch.zeros(0, 0)
        self._share_square, self._n_token = 0.0, 0

    def expert(  # noqa: D102 (the Observer's)
        self, layer: int, expert: int, rows: Tensor, x: Tensor, hidden: Tensor, shares: Tensor
    ) -> Tensor | None:
        if layer != self.layer:
            return None
        if expert != self._expert:
            self.finish()
            self._begin(expert, hidden)
        weighted = hidden * shares[:, None]
        self._product.addmm_(weighted.T, weighted)
        self._share_square += float(shares.double().square().sum())
        self._n_token += len(rows)
        return None

    def _begin(self, expert: int, hidden: Tensor) -> None:
        assert expert > self._expert, "experts come in order, each at once"
        self._expert = expert
        self._product = torch.zeros(hidden.shape[1], hidden.shape[1], device=hidden.device)
        self._share_square, self._n_token = 0.0, 0

    def finish(self) -> None:
        """Hands over what is left."""
        if self._n_token:
            self._take(self._expert, HiddenSums(self._product.cpu().numpy(), self._share_square, self._n_token))
            self._n_token = 0
