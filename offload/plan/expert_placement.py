"""Where a plan puts each expert at the start, and how many of the selected experts will be found there."""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slimoe.offload.cache.residency import Key, most_valuable
from slimoe.offload.machine.cost_model import expected_uses
from slimoe.offload.model.experts import ExpertLayer, SlotClass
from slimoe.offload.plan.engine_plan import EnginePlan

_LEAST_POWER, _EIGHT_EXPERTS, _DOUBLING = 1.5, 0.3, 0.28
"""How much better a cache that follows the text does than one that stays as it is.

If all experts were used alike, a part s of the selected ones would be in no memory; s to a power is missed. Replays
gave 1.5 to 2.0 for 8 experts in a layer and 1.8 to 2.5 for 128, more where little is in memory (bench/RESULTS.md,
"Expected hits"): 1.5, and s times 0.3, and 0.28 more whenever the experts double. With uses in the file, from text of
many kinds, s is what they say, and a text of one kind is followed with a power of 1.2 to 1.8: 1.5, whatever s.
"""


@dataclass(frozen=True, slots=True)
class ExpertPlacement:
    """Numbers of experts by place, and the share of the selected experts that each place is expected to serve.

    `on_devices` has one number for each device of the plan. `device_share` and `host_share` are for experts that stay
    where they are at the start, as a prompt that needs them all finds them. `is_cut` says whether steps stop at
    routers, because some layer's experts are in more than one place. `by_layer` are the `device_share`s of each layer
    with experts, none without devices. An answer finds less than `host_share` where experts that are only predicted
    take slots, `passing_share` of all uses, and more where the cache follows the text: it misses a power of what one
    would miss that stays as it is, see `following_power`, with `n_expert` in a layer, None where the file tells uses.
    """

    n_experts: int
    on_devices: tuple[int, ...]
    on_host: int
    device_share: float
    host_share: float
    is_cut: bool
    by_layer: tuple[float, ...] = ()
    passing_share: float = 0.0
    n_expert: float | None = None

    @property
    def on_disk(self) -> int:
        """Experts that are in no memory."""
        return self.n_experts - sum(self.on_devices) - self.on_host

    @property
    def disk_share(self) -> float:
        """The share of the selected experts that must be read first."""
        return max(0.0, 1.0 - self.device_share - self.host_share)

    @property
    def missed_share(self) -> float:
        """The share of an answer's selected experts that a host expert cache which follows the text has not got."""
        left, absent = 1.0 - self.device_share, self.disk_share + self.passing_share
        if not left or not self.disk_share:
            return 0.0
        share = min(1.0, absent / left)
        power = _LEAST_POWER if self.n_expert is None else following_power(share, self.n_expert)
        return left * float(share**power)

    @property
    def found_share(self) -> float:
        """The share of an answer's selected experts that the host expert cache has."""
        return self.host_share + self.disk_share - self.missed_share


def expert_placement(plan: EnginePlan) -> ExpertPlacement:
    """Where the engine will put the experts when it opens the model as planned, without loading it."""
    uses = _uses(plan)
    keys = [(layer, expert) for layer, one in _routed(plan) for expert in range(len(one.experts))]
    best = most_valuable(uses, keys, len(keys))
    on_devices = []
    for device in plan.devices:
        own = [key for key in best if key[0] in device.layers]
        free = dict(device.n_own)
        on_devices.append(set(own) if device.is_whole else _fill(plan, own, free))
    gone = {key for own in on_devices for key in own}
    left = [key for key in best if key not in gone]
    on_host, passing = set(left) if plan.is_resident else set(), set[Key]()
    if plan.tiers is not None:
        room = dict(plan.tiers.n_slots)
        on_host = _fill(plan, left, room)
        if plan.tiers.low == "first":
            # A mode that keeps low-bit copies first does not wait for better ones.
            on_host |= _fill(plan, left, room, copy=-1)
        else:
            passing = on_host - _fill(plan, left, _lasting_slots(plan))
    total = float(uses.sum()) or 1.0
    device_share = _sum(uses, gone) / total
    return ExpertPlacement(
        n_experts=len(keys),
        on_devices=tuple(map(len, on_devices)),
        on_host=len(on_host),
        device_share=device_share,
        # Without experts all there is to compute is on the processor that computes.
        host_share=_sum(uses, on_host) / total if keys else 1.0,
        is_cut=bool(keys) and not plan.is_resident and len(gone) < len(keys),
        by_layer=_by_layer(plan, uses, gone) if plan.devices else (),
        passing_share=_sum(uses, passing) / total,
        n_expert=len(keys) / len([*_routed(plan)]) if plan.tiers is not None and plan.priors is None else None,
    )


def following_power(share: float, n_expert: float) -> float:
    """The power of a cache that knows nothing of uses but follows the text, where it would miss a `share` otherwise."""
    return _LEAST_POWER + share * (_EIGHT_EXPERTS + _DOUBLING * max(0.0, math.log2(n_expert / 8)))


def _lasting_slots(plan: EnginePlan) -> dict[SlotClass, int]:
    """Slots by class, without those in which experts of the next layers pass through that are read ahead of time."""
    assert plan.tiers is not None
    slots = dict(plan.tiers.n_slots)
    n_used = max((layer.n_expert_used for _, layer in _routed(plan)), default=0)
    part = min(1.0, plan.tiers.prefetch_depth * n_used / max(1, sum(slots.values())))
    return {kind: n - round(part * n) for kind, n in slots.items()}


def _by_layer(plan: EnginePlan, uses: NDArray[np.float64], keys: Collection[Key]) -> tuple[float, ...]:
    """The share of each layer's selected experts that `keys` serve."""
    is_there = np.zeros(uses.shape)
    for key in keys:
        is_there[key] = 1.0
    found = (uses * is_there).sum(axis=1) / np.maximum(uses.sum(axis=1), 1e-12)
    return tuple(float(found[layer]) for layer, _ in _routed(plan))


def _routed(plan: EnginePlan) -> Iterator[tuple[int, ExpertLayer]]:
    return ((index, layer) for index, layer in enumerate(plan.layers) if layer is not None and layer.experts)


def _uses(plan: EnginePlan) -> NDArray[np.float64]:
    """Probabilities that a token selects each expert, [n_layer, most router rows]; 0 in layers without experts."""
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


def _fill(plan: EnginePlan, best: Sequence[Key], room: dict[SlotClass, int], copy: int = 0) -> set[Key]:
    """The first of `best` that find a slot of their copy's class; these slots are taken from `room`."""
    keys = set()
    for key in best:
        layer = plan.layers[key[0]]
        assert layer is not None
        kind = layer.experts[key[1]][copy].slot_class
        if room.get(kind, 0) > 0:
            room[kind] -= 1
            keys.add(key)
    return keys
