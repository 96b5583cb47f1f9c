"""Narrower experts: fewer neurons, and a `down` that is fitted to what is left (MoDeGPT's type I, arXiv 2408.09632).

With C the covariance of the activations, `down` becomes the least-squares fit of the output from the kept activations
(Nystrom). Which neurons are kept is a row of `SELECTIONS`. "leverage" is the paper's: the greatest ridge leverage,
which knows nothing of `down` and keeps both of two equal neurons. "elimination" takes away, one after the other, the
neuron whose loss costs the output least after the fit (an optimal brain surgeon for structures, arXiv 2302.04089).
Everything is float64; with 14336 neurons an expert takes about 8 GB for the time of its trimming, and minutes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from slimoe.offload.errors import UsageError

Double = NDArray[np.float64]
Int = NDArray[np.int64]
Single = NDArray[np.float32]

_LEVERAGE_RIDGE = 1e-2
_FIT_RIDGE = 1e-6
_POOL = 128
"""Neurons among which elimination is exact before the others hear of it; half of them go at once."""


@dataclass(frozen=True, slots=True)
class TrimmedExpert:
    """The neurons that are kept, ascending, and the matrix [n_embd, n_kept] fitted to them: `ExpertPlan`'s fields."""

    kept: Int
    down: Single


def trim(
    down: Single, covariance: Double, widths: Sequence[int], selection: str = "elimination"
) -> tuple[TrimmedExpert, ...]:
    """The expert with `down` [n_embd, n_ff] at each of the widths; at full width it is unchanged, bit for bit.

    Raises UsageError for a width that cannot be, or an unknown selection.
    """
    n_ff = down.shape[1]
    if selection not in SELECTIONS:
        raise UsageError(f"Neurons cannot be chosen by '{selection}'. Choose one of {', '.join(SELECTIONS)}.")
    if not all(1 <= width <= n_ff for width in widths):
        raise UsageError(f"An expert of {n_ff} neurons cannot have {min(widths)} to {max(widths)}. Choose 1 to {n_ff}.")
    ranked = SELECTIONS[selection](down.astype(np.float64), covariance, min(widths))
    return tuple(_trimmed(down, covariance, np.sort(ranked[:width])) for width in widths)


def _trimmed(down: Single, covariance: Double, kept: Int) -> TrimmedExpert:
    return TrimmedExpert(kept, down if len(kept) == down.shape[1] else fit_down(down, covariance, kept))


def fit_down(down: Single, covariance: Double, kept: Int) -> Single:
    """The matrix [n_embd, n_kept] that reads the kept neurons and answers as much like `down` as can be.

    A small ridge draws it to the kept columns, so that it never fits worse than those, and keeps them where the
    covariance says nothing.
    """
    weights = down.astype(np.float64)
    inner = covariance[np.ix_(kept, kept)]
    ridge = _ridge(covariance, _FIT_RIDGE)
    inner[np.diag_indices_from(inner)] += ridge
    wanted = covariance[kept] @ weights.T + ridge * weights[:, kept].T
    fitted: Double = scipy.linalg.solve(inner, wanted, assume_a="pos").T
    return fitted.astype(np.float32)


def ridge_leverage(covariance: Double) -> Double:
    """How little the other neurons say about each [n_ff]: the diagonal of C (C + r I)^-1, r a hundredth of the mean."""
    ridge = _ridge(covariance, _LEVERAGE_RIDGE)
    inverse_diagonal = np.diag(_inverse(covariance, ridge))
    leverage: Double = 1.0 - ridge * inverse_diagonal
    return leverage


def _ridge(covariance: Double, share: float) -> float:
    return share * float(np.trace(covariance)) / len(covariance) or 1.0  # 1.0: an expert that never answered


def _inverse(covariance: Double, ridge: float) -> Double:
    inner = covariance.copy()
    inner[np.diag_indices_from(inner)] += ridge
    factor = scipy.linalg.cho_factor(inner, lower=True, overwrite_a=True)
    inverse: Double = scipy.linalg.cho_solve(factor, np.eye(len(covariance)), overwrite_b=True)
    return inverse


def _by_leverage(down: Double, covariance: Double, n_least: int) -> Int:
    return np.argsort(-ridge_leverage(covariance), kind="stable")


def _by_elimination(down: Double, covariance: Double, n_least: int) -> Int:
    """All neurons, the one that is dispensable first at the end; the first `n_least` in no order.

    Taking neuron i away costs |w_i|^2 / V_ii, with V the inverse covariance and w the matrix fitted to those left.
    """
    left, gone = np.arange(len(covariance)), []
    inverse, weights = _inverse(covariance, _ridge(covariance, _FIT_RIDGE)), down
    while len(left) > n_least:
        n_pool = min(_POOL, len(left))
        cost = np.square(weights).sum(0) / np.diag(inverse)
        pool = np.argpartition(cost, n_pool - 1)[:n_pool]
        n_go = min(max(n_pool // 2, 1), len(left) - n_least)
        go = pool[_cheapest(weights[:, pool], inverse[np.ix_(pool, pool)], n_go)]
        stay = np.delete(np.arange(len(left)), go)
        told = scipy.linalg.solve(inverse[np.ix_(go, go)], inverse[np.ix_(go, stay)], assume_a="pos")
        weights = weights[:, stay] - weights[:, go] @ told
        inverse = inverse[np.ix_(stay, stay)] - inverse[np.ix_(stay, go)] @ told
        gone.append(left[go])
        left = left[stay]
    return np.concatenate([left, *(part[::-1] for part in reversed(gone))])


def _cheapest(weights: Double, inverse: Double, n_go: int) -> Int:
    """Columns to take away, in that order, each one's cost counted after the fit to the loss of those before."""
    order: list[int] = []
    alive = np.ones(len(inverse), bool)
    for _ in range(n_go):
        diagonal = np.where(alive, np.diag(inverse), 1.0)
        cost = np.where(alive, np.square(weights).sum(0) / diagonal, np.inf)
        one = int(cost.argmin())
        order.append(one)
        alive[one] = False
        told = inverse[one] / inverse[one, one]
        weights = weights - np.outer(weights[:, one], told)
        inverse = inverse - np.outer(inverse[:, one], told)
    return np.array(order, np.int64)


SELECTIONS: Mapping[str, Callable[[Double, Double, int], Int]] = {
    "elimination": _by_elimination,
    "leverage": _by_leverage,
}
"""Functions of (down, covariance, the least width asked for) that rank neurons, those to keep first."""
