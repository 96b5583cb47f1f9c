"""Turns an allowed KL divergence, in nats per token, into the loosest threshold of a mode that should keep to it.

Of an expert's weights only the mean square is known, so that the losses expected here are upper bounds: what a mode
lets pass is bounded for each selected expert, and what an expert can cost in all is known.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from slimoe.offload.cache.residency import Key
from slimoe.offload.cache.slots import LowSlots
from slimoe.offload.lossy.loss import Floats, LossTable
from slimoe.offload.lossy.rules import NEVER
from slimoe.offload.model.experts import ExpertLayer

_HALVINGS = 60
_BELOW = 1 - 1e-9
"""So far below the mean square of an expert's weights rounding does not count."""


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


def low_weights_within(
    limit: float, layers: Sequence[ExpertLayer | None], tables: Sequence[LossTable | None]
) -> dict[int, Floats]:
    """The highest weights of `rules.LowWeights` that keep to `limit`, at one price of a byte for all experts.

    A low-bit copy answers where it loses less than the bytes that it saves would have cost at that price, so that an
    expert's selections lose at most that, and always where that is more than all of its selections lose.
    """
    losing = [one for one in _experts(layers, tables) if one.saved_bytes]
    low_losses, saved_bytes = (np.array([getattr(one, name) for one in losing]) for name in ("low_loss", "saved_bytes"))

    def loss(price: float) -> float:
        return float(np.minimum(low_losses, price * saved_bytes).sum())

    price = _largest(loss, limit, float((low_losses / saved_bytes).max(initial=0.0)))
    return {index: _low_weights(price, layer, table) for index, layer, table in _known(layers, tables)}


def slots_of_low_weights(
    weights: Mapping[int, Floats], layers: Sequence[ExpertLayer | None], tables: Sequence[LossTable | None]
) -> LowSlots:
    """Whether the last copies come first in memory, since most selections use them, or the best ones."""
    experts = list(_experts(layers, tables))
    low = sum(one.read_bytes for one in experts if weights[one.key[0]][one.key[1]] ** 2 > one.weight_square)
    return "first" if 2 * low > sum(one.read_bytes for one in experts) else "last"


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

    `saved_bytes` are those of its best copy beyond those of its last one.
    """

    key: Key
    low_loss: float
    read_bytes: float
    saved_bytes: float
    weight_square: float


def _known(
    layers: Sequence[ExpertLayer | None], tables: Sequence[LossTable | None]
) -> Iterator[tuple[int, ExpertLayer, LossTable]]:
    """Yields the layers that have experts."""
    for index, (layer, table) in enumerate(zip(layers, tables, strict=True)):
        if layer is not None and table is not None:
            yield index, layer, table


def _experts(layers: Sequence[ExpertLayer | None], tables: Sequence[LossTable | None]) -> Iterator[_Expert]:
    for index, layer, table in _known(layers, tables):
        for expert, copies in enumerate(layer.experts):
            use, square = float(table.use[expert]), float(table.weight_square[expert])
            if use * square:
                low_loss = float(table.low[expert]) * use * square
                n_bytes = copies[0].n_bytes
                saved = use * (n_bytes - copies[-1].n_bytes)
                yield _Expert((index, expert), low_loss, use * n_bytes, saved, square)


def _low_weights(price: float, layer: ExpertLayer, table: LossTable) -> Floats:
    """The weights [n_stored + 1] up to which low-bit copies lose no more than the bytes that they save are worth.

    They are infinite where even the mean square of an expert's weights loses no more.
    """
    saved = np.array([*(copies[0].n_bytes - copies[-1].n_bytes for copies in layer.experts), 0], np.float64)
    squares = np.divide(price * saved, table.low, out=np.full(saved.size, np.inf), where=table.low > 0)
    squares[squares >= _BELOW * table.weight_square] = np.inf
    return np.where(saved > 0, np.sqrt(squares), 0.0)


def _largest(loss: Callable[[float], float], limit: float, most: float) -> float:
    """The largest value up to `most` at which a growing function stays within a limit."""
    if loss(most) <= limit:
        return most
    low, high = 0.0, most
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if loss(middle) <= limit else (low, middle)
    return low
