"""What is summed of gradients over tokens: squares by component, and along what leaving parts out would change."""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slimoe.converter.stats.statistics import Removals, Single


class Squares:
    """Sums of squares over rows in double precision, by name."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def declare(self, name: str, *shape: int) -> None:
        """Zeros, where there are no sums yet."""
        self.sums.setdefault(name, torch.zeros(shape, dtype=torch.float64))

    def add(self, name: str, gradient: Tensor, expert: int | None = None) -> None:
        """Adds the rows of a gradient [n, m], to the first m sums of an expert where one is given."""
        squares = gradient.detach().square().sum(0, dtype=torch.float64).cpu()
        if expert is not None:
            self.sums[name][expert, : squares.numel()] += squares
        elif name in self.sums:
            self.sums[name] += squares
        else:
            self.sums[name] = squares

    def arrays(self) -> dict[str, NDArray[np.float64]]:
        """All of it, for `restore`."""
        return {name: sums.numpy() for name, sums in self.sums.items()}

    def restore(self, arrays: Mapping[str, NDArray[np.float64]]) -> None:
        """Takes over what `arrays` gave."""
        self.sums = {name: torch.from_numpy(array) for name, array in arrays.items()}

    def mean(self, name: str, count: int) -> Single:
        """The sums over `count`, empty without any."""
        found: Single = (self.sums.get(name, torch.zeros(0)) / count).float().numpy()
        return found


class Answers:
    """What one expert answers, summed over its picks by the square of their shares."""

    def __init__(self, n_embd: int) -> None:
        self._sum, self._weight = torch.zeros(n_embd, dtype=torch.float64), 0.0

    def add(self, shares: Tensor, answers: Tensor) -> None:
        """Picks [n] and their answers [n, n_embd]."""
        weights = shares.double().square()
        self._sum += weights @ answers.double()
        self._weight += float(weights.sum())

    def constant(self) -> Tensor:
        """The vector that is best in the expert's place; see `methods.constant_experts`."""
        return (self._sum / max(self._weight, torch.finfo(torch.float64).tiny)).float()


class RemovalSums:
    """One layer's `Removals`; a token's gradient *along* a vector is their inner product.

    Vectors that two parts of a token's change have in common add up before the square, which is all the difference to
    sums of squared components.
    """

    def __init__(self, n_stored: int) -> None:
        self._sums = dict.fromkeys(("attention", "ffn", "block"), 0.0)
        self._skip, self._novice = (torch.zeros(n_stored, dtype=torch.float64) for _ in range(2))

    def add_attention(self, along: Tensor) -> None:
        """`along` [n] attention's update."""
        self._add("attention", along)

    def add_ffn(self, along: Tensor, along_attention: Tensor) -> None:
        """`along` [n] the feed-forward part's output, and attention's update, by the stream behind the block."""
        self._add("ffn", along)
        self._add("block", along + along_attention)

    def add_constant(self, expert: int, shares: Tensor, along_output: Tensor, along_constant: Tensor) -> None:
        """Picks [n] of a stored expert: their shares, and along what it answers and what a constant would."""
        self._novice[expert] += (shares * (along_output - along_constant)).double().square().sum()

    def add_skips(self, meant: Tensor, shares: Tensor, along: Tensor) -> None:
        """All picks of tokens [n, k]: which stored expert is meant, the share, and along what the expert answers.

        The token's other shares grow so that their sum stays; where there are none, nothing is left.
        """
        answered = shares * along
        others = shares.sum(1, keepdim=True) - shares
        grown = torch.where(others > 0, shares / others, 0.0)
        squares = (grown * (answered.sum(1, keepdim=True) - answered) - answered).double().square()
        stored = meant >= 0
        self._skip.index_add_(0, meant[stored], squares[stored])

    def arrays(self) -> dict[str, NDArray[np.float64]]:
        """All of it, for `restore`."""
        whole = {f"without.{name}": np.array([value]) for name, value in self._sums.items()}
        return whole | {"skip": self._skip.numpy(), "novice": self._novice.numpy()}

    def restore(self, arrays: Mapping[str, NDArray[np.float64]]) -> None:
        """Takes over what `arrays` gave."""
        self._sums = {name: float(arrays[f"without.{name}"][0]) for name in self._sums}
        self._skip, self._novice = (torch.from_numpy(arrays[name]) for name in ("skip", "novice"))

    def result(self, count: int) -> Removals:
        """Half the means over `count` tokens."""
        halves = {name: value / (2 * count) for name, value in self._sums.items()}
        skip, novice = ((sums / (2 * count)).numpy() for sums in (self._skip, self._novice))
        return Removals(**halves, skipped=skip, novice=novice)

    def _add(self, name: str, along: Tensor) -> None:
        self._sums[name] += float(along.double().square().sum())
