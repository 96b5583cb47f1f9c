"""What one pass of attention, or of a recurrence in its place, computes."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionPass:
    """One pass of attention over a sequence of n tokens.

    `update` [n, n_embd] is what is added to the residual stream. `received` [n] are the attention weights that each
    token gets from itself and all later ones, summed over heads; zeros of a recurrence, which has none. `reads`
    [n, n_in] are the inputs of each matrix and `products` [n, n_out] its products before norms and rotation, by role;
    of stacks with a matrix for each head they are [n, n_head, n_in] and [n, n_head, n_out].
    """

    update: Tensor
    received: Tensor
    reads: Mapping[str, Tensor]
    products: Mapping[str, Tensor]
