"""Turns an allowed KL divergence, in nats per token, into the loosest threshold of a mode that should keep to it.

Of an expert's weights only the mean square is known, so that the losses expected here are upper bounds: what a mode
lets pass is bounded for each selected expert, and what an expert can cost in all is known.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from slimoe.offload.cache.residency import Key
from slimoe.offload.cache.slots import LowSlots
from slimoe.offload.lossy.loss import LossTable
from slimoe.offload.lossy.rules import NEVER
from slimoe.offload.model.experts import ExpertLayer

_HALVINGS = 60


def price_within(
    limit: float, layers: Sequence[ExpertLayer | None], tables: Sequence[LossTable | None], resident: Collection[Key]
) -> float:
    """The highest price of reading a byte, in nats, with which `rules.Rule` keeps to `limit`; 0 for a limit of 0.

    A selected expert loses at most what reading it would have cost at that price, and all selections of an expert
    together at most what its low-bit copy costs; `resident` experts lose nothing.
    """
    missing = [one for one in _experts(layers, tables) if one.key not in resident]

    low_losses = np.array([one.low_loss for one in missing])
    read_bytes = np.array([one.read_bytes for one in missing])

    def loss(price: float) -> float:
        return float(np.minimum(low_losses, price * read_bytes).sum())

    is_bounded = np.isfinite(low_losses)
    has_bytes = is_bounded & (read_bytes > 0)
    unbounded = float(read_bytes[~is_bounded].sum())
    bounded = float((low_losses[has_bytes] / read_bytes[has_bytes]).max(initial=0.0))
    most = max(limit / unbounded if unbounded else 0.0, bounded)
    return NEVER if not unbounded and loss(most) <= limit else _largest(loss, limit, most)


def gate_within(limit: float, layers: Sequence[ExpertLayer | None], tables: Sequence[LossTable | None]) -> float:
    """The lowest `high` of `rules.Gate` that keeps to `limit`, without skipping.

    An expert behind others that have more than `high` of a token's weights has less than 1 - `high` of them, and they
    sum up to the layer's `most_weight` at most.
    """
    losing = [one for one in _experts(layers, tables) if one.has_low]

    low_losses = np.array([one.low_loss for one in losing])
    most_squares = np.array([one.most_weight**2 / one.weight_square for one in losing])

    def loss(rest: float) -> float:
        return float((low_losses * np.minimum(1.0, rest**2 * most_squares)).sum())

    return 1.0 - _largest(loss, limit, 1.0)


def low_slots_at(price: float, layers: Sequence[ExpertLayer | None], tables: Sequence[LossTable | None]) -> LowSlots:
    """Whether, at a price per byte, most selections that miss the best copy would use the last one, or else read it.

    In the first case the last copies come first in memory.
    """
    experts = list(_experts(layers, tables))
    low = sum(one.read_bytes for one in experts if one.low_loss <= price * one.read_bytes)
    return "first" if 2 * low >= sum(one.read_bytes for one in experts) else "last"


def lowered_loss(tables: Sequence[LossTable | None]) -> float:
    """The KL divergence, in nats per token, expected of the best copies that are left out of memory for good."""
    return sum(
        float((table.low * table.use * table.weight_square)[table.is_lowered].sum())
        for table in tables
        if table is not None
    )


@dataclass(frozen=True, slots=True)
class _Expert:
    """An expert: what it loses if it is always in its last copy, and the bytes if it is always read, per token.

    `most_weight` is the most that a token's expert weights sum up to.
    """

    key: Key
    has_low: bool
    low_loss: float
    read_bytes: float
    weight_square: float
    most_weight: float


def _experts(layers: Sequence[ExpertLayer | None], tables: Sequence[LossTable | None]) -> Iterator[_Expert]:
    for index, (layer, table) in enumerate(zip(layers, tables, strict=True)):
        if layer is None or table is None:
            continue
        for expert, copies in enumerate(layer.experts):
            use, square = float(table.use[expert]), float(table.weight_square[expert])
            if use * square:
                low_loss = float(table.low[expert]) * use * square
                yield _Expert(
                    (index, expert), len(copies) > 1, low_loss, use * copies[0].n_bytes, square, layer.most_weight
                )


def _largest(loss: Callable[[float], float], limit: float, most: float) -> float:
    """The largest value up to `most` at which a growing function stays within a limit."""
    if loss(most) <= limit:
        return most
    low, high = 0.0, most
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if loss(middle) <= limit else (low, middle)
    return low
