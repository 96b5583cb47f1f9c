"""Narrower experts: fewer neurons, and a `down` that is fitted to those left (MoDeGPT's type I, arXiv 2408.09632).

With C the covariance of the activations, `down` becomes the least-squares fit of the output from the kept activations
(Nystrom). `SELECTIONS` has the ways to choose the neurons. "leverage" is the paper's: it keeps those of the greatest
ridge leverage, without regard to `down`, and keeps both of two equal neurons. "elimination" removes, one after the
other, the neuron whose loss costs the output least after the fit (an optimal brain surgeon for structures, arXiv
2302.04089). Everything is float64; trimming an expert of 14336 neurons takes about 8 GB and some minutes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from slimoe.offload.errors import UsageError

Int = NDArray[np.int64]
Double = NDArray[np.float64]
Single = NDArray[np.float32]

_LEVERAGE_RIDGE = 1e-2
_FIT_RIDGE = 1e-6
N_POOL = 128
"""Neurons among which elimination is exact before all others are updated; half of them are removed at once."""


@dataclass(frozen=True, slots=True)
class TrimmedExpert:
    """The neurons that are kept, ascending, and `down` [n_embd, n_kept] fitted to them, as `ExpertPlan` has them."""

    kept: Int
    down: Single


def trim(
    down: Single, covariance: Double, widths: Sequence[int], selection: str = "elimination", n_pool: int = N_POOL
) -> tuple[TrimmedExpert, ...]:
    """Trims the expert with `down` [n_embd, n_ff] to each of the widths; at full width it is unchanged, bit for bit.

    `covariance` [n_ff, n_ff] is that of its activations. Raises UsageError for a width that is not from 1 to n_ff, and
    for an unknown selection. "elimination" is exact among `n_pool` neurons at a time.
    """
    n_ff = down.shape[1]
    if selection not in SELECTIONS:
        raise UsageError(f"Neurons cannot be chosen by '{selection}'. Choose one of {', '.join(SELECTIONS)}.")
    if not all(1 <= width <= n_ff for width in widths):
        raise UsageError(f"An expert of {n_ff} neurons cannot have {min(widths)} to {max(widths)}. Choose 1 to {n_ff}.")
    ranked = SELECTIONS[selection](down.astype(np.float64), covariance, min(widths), n_pool)
    neurons = [np.sort(ranked[:width]) for width in widths]
    return tuple(
        TrimmedExpert(kept, down if len(kept) == n_ff else fit_down(down, covariance, kept)) for kept in neurons
    )


def fit_down(down: Single, covariance: Double, kept: Int) -> Single:
    """The matrix [n_embd, n_kept] that gives the output of `down` from the kept neurons with the least squared error.

    A small ridge draws it towards the kept columns of `down`, so that it never fits worse than those, and keeps them
    where the covariance determines nothing.
    """
    weights = down.astype(np.float64)
    factor, ridge = _factor(covariance[np.ix_(kept, kept)], _ridge(covariance, _FIT_RIDGE))
    wanted = covariance[kept] @ weights.T + ridge * weights[:, kept].T
    fitted: Double = scipy.linalg.cho_solve(factor, wanted).T
    return fitted.astype(np.float32)


def ridge_leverage(covariance: Double) -> Double:
    """The ridge leverage [n_ff] of each neuron, which is greatest where the other neurons predict it least.

    It is the diagonal of C (C + r I)^-1, where r is a hundredth of the mean of C's diagonal.
    """
    ridge = _ridge(covariance, _LEVERAGE_RIDGE)
    factor, ridge = _factor(covariance, ridge)
    inverse_diagonal = np.diag(scipy.linalg.cho_solve(factor, np.eye(len(covariance)), overwrite_b=True))
    leverage: Double = 1.0 - ridge * inverse_diagonal
    return leverage


def _ridge(covariance: Double, part: float) -> float:
    return part * float(np.trace(covariance)) / len(covariance) or 1.0  # 1.0: an expert that no token selected


def _factor(covariance: Double, ridge: float) -> tuple[tuple[Double, bool], float]:
    """The Cholesky factor of C + r I, and r.

    Covariances of fewer tokens than neurons are singular, and products in float32 may round below that: r then grows.
    """
    while True:
        inner = covariance.copy()
        inner[np.diag_indices_from(inner)] += ridge
        try:
            return scipy.linalg.cho_factor(inner, lower=True, overwrite_a=True), ridge
        except np.linalg.LinAlgError:
            ridge *= 10


def _by_leverage(down: Double, covariance: Double, n_least: int, n_pool: int) -> Int:
    return np.argsort(-ridge_leverage(covariance), kind="stable")


def _by_elimination(down: Double, covariance: Double, n_least: int, n_pool: int) -> Int:
    """All neurons, ranked so that the first to remove is the last; the first `n_least` are in no order.

    Removing neuron i costs |w_i|^2 / V_ii, with V the inverse covariance and w the matrix fitted to those left.
    """
    left, gone = np.arange(len(covariance)), []
    factor, _ = _factor(covariance, _ridge(covariance, _FIT_RIDGE))
    inverse, weights = scipy.linalg.cho_solve(factor, np.eye(len(covariance)), overwrite_b=True), down
    while len(left) > n_least:
        n_pool = min(n_pool, len(left))
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
    """The columns to remove, in that order; the cost of each is that after the fit without those before it."""
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


SELECTIONS: Mapping[str, Callable[[Double, Double, int, int], Int]] = {
    "elimination": _by_elimination,
    "leverage": _by_leverage,
}
"""Functions of (down, covariance, the least of the widths, `n_pool`) that rank neurons, those to keep first."""
