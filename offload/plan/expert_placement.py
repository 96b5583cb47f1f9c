"""Where a plan puts each expert at the start, and which share of the picks will find theirs there."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slimoe.offload.cache.residency import Key, most_valuable
from slimoe.offload.machine.cost_model import expected_uses
from slimoe.offload.model.experts import ExpertLayer, SlotClass
from slimoe.offload.plan.device_plan import N_PASSING, DevicePlan
from slimoe.offload.plan.engine_plan import EnginePlan


@dataclass(frozen=True, slots=True)
class ExpertPlacement:
    """Experts by place, and the expected share of picks that each place serves; all shares sum to 1.

    `on_devices` has one number for each device of the plan. A cache that follows the routing does better than
    `device_share` and `host_share`, which are for experts that stay where they are at the start. `is_cut`: whether
    steps stop at routers, because some layer's experts are in more than one place.
    """

    n_experts: int
    on_devices: tuple[int, ...]
    on_host: int
    device_share: float
    host_share: float
    is_cut: bool

    @property
    def on_disk(self) -> int:
        """Experts that are in no memory."""
        return self.n_experts - sum(self.on_devices) - self.on_host

    @property
    def disk_share(self) -> float:
        """The share of picks whose expert must be read first."""
        return max(0.0, 1.0 - self.device_share - self.host_share)


def expert_placement(plan: EnginePlan) -> ExpertPlacement:
    """What the engine will do with the experts when it opens the model as planned, without loading it."""
    uses = _uses(plan)
    keys = [(layer, expert) for layer, one in _routed(plan) for expert in range(len(one.experts))]
    best = most_valuable(uses, keys, len(keys))
    on_devices = [_device_keys(plan, device, best) for device in plan.devices]
    gone = {key for keys in on_devices for key in keys}
    left = [key for key in best if key not in gone]
    on_host = set(left) if plan.is_resident else _host_keys(plan, left)
    total = float(uses.sum()) or 1.0
    device_share = _sum(uses, gone) / total
    return ExpertPlacement(
        n_experts=len(keys),
        on_devices=tuple(len(keys) for keys in on_devices),
        on_host=len(on_host),
        device_share=device_share,
        # Without experts all there is to compute is on the processor that computes.
        host_share=_sum(uses, on_host) / total if keys else 1.0,
        is_cut=bool(keys) and not plan.is_resident and len(gone) < len(keys),
    )


def _routed(plan: EnginePlan) -> Iterator[tuple[int, ExpertLayer]]:
    return ((index, layer) for index, layer in enumerate(plan.layers) if layer is not None and layer.experts)


def _uses(plan: EnginePlan) -> NDArray[np.float64]:
    """Expected picks per token, [n_layer, most router rows]; rows of layers without experts are 0."""
    uses = np.zeros((len(plan.layers), max((len(layer.target) for _, layer in _routed(plan)), default=1)))
    for index, layer in _routed(plan):
        n_stored = len(layer.experts)
        weights = np.bincount([row for row in layer.target if row >= 0], minlength=n_stored).astype(np.float64)
        if plan.priors is not None and plan.priors[index].any():
            weights = plan.priors[index, :n_stored]
        n_used = min(layer.n_expert_used, n_stored)
        uses[index, :n_stored] = expected_uses(weights[None], 1, n_stored, n_used)[0]
    return uses


def _sum(uses: NDArray[np.float64], keys: Collection[Key]) -> float:
    return float(sum(uses[key] for key in keys))


def _device_keys(plan: EnginePlan, device: DevicePlan, best: Sequence[Key]) -> set[Key]:
    own = [key for key in best if key[0] in device.layers]
    if device.is_whole:
        return set(own)
    return _fill(plan, own, {kind: n - N_PASSING for kind, n in device.n_slots})


def _host_keys(plan: EnginePlan, best: Sequence[Key]) -> set[Key]:
    """Experts that are multiplied without a read; a mode that keeps low copies first does not wait for better ones."""
    if plan.tiers is None:
        return set()
    room = dict(plan.tiers.n_slots)
    keys = _fill(plan, best, room)
    return keys | _fill(plan, best, room, copy=-1) if plan.tiers.low == "first" else keys


def _fill(plan: EnginePlan, best: Sequence[Key], room: dict[SlotClass, int], copy: int = 0) -> set[Key]:
    """The best ones that find a slot of their copy's class; these slots are then taken from `room`."""
    keys = set()
    for key in best:
        layer = plan.layers[key[0]]
        assert layer is not None
        kind = layer.experts[key[1]][copy].slot_class
        if room.get(kind, 0) > 0:
            room[kind] -= 1
            keys.add(key)
    return keys
