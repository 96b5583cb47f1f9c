"""The elastic mode: one copy of every expert stays in memory, chosen for a budget when the model is opened.

Nothing is read from disk while such a model runs, and its answers depend on the mix of copies alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntFlag

import numpy as np
from numpy.typing import NDArray

from slimoe.offload.cache.host_slots import slot_bytes
from slimoe.offload.cache.residency import Key
from slimoe.offload.cache.slots import LowSlots
from slimoe.offload.errors import DoesNotFitError
from slimoe.offload.lossy.decision import Choice, Decision, Memory, unchanged
from slimoe.offload.lossy.loss import LossTable
from slimoe.offload.model.experts import ExpertLayer
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
    """Chooses each expert's `Copies` so that they take at most `budget` bytes; all arrays have one shape.

    `values` are how often a token is expected to select each expert; `low_error` is the KL divergence, in nats per
    token, that the low-bit copy adds when it always stands for its expert, None for in proportion to `values`.

    First every expert gets its low-bit copy, since an expert that is in no memory makes the answer wait; if not even
    these fit, the experts that are selected most per byte get one, and no high copy is kept. Then high copies are
    given, the most error saved per byte first. That is the fractional knapsack's order, so that what is saved falls
    short of the best possible by less than one expert's error.
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
"""A budget is rounded down to a 32nd: what a process takes differs by some megabytes from run to run."""


@dataclass(frozen=True, slots=True)
class Elastic:
    """Uses, for every selected expert, the one copy that was chosen when the model was opened.

    `share` is the part that is used of the room between all experts in their last copies and all in their best ones;
    None uses as much as there is.
    """

    share: float | None = None
    low_slots: LowSlots = "none"
    invests = False

    @property
    def is_steady(self) -> bool:
        """Whether the mix is given by `share`, and so is the same whatever a device has room for."""
        return self.share is not None and self.share < 1

    def mix(self, layers: Layers, room: int, required: int, priors: NDArray[np.float64] | None, what: str) -> "Mix":
        """The mix for `room` bytes of slots, when everything else takes `required` bytes; `what` names the model.

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
        """Returns the exact decision: each expert has only one copy."""
        return unchanged(choice)

    def prefetch_copy(self, key: Key, table: LossTable, memory: Memory) -> int:
        """Returns the only copy."""
        return 0


@dataclass(frozen=True, slots=True, eq=False)
class Mix:
    """Layers whose experts have one copy each; `lowered` [n_stored], by layer, is true where it is not the best one."""

    layers: tuple[ExpertLayer | None, ...]
    lowered: dict[int, NDArray[np.bool_]]
    share: float

    @property
    def n_experts(self) -> int:
        """The number of all experts."""
        return sum(mask.size for mask in self.lowered.values())

    @property
    def n_lowered(self) -> int:
        """The number of experts that are not in their best copy."""
        return sum(int(mask.sum()) for mask in self.lowered.values())


def share_within(layers: Layers, room: int, required: int, what: str) -> float:
    """The largest `Elastic.share` for `room` bytes of slots, 1 where the best copies all fit.

    Everything else takes `required` bytes; `what` names the model. Raises DoesNotFitError when not even the last copies
    fit.
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
    """Chooses each expert's copy for a `share` as in `Elastic`, the most expected loss saved per byte first.

    `priors` [n_layer, n_expert] say how often a token is expected to select each expert, None if all are alike.
    """
    routed = {index: layer for index, layer in enumerate(layers) if layer is not None}
    keys = [(index, number) for index, layer in routed.items() for number in range(len(layer.experts))]
    copies = [routed[index].experts[number] for index, number in keys]
    high, low = (np.array([slot_bytes(one[copy].slot_class) for one in copies], np.int64) for copy in (0, -1))
    values = np.array([1.0 if priors is None else priors[key] for key in keys], np.float64)
    errors = [layer.low_error for layer in routed.values() if layer.experts]
    known = None if any(one is None for one in errors) else np.concatenate([np.array(one) for one in errors])
    chosen = choose_copies(values, high, low, known, _mix_bytes(layers, share))
    assert (chosen != Copies.NONE).all()
    is_lowered = (chosen == Copies.LOW) & (high > low)
    mixed, lowered, begin = list(layers), {}, 0
    for index, layer in routed.items():
        end = begin + len(layer.experts)
        lowered[index] = is_lowered[begin:end]
        kept = [(one[-1 if is_low else 0],) for one, is_low in zip(layer.experts, lowered[index], strict=True)]
        mixed[index] = replace(layer, experts=tuple(kept))
        begin = end
    return Mix(tuple(mixed), lowered, share)


def _mix_bytes(layers: Layers, share: float) -> int:
    least, most = (_slots_bytes(layers, copy) for copy in (-1, 0))
    return least + int(share * (most - least))


def _slots_bytes(layers: Layers, copy: int) -> int:
    return sum(slot_bytes(one[copy].slot_class) for layer in layers if layer is not None for one in layer.experts)
