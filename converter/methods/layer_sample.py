"""Some tokens of one layer: what its router and experts read, and what the feed-forward part adds to the stream."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from slimoe.converter.forward.block import Expert, Routing
from slimoe.converter.forward.stream import Observer


@dataclass(frozen=True, slots=True)
class LayerSample:
    """Normalised inputs `x` and updates of the stream `y`, both [n, n_embd] float32 on the CPU."""

    x: Tensor
    y: Tensor

    def outputs(self, experts: Iterable[Expert]) -> Tensor:
        """What each of the experts would answer to every token [n, n_expert, n_embd], one expert in use at a time."""
        with torch.no_grad():
            return torch.stack([expert(self.x.to(expert.gate.weight.device)).cpu() for expert in experts], 1)


def spread_rows(n_rows: int, n_sample: int) -> Tensor:
    """At most `n_sample` rows, evenly spread over all."""
    return torch.linspace(0, n_rows - 1, min(n_sample, n_rows)).round().long()


class LayerSampler(Observer):
    """Keeps `rows` (ascending) of one layer's pass: 2 * len(rows) * n_embd floats."""

    def __init__(self, layer: int, rows: Tensor) -> None:
        self.layer, self.rows = layer, rows
        self._x: list[Tensor] = []
        self._y: list[Tensor] = []

    def routed(self, layer: int, first_row: int, x: Tensor, routing: Routing) -> None:  # noqa: D102 (the Observer's)
        if layer == self.layer:
            self._x.append(x[self._within(first_row, len(x))].cpu())

    def block(self, layer: int, first_row: int, h: Tensor, middle: Tensor, after: Tensor) -> None:  # noqa: D102 (the Observer's)
        if layer == self.layer:
            rows = self._within(first_row, len(middle))
            self._y.append((after[rows] - middle[rows]).cpu())

    def _within(self, first_row: int, n: int) -> Tensor:
        begin, end = torch.searchsorted(self.rows, torch.tensor([first_row, first_row + n])).tolist()
        return self.rows[begin:end] - first_row

    def sample(self) -> LayerSample:
        """What was seen, once the layer was passed."""
        return LayerSample(torch.cat(self._x), torch.cat(self._y))
