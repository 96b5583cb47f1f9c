"""Compressed experts: vectors that stand for the experts that a token selects last, fitted without training.

Source: arXiv 2503.00634, which trains one vector for each expert, a gain, with the model. Here the vectors of a layer
minimise the squared error of its output, and beside its gain each expert has a shift, the constant that it adds.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slimoe.converter.forward.expert import AuxVectors, aux_shares

_RIDGES = (0.03, 0.3, 3.0)
"""What is added to the diagonal of the normal equations, in units of its mean over the experts."""
_VALUES_AT_ONCE = 1 << 24


@dataclass(frozen=True, slots=True)
class AuxSample:
    """What n tokens tell of a layer whose last selected experts are not computed.

    `total` [n, n_embd] is the weighted sum of the main experts' outputs, and `missing` [n, n_embd] what the layer's
    output lacks beside it. `selected` [n, n_aux] are the rows of the other selected experts, `weights` theirs.
    """

    total: Tensor
    missing: Tensor
    selected: Tensor
    weights: Tensor

    def of(self, rows: Tensor) -> "AuxSample":
        """Some of the tokens."""
        return AuxSample(self.total[rows], self.missing[rows], self.selected[rows], self.weights[rows])


@dataclass(frozen=True, slots=True)
class FittedVectors:
    """The vectors, and on held-out tokens the mean squared error of the output without and with them."""

    vectors: AuxVectors
    before: float
    after: float


def fit_vectors(sample: AuxSample, n_row: int, is_held: Tensor) -> FittedVectors:
    """The vectors of a router's `n_row` rows that fit the tokens which are not held out best.

    Of several ridges, of shifts with and without gains, and of no vectors at all, those are taken that have the least
    error on the tokens that `is_held` [n] holds out. Takes memory for 16 n_row^2 n_embd bytes beside the sample.
    """
    sums, held = _NormalEquations(sample.of(~is_held), n_row), sample.of(is_held)
    nothing = torch.zeros(n_row, sample.total.shape[1])
    best, before = AuxVectors(nothing, nothing), _error(held, AuxVectors(nothing, nothing))
    after = before
    for ridge in _RIDGES:
        for has_gain in (True, False):
            vectors = sums.solved(ridge, has_gain=has_gain)
            error = _error(held, vectors)
            if error < after:
                best, after = vectors, error
    return FittedVectors(best, before, after)


def _error(sample: AuxSample, vectors: AuxVectors) -> float:
    chosen = sample.selected, sample.weights
    left = sample.total * (1 - vectors.gains(*chosen)) - vectors.shifts(*chosen) + sample.missing
    return float(left.double().square().sum(1).mean()) if len(left) else 0.0


class _NormalEquations:
    """Sums over tokens of products of what gains and shifts are multiplied with, for each component of the output.

    A component's unknowns are the gains of all rows and then their shifts.
    """

    def __init__(self, sample: AuxSample, n_row: int) -> None:
        self._n_row, n_embd = n_row, sample.total.shape[1]
        gain_gain, gain_shift = (torch.zeros(n_row * n_row, n_embd) for _ in range(2))
        shift_shift = torch.zeros(n_row * n_row)
        self._gain_missing, self._shift_missing = (torch.zeros(n_row, n_embd) for _ in range(2))
        for part in _parts(sample):
            shares = aux_shares(part.weights)
            for one in range(part.selected.shape[1]):
                row, share, weight = part.selected[:, one], shares[:, one], part.weights[:, one]
                self._gain_missing.index_add_(0, row, share[:, None] * part.total * part.missing)
                self._shift_missing.index_add_(0, row, weight[:, None] * part.missing)
                for other in range(part.selected.shape[1]):
                    pair, its_share = row * n_row + part.selected[:, other], shares[:, other]
                    its_weight = part.weights[:, other]
                    gain_gain.index_add_(0, pair, (share * its_share)[:, None] * part.total.square())
                    gain_shift.index_add_(0, pair, (share * its_weight)[:, None] * part.total)
                    shift_shift.index_add_(0, pair, weight * its_weight)
        self._gain_gain = gain_gain.T.reshape(n_embd, n_row, n_row)
        self._gain_shift = gain_shift.T.reshape(n_embd, n_row, n_row)
        self._shift_shift = shift_shift.reshape(n_row, n_row)

    def solved(self, ridge: float, *, has_gain: bool) -> AuxVectors:
        """The vectors with the least error, to which `ridge` adds their squares; gains are 0 unless asked for."""
        n, n_embd = self._n_row, len(self._gain_gain)
        gain, shift = torch.zeros(n, n_embd), torch.zeros(n, n_embd)
        at_once = max(1, _VALUES_AT_ONCE // (4 * n * n))
        for begin in range(0, n_embd, at_once):
            part = slice(begin, begin + at_once)
            lower = self._shift_shift.expand(len(self._gain_gain[part]), n, n)
            missing = self._shift_missing[:, part]
            matrix, wanted = _ridged(lower.double(), ridge), missing
            if has_gain:
                across = self._gain_shift[part].double()
                upper = _ridged(self._gain_gain[part].double(), ridge)
                matrix = torch.cat((torch.cat((upper, across), 2), torch.cat((across.mT, matrix), 2)), 1)
                wanted = torch.cat((self._gain_missing[:, part], missing))
            found = torch.linalg.solve(matrix, wanted.T[..., None].double())[..., 0].float().T
            shift[:, part] = found[-n:]
            if has_gain:
                gain[:, part] = found[:n]
        return AuxVectors(gain, shift)


def _ridged(matrices: Tensor, ridge: float) -> Tensor:
    """Symmetric matrices [m, n, n] with `ridge` times the mean of each one's diagonal added to it."""
    diagonal = matrices.diagonal(dim1=1, dim2=2).mean(1)
    added = (ridge * diagonal).clamp(min=1e-20)
    return matrices + added[:, None, None] * torch.eye(matrices.shape[1], dtype=matrices.dtype)


def _parts(sample: AuxSample) -> Iterator[AuxSample]:
    """The tokens, some thousands of products with the output at a time."""
    n_rows = max(1, _VALUES_AT_ONCE // (4 * max(1, sample.total.shape[1])))
    for begin in range(0, len(sample.total), n_rows):
        rows = torch.arange(begin, min(begin + n_rows, len(sample.total)))
        yield sample.of(rows)


def held_out_rows(lengths: Sequence[int], every: int = 4) -> Tensor:
    """Which tokens of sequences are held out: those of every fourth sequence, or of few the last quarter of each.

    A bool for each token [n].
    """
    if len(lengths) < every:
        ends = [max(1, length // every) for length in lengths]
        return torch.cat([torch.arange(n) >= n - end for n, end in zip(lengths, ends, strict=True)])
    return torch.cat([torch.full((n,), index % every == every - 1) for index, n in enumerate(lengths)])
