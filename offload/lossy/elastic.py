"""Elastic files: of every expert the one copy that stays in memory, chosen for a budget when a model is opened.

Nothing is read from disk while such a model runs, and what it answers depends on the mix alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from slimoe.offload.cache.host_pool import slot_bytes
from slimoe.offload.cache.residency import Key
from slimoe.offload.cache.slots import LowSlots
from slimoe.offload.errors import DoesNotFitError
from slimoe.offload.lossy.copy_choice import Copies, choose_copies
from slimoe.offload.lossy.decision import Choice, Decision, Memory, unchanged
from slimoe.offload.lossy.loss import LossTable
from slimoe.offload.model.experts import ExpertCopy, ExpertLayer
from slimoe.offload.resources.memory import human

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

    def ahead(self, key: Key, table: LossTable, memory: Memory) -> int:
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
