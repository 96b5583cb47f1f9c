"""The entries of ggml's codebooks, and which of them are near to points. Apart: knows nothing of blocks and bits."""

from functools import cache

import gguf.quants
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray
from torch import Tensor

SIGN_BITS = {"IQ1_S": 0, "IQ1_M": 0, "IQ2_XXS": 7, "IQ2_XS": 7, "IQ2_S": 8, "IQ3_XXS": 7, "IQ3_S": 8}
"""Bits of signs for 8 weights, by the type's name; with 7 the number of minuses is even. With none, entries have signs
of their own."""
N_NEAR = 4


@cache
def entries_of(kind: Type) -> NDArray[np.float32]:
    """The codebook [n_entries, 4 or 8] over the scale; in IQ1_M both sides of each entry."""
    public = getattr(gguf.quants, kind.name)
    public.init_grid()
    entries: NDArray[np.float32] = np.array(public.grid, np.float32).reshape(public.grid_shape)
    if kind is Type.IQ1_M:
        return np.concatenate((entries + public.delta, entries - public.delta))
    return entries


def near_entries(entries: Tensor, points: Tensor, cost: Tensor) -> Tensor:
    """Numbers [N_NEAR, n] of `entries` [n_entries, size] near to `points` [size, n]: the nearest in each part of them.

    `cost` [size] is what a weight's squared error costs.
    """
    # The squares of differences, multiplied out.
    weighted = entries * cost
    left = torch.cat((weighted, (weighted * entries).sum(1, keepdim=True)), 1)
    right = torch.cat((-2 * points, torch.ones_like(points[:1])))
    costs = torch.addmm(cost @ points.square(), left, right)
    return least_of(costs, N_NEAR)


def least_of(costs: Tensor, n_parts: int = 1) -> Tensor:
    """The numbers [n_parts, n] of the least of `costs` [n_costs, n] in each part: of every `n_parts`th.

    Costs of at least 0, compared to some thousandths. They are overwritten.
    """
    # Floats of at least 0 are in the order of their bits, so that the lowest can hold the number: one pass finds both.
    mask = (1 << (len(costs) - 1).bit_length()) - 1
    keys = costs.clamp_(min=0).view(torch.int32)
    keys.bitwise_and_(~mask).bitwise_or_(torch.arange(len(costs), dtype=torch.int32, device=costs.device)[:, None])
    return keys.view(-1, n_parts, costs.shape[1]).amin(0).bitwise_and_(mask)
