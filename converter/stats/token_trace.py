"""The routing of every token, one after the other: what caches, prefetches and skips are replayed on."""

import numpy as np
from torch import Tensor

from slimoe.converter.forward.block import Routing
from slimoe.converter.stats.statistics import TokenTrace

_F16_MAX = 65504.0


class TraceRows:
    """Fills one layer's `TokenTrace`. Attention received that float16 cannot hold is its largest number."""

    def __init__(self, n_rows: int, n_used: int) -> None:
        self._picks = np.zeros((n_rows, n_used), np.uint16)
        self._shares = np.zeros((n_rows, n_used), np.float16)
        self._received = np.zeros(n_rows, np.float16)
        self._norm = np.zeros(n_rows, np.float32)

    def add_attention(self, first_row: int, received: Tensor) -> None:
        """What a sequence's tokens received from those that attend to them."""
        rows = slice(first_row, first_row + len(received))
        self._received[rows] = received.clamp(max=_F16_MAX).cpu().numpy()

    def add_routing(self, first_row: int, x: Tensor, routing: Routing) -> None:
        """A sequence's input of the router, and its answer."""
        rows = slice(first_row, first_row + len(x))
        self._picks[rows], self._shares[rows] = routing.picks.cpu().numpy(), routing.shares.cpu().numpy()
        self._norm[rows] = x.abs().sum(-1).cpu().numpy()

    def finish(self) -> TokenTrace:
        """All tokens."""
        return TokenTrace(self._picks, self._shares, self._received, self._norm)
