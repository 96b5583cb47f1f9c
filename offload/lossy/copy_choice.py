"""Chooses, for experts that are stored in a high and a low precision, which copies have a place in memory."""

from enum import IntFlag

import numpy as np
from numpy.typing import NDArray


class Copies(IntFlag):
    """The copies of an expert that are in memory."""

    NONE = 0
    LOW = 1
    HIGH = 2
    BOTH = 3


def choose_copies(
    values: NDArray[np.float64],
    high_bytes: NDArray[np.int64],
    low_bytes: NDArray[np.int64],
    low_error: NDArray[np.float64] | None,
    budget: int,
    keep_low: bool = False,
) -> NDArray[np.uint8]:
    """`Copies` of each expert, in an array of the same shape as all others, so that they take at most `budget` bytes.

    `values` are expected picks per token, `low_error` the KL (nats per token) that the low copy adds when every pick of
    the expert takes it; None means in proportion to `values`. With `keep_low` an expert keeps its low copy beside the
    high one, for picks too small to need better, or until the high one has been read again.

    First everything gets a low copy, since an expert that is in no memory makes the answer wait; if not even these fit,
    those that serve most picks per byte get one, and no high copy is kept. Then high copies are given, most error saved
    per byte first. That is the fractional knapsack's order, so what is saved falls short of the best possible by less
    than one expert's error: by what did not fit any more when the first one was passed over.
    """
    shape = values.shape
    value, high, low = values.ravel(), high_bytes.ravel(), low_bytes.ravel()
    error = value if low_error is None else low_error.ravel()
    chosen = np.full(value.size, Copies.NONE, np.uint8)
    has_low = _fill(value, low, budget)
    chosen[has_low] = Copies.LOW
    if has_low.all():
        gets_high = _fill(error, high if keep_low else high - low, budget - int(low.sum()))
        chosen[gets_high] = Copies.BOTH if keep_low else Copies.HIGH
    return chosen.reshape(shape)


def _fill(gains: NDArray[np.float64], n_bytes: NDArray[np.int64], room: int) -> NDArray[np.bool_]:
    """Takes items by gain per byte, passing over what does not fit; of equals the first. Free ones come first."""
    ratios = np.full(gains.size, np.inf)
    np.divide(gains, n_bytes, out=ratios, where=n_bytes > 0)
    taken = np.zeros(gains.size, np.bool_)
    for index in np.argsort(-ratios, kind="stable"):
        if n_bytes[index] <= room:
            taken[index] = True
            room -= int(n_bytes[index])
    return taken
