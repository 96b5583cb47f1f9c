"""Norms in torch, which attention, its latent form, the feed-forward part and the head share."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Norm:
    """Divides rows by their root mean square, multiplies them with `weight` [n] and adds the bias [n], if any."""

    weight: Tensor
    eps: float
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """The normalised rows."""
        normed = rms_norm(x, self.weight, self.eps)
        return normed if self.bias is None else normed + self.bias


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Rows divided by their root mean square, times `weight`."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
