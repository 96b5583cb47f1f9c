"""All inner products of what a policy could add to a token's stream, for a sample of a layer's tokens.

Whatever ends in a linear combination of these vectors (fewer experts, skipped ones, constant ones in their place) has a
squared error that follows from them, without the model.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slimoe.converter.forward.block import Expert
from slimoe.converter.stats.statistics import Sketch

_MOST_BYTES = 1 << 25
"""Of a layer's products, beyond which fewer tokens are taken."""
_MOST_OUTPUT_BYTES = 1 << 29
_TOKENS_AT_ONCE = 64


def spread_rows(n_rows: int, n_sample: int) -> NDArray[np.int64]:
    """Sorted rows, one at random out of each of `n_sample` even parts; all of them if there are no more."""
    if n_sample >= n_rows:
        return np.arange(n_rows, dtype=np.int64)
    places = np.arange(n_sample) + np.random.default_rng(0).random(n_sample)
    return (places * n_rows / n_sample).astype(np.int64)


def sketch_size(n_sample: int, n_rows: int, n_stored: int, n_embd: int) -> int:
    """How many tokens to take: `n_sample` unless there are fewer, or so many experts that they would be too large."""
    n_vectors = 2 * n_stored + 1
    room = min(_MOST_BYTES // (4 * n_vectors**2), _MOST_OUTPUT_BYTES // (4 * n_stored * n_embd))
    return max(1, min(n_sample, n_rows, room))


class SketchRows:
    """Gathers one layer's `Sketch`: inputs of the sampled `rows` first, then every expert's answers to them."""

    def __init__(self, rows: NDArray[np.int64], n_stored: int, n_row: int, n_embd: int) -> None:
        self._rows = rows
        self._x, self._middle = torch.zeros(len(rows), n_embd), torch.zeros(len(rows), n_embd)
        self._logits = torch.zeros(len(rows), n_row)
        self._outputs = torch.zeros(len(rows), n_stored, n_embd)
        self._missing = set(range(n_stored))

    def add_routing(self, first_row: int, x: Tensor, logits: Tensor) -> None:
        """One sequence's normalised input, and the router's answer."""
        sampled, own = self._sampled(first_row, len(x))
        self._x[sampled], self._logits[sampled] = x[own.to(x.device)].cpu(), logits[own.to(x.device)].cpu()

    def add_middle(self, first_row: int, middle: Tensor) -> None:
        """One sequence's stream that the experts' answers are added to."""
        sampled, own = self._sampled(first_row, len(middle))
        self._middle[sampled] = middle[own]

    def _sampled(self, first_row: int, n_rows: int) -> tuple[slice, Tensor]:
        """Which of the sampled rows a sequence has, and where in it they are."""
        begin, end = np.searchsorted(self._rows, (first_row, first_row + n_rows)).tolist()
        return slice(begin, end), torch.from_numpy(self._rows[begin:end] - first_row)

    def add_expert(self, number: int, expert: Expert) -> None:
        """Asks an expert for its answers to all sampled rows."""
        self._outputs[:, number] = expert(self._x.to(expert.down.weight.device)).cpu()
        self._missing.discard(number)

    @property
    def missing(self) -> list[int]:
        """Experts that have not been asked."""
        return sorted(self._missing)

    def finish(self, means: Tensor) -> Sketch:
        """The products, with `means` [E, n_embd] float64 as the experts' mean outputs."""
        assert not self._missing
        n_vectors = 2 * len(means) + 1
        gram = np.empty((len(self._rows), n_vectors, n_vectors), np.float32)
        for begin in range(0, len(self._rows), _TOKENS_AT_ONCE):
            part = slice(begin, begin + _TOKENS_AT_ONCE)
            outputs, middle = self._outputs[part].double(), self._middle[part].double()[:, None]
            vectors = torch.cat((outputs, means.expand(len(outputs), -1, -1), middle), 1)
            gram[part] = (vectors @ vectors.mT).numpy()
        return Sketch(gram, self._logits.numpy(), self._rows)
