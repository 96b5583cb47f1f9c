"""Elastic files: of every expert the one copy that stays in memory, chosen for a budget when a model is opened.

Nothing is read from disk while such a model runs, and what it answers depends on the mix alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntFlag

import numpy as np
from numpy.typing import NDArray

from slimoe.offload.cache.host_pool import slot_bytes
from slimoe.offload.cache.residency import Key
from slimoe.offload.cache.slots import LowSlots
from slimoe.offload.errors import DoesNotFitError
from slimoe.offload.lossy.decision import Choice, Decision, Memory, unchanged
from slimoe.offload.lossy.loss import LossTable
from slimoe.offload.model.experts import ExpertCopy, ExpertLayer
from slimoe.offload.resources.memory import human


class Copies(IntFlag):
    """The copies of an expert that are in memory."""

    NONE = 0
    LOW = 1
    HIGH = 2


def choose_copies(
    values: NDArray[np.float64],
    high_bytes: NDArray[np.int64],
    low_bytes: NDArray[np.int64],
    low_error: NDArray[np.float64] | None,
    budget: int,
) -> NDArray[np.uint8]:
    """`Copies` of each expert, in an array of the same shape as all others, so that they take at most `budget` bytes.

    `values` are expected picks per token, `low_error` the KL (nats per token) that the low copy adds when every pick of
    the expert takes it; None means in proportion to `values`.

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
        gets_high = _fill(error, high - low, budget - int(low.sum()))
        chosen[gets_high] = Copies.HIGH
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


Layers = Sequence[ExpertLayer | None]

_STEPS = 32
"""Mixes that a budget is rounded down to: what a process takes differs by some megabytes from run to run."""


@dataclass(frozen=True, slots=True)
class Elastic:
    """Every pick uses the copy that was chosen for its expert.

    `share` is the part of the room between all experts in their last copies and all in their best ones; None: as much
    as there is.
    """

    share: float | None = None
    low_slots: LowSlots = "none"
    invests = False

    @property
    def is_steady(self) -> bool:
        """A mix that was asked for is the same whatever a device has room for."""
        return self.share is not None and self.share < 1

    def mix(self, layers: Layers, room: int, required: int, priors: NDArray[np.float64] | None, what: str) -> "Mix":
        """The mix for `room` bytes of slots, `required` being what everything else takes.

        Raises DoesNotFitError when not even the last copies fit, or the mix that was asked for does not.
        """
        most = share_within(layers, room, required, what)
        if self.share is not None and self.share > most:
            needed = required + _mix_bytes(layers, self.share)
            raise DoesNotFitError(
                f"{what} with --lossy elastic:{self.share:g} needs {human(needed)} of memory, but the budget is "
                f"{human(required + room)}.",
                required_bytes=needed,
                available_bytes=required + room,
                hint=f"Or use --lossy elastic:{most:g}.",
            )
        return mix_copies(layers, most if self.share is None else self.share, priors)

    def choose(self, choice: Choice, memory: Memory) -> Decision:
        """The only copy there is."""
        return unchanged(choice)

    def prefetch_copy(self, key: Key, table: LossTable, memory: Memory) -> int:
        """The only one as well."""
        return 0


@dataclass(frozen=True, slots=True, eq=False)
class Mix:
    """Layers whose experts have one copy each; `lowered` [n_stored] by layer says where that is not the best."""

    layers: tuple[ExpertLayer | None, ...]
    lowered: dict[int, NDArray[np.bool_]]
    share: float

    @property
    def n_experts(self) -> int:
        """All of them."""
        return sum(mask.size for mask in self.lowered.values())

    @property
    def n_lowered(self) -> int:
        """Experts that are not in their best copy."""
        return sum(int(mask.sum()) for mask in self.lowered.values())


def share_within(layers: Layers, room: int, required: int, what: str) -> float:
    """The share for `room` bytes of slots, 1 where the best copies all fit.

    `required` is what everything else takes. Raises DoesNotFitError when not even the last copies fit.
    """
    least, most = (_slots_bytes(layers, copy) for copy in (-1, 0))
    if least > room:
        needed = required + least
        raise DoesNotFitError(
            f"{what} needs at least {human(needed)} of memory with every expert in its smallest copy "
            f"({human(least)}), but the budget is {human(required + room)}.",
            required_bytes=needed,
            available_bytes=required + room,
            hint="Or choose another --lossy mode, which reads what is missing from the disk.",
        )
    return 1.0 if most <= room else (room - least) * _STEPS // (most - least) / _STEPS


def mix_copies(layers: Layers, share: float, priors: NDArray[np.float64] | None) -> Mix:
    """Chooses each expert's copy, most expected loss saved per byte first.

    `priors` [n_layer, n_expert] are expected picks per token, None if all are alike.
    """
    experts = [
        (index, number)
        for index, layer in enumerate(layers)
        if layer is not None
        for number in range(len(layer.experts))
    ]
    copies = [_layer(layers, index).experts[number] for index, number in experts]
    high, low = (np.array([slot_bytes(one[copy].slot_class) for one in copies], np.int64) for copy in (0, -1))
    values = np.array([1.0 if priors is None else priors[key] for key in experts], np.float64)
    errors = [_layer(layers, index).low_error for index in dict.fromkeys(index for index, _ in experts)]
    known = None if any(one is None for one in errors) else np.concatenate([np.array(one) for one in errors])
    chosen = choose_copies(values, high, low, known, _mix_bytes(layers, share))
    assert (chosen != Copies.NONE).all()
    is_lowered = (chosen == Copies.LOW) & (high > low)
    kept = [(one[-1 if lowered else 0],) for one, lowered in zip(copies, is_lowered, strict=True)]
    return _mix(layers, kept, is_lowered, share)


def _mix(layers: Layers, kept: list[tuple[ExpertCopy]], is_lowered: NDArray[np.bool_], share: float) -> Mix:
    mixed: list[ExpertLayer | None] = []
    lowered, begin = {}, 0
    for index, layer in enumerate(layers):
        if layer is None:
            mixed.append(None)
            continue
        end = begin + len(layer.experts)
        mixed.append(replace(layer, experts=tuple(kept[begin:end])))
        lowered[index] = is_lowered[begin:end]
        begin = end
    return Mix(tuple(mixed), lowered, share)


def _layer(layers: Layers, index: int) -> ExpertLayer:
    layer = layers[index]
    assert layer is not None
    return layer


def _mix_bytes(layers: Layers, share: float) -> int:
    least, most = (_slots_bytes(layers, copy) for copy in (-1, 0))
    return least + int(share * (most - least))


def _slots_bytes(layers: Layers, copy: int) -> int:
    return sum(slot_bytes(one[copy].slot_class) for layer in layers if layer is not None for one in layer.experts)
