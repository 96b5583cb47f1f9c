"""What each matrix reads: sums of squares by column, which weigh the errors of quantising it."""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from slimoe.converter.source.model_source import ModelSource, expert_key
from slimoe.converter.stats.statistics import InputSums


class InputTotals:
    """Gathers one layer's `InputSums` in double precision; experts narrower than the widest end in zeros."""

    def __init__(self, source: ModelSource, layer: int) -> None:
        spec, of = source.spec, source.layers[layer]
        n_mixed = spec.n_head * spec.n_embd_head
        self._expert = np.zeros((of.n_stored, spec.n_embd))
        self._n_ff = [source.shapes[expert_key(layer, "gate", expert)][0] for expert in range(of.n_stored)]
        self._hidden = np.zeros((of.n_stored, max(self._n_ff, default=0)))
        self._attention, self._mixed = (np.zeros(n if of.has_attention else 0) for n in (spec.n_embd, n_mixed))
        self._router = np.zeros(spec.n_embd if of.target else 0)

    def add_attention(self, x: Tensor, mixed: Tensor) -> None:
        """One sequence's attention: its normalised input, and the heads' joined output."""
        self._attention += column_squares(x)
        self._mixed += column_squares(mixed)

    def add_router(self, x: Tensor) -> None:
        """One sequence's input of the router."""
        self._router += column_squares(x)

    def add_expert(self, expert: int, x: Tensor, hidden: Tensor) -> None:
        """Inputs of an expert [n, n_embd], and of its down [n, n_ff]."""
        self._expert[expert] += column_squares(x)
        self._hidden[expert, : self._n_ff[expert]] += column_squares(hidden)

    def of_expert(self, expert: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """What is known so far of the inputs of one expert, and of its down."""
        return self._expert[expert].astype(np.float32), self._hidden[expert, : self._n_ff[expert]].astype(np.float32)

    def finish(self) -> InputSums:
        """The sums."""
        sums = (self._expert, self._hidden, self._attention, self._mixed, self._router)
        return InputSums(*(one.astype(np.float32) for one in sums))


def column_squares(values: Tensor) -> NDArray[np.float64]:
    """Sums of squares over rows [n_column]."""
    sums: NDArray[np.float64] = values.double().square().sum(0).cpu().numpy()
    return sums
