"""Sums of gradients over tokens: squares by component, and along the change that leaving parts out would make."""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slimoe.converter.stats.statistics import Removals, Single


class Squares:
    """Sums over rows of squared gradients, in double precision, by name."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def declare(self, name: str, *shape: int) -> None:
        """Adds zeros of a shape, unless there are sums of that name."""
        self.sums.setdefault(name, torch.zeros(shape, dtype=torch.float64))

    def add(self, name: str, gradient: Tensor, expert: int | None = None) -> None:
        """Adds the squares of a gradient [n, ...], of one [n, m] to the first m sums of an expert if one is given."""
        squares = gradient.detach().square().sum(0, dtype=torch.float64).cpu()
        if expert is not None:
            self.sums[name][expert, : squares.numel()] += squares
        elif name in self.sums:
            self.sums[name] += squares
        else:
            self.sums[name] = squares

    def arrays(self) -> dict[str, NDArray[np.float64]]:
        """All sums by name, for `restore`."""
        return {name: sums.numpy() for name, sums in self.sums.items()}

    def restore(self, arrays: Mapping[str, NDArray[np.float64]]) -> None:
        """Takes over the sums that `arrays` returned."""
        self.sums = {name: torch.from_numpy(array) for name, array in arrays.items()}

    def mean(self, name: str, count: int) -> Single:
        """The sums of a name divided by `count`; empty if there are none."""
        found: Single = (self.sums.get(name, torch.zeros(0)) / count).float().numpy()
        return found


class OutputMean:
    """The mean output of one expert over the tokens that selected it, weighted by the square of the expert weight."""

    def __init__(self, n_embd: int) -> None:
        self._sum, self._weight = torch.zeros(n_embd, dtype=torch.float64), 0.0

    def add(self, weights: Tensor, outputs: Tensor) -> None:
        """Adds tokens: their expert weights [n] and the expert's outputs [n, n_embd]."""
        squares = weights.double().square()
        self._sum += squares @ outputs.double()
        self._weight += float(squares.sum())

    def constant(self) -> Tensor:
        """The constant vector [n_embd] that replaces the expert best; see `methods.constant_experts`."""
        return (self._sum / max(self._weight, torch.finfo(torch.float64).tiny)).float()


class RemovalSums:
    """Gathers one layer's `Removals`; the gradient *along* a vector is the inner product of the two.

    The components of a token's change add up before they are squared, which sums of squared gradients cannot know.
    """

    def __init__(self, n_stored: int) -> None:
        self._sums = dict.fromkeys(("attention", "ffn", "block"), 0.0)
        self._skip, self._constant = (torch.zeros(n_stored, dtype=torch.float64) for _ in range(2))

    def add_attention(self, along: Tensor) -> None:
        """Adds tokens [n]: the gradient along attention's update."""
        self._add("attention", along)

    def add_ffn(self, along: Tensor, along_attention: Tensor) -> None:
        """Adds tokens [n]: the gradient along the feed-forward part's output and along attention's update.

        Both are products with the gradient behind the block.
        """
        self._add("ffn", along)
        self._add("block", along + along_attention)

    def add_constant(self, expert: int, weights: Tensor, along_output: Tensor, along_constant: Tensor) -> None:
        """Adds tokens [n] that selected a stored expert: their expert weights, and the gradient along the expert's
        output and along the constant that could replace it.
        """
        self._constant[expert] += (weights * (along_output - along_constant)).double().square().sum()

    def add_skips(self, experts: Tensor, weights: Tensor, along: Tensor) -> None:
        """Adds tokens: their selected stored experts, expert weights, and the gradient along each output, all [n, k].

        A skipped expert's weight goes to the token's other experts, so that the sum stays; a token of one expert loses
        its output.
        """
        added = weights * along
        others = weights.sum(1, keepdim=True) - weights
        grown = torch.where(others > 0, weights / others, 0.0)
        squares = (grown * (added.sum(1, keepdim=True) - added) - added).double().square()
        stored = experts >= 0
        self._skip.index_add_(0, experts[stored], squares[stored])

    def arrays(self) -> dict[str, NDArray[np.float64]]:
        """All sums by name, for `restore`."""
        whole = {f"without.{name}": np.array([value]) for name, value in self._sums.items()}
        return whole | {"skip": self._skip.numpy(), "novice": self._constant.numpy()}

    def restore(self, arrays: Mapping[str, NDArray[np.float64]]) -> None:
        """Takes over the sums that `arrays` returned."""
        self._sums = {name: float(arrays[f"without.{name}"][0]) for name in self._sums}
        self._skip, self._constant = (torch.from_numpy(arrays[name]) for name in ("skip", "novice"))

    def result(self, count: int) -> Removals:
        """Half the means over `count` tokens, which are KL divergences in nats."""
        halves = {name: value / (2 * count) for name, value in self._sums.items()}
        skip, constant = ((sums / (2 * count)).numpy() for sums in (self._skip, self._constant))
        return Removals(**halves, skipped=skip, novice=constant)

    def _add(self, name: str, along: Tensor) -> None:
        self._sums[name] += float(along.double().square().sum())
