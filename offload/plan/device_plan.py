"""Plans what devices hold: which layers, and how many of their experts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from gguf import GGMLQuantizationType

from slimoe.offload.cache.device_pool import device_slot_bytes
from slimoe.offload.cache.slots import divide_slots, slot_classes, widest
from slimoe.offload.errors import DoesNotFitError
from slimoe.offload.ggml.devices import Device
from slimoe.offload.graph.kv_cache import kv_bytes
from slimoe.offload.model.experts import ExpertLayer, SlotClass
from slimoe.offload.model.regrouped import without_experts
from slimoe.offload.model.spec import ModelSpec
from slimoe.offload.model.tensors import ModelSources
from slimoe.offload.plan.weight_forms import compute_bytes, matrix_bytes
from slimoe.offload.resources.memory import human

N_PASSING = 2
"""Slots of each class for experts that are copied for one step: one is filled while the other is multiplied."""
_GRAPH_BYTES = 8 << 20
"""A device's copies of graphs and the like."""


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """Bytes on one device, within `budget`, for the consecutive `layers` that are computed there.

    With `is_whole` the device has all experts of its layers, and its graphs are not cut at routers. Otherwise `n_slots`
    is the number of slots of each class, those for experts that pass through included.
    """

    device: Device
    budget: int
    layers: tuple[int, ...]
    is_whole: bool
    weights: int
    kv: int
    compute: int
    n_slots: tuple[tuple[SlotClass, int], ...] = ()

    @property
    def slots(self) -> int:
        """Bytes of all slots."""
        return sum(n * device_slot_bytes(kind) for kind, n in self.n_slots)

    @property
    def required(self) -> int:
        """Bytes of everything on the device."""
        return self.weights + self.kv + self.compute + self.slots


@dataclass(frozen=True, slots=True)
class DeviceNeeds:
    """A model and how it is run, as far as plans for devices need to know; `n_cells` and `n_batch` in tokens.

    A step makes at most `n_rows` rows of logits. With `may_be_whole` a device that has room for all experts of its
    layers computes them in graphs that are not cut.
    """

    spec: ModelSpec
    sources: ModelSources
    experts: tuple[ExpertLayer | None, ...]
    kv_type: GGMLQuantizationType
    n_cells: int
    n_batch: int
    n_rows: int = 1
    may_be_whole: bool = True


Budgeted = Sequence[tuple[Device, int]]
"""Devices, each with its budget in bytes."""


def plan_those_that_fit(needs: DeviceNeeds, devices: Budgeted) -> tuple[tuple[DevicePlan, ...], tuple[str, ...]]:
    """Plans for the devices whose budgets suffice, and notes about those that were left out, the smallest first."""
    left, notes = list(devices), list[str]()
    while left:
        try:
            return plan_devices(needs, left), tuple(notes)
        except DoesNotFitError as error:
            smallest = min(left, key=lambda one: one[1])
            left.remove(smallest)
            notes.append(f"{f'Without {smallest[0].name}' if left else 'Computing on the CPU'}: {error.problem}")
    return (), tuple(notes)


def plan_devices(needs: DeviceNeeds, devices: Budgeted) -> tuple[DevicePlan, ...]:
    """Plans for devices, each with its budget in bytes, in proportion to which they get layers.

    Raises DoesNotFitError for a budget that does not even hold what a device needs without experts of its own.
    """
    used = [(device, budget) for device, budget in devices if budget > 0]
    plans, begin = [], 0
    total = sum(budget for _, budget in used)
    taken = 0
    for index, (device, budget) in enumerate(used):
        taken += budget
        end = needs.spec.n_layer if index == len(used) - 1 else round(needs.spec.n_layer * taken / total)
        if end > begin:
            plans.append(_plan_device(needs, device, budget, tuple(range(begin, end))))
        begin = end
    return tuple(plans)


def _plan_device(needs: DeviceNeeds, device: Device, budget: int, layers: tuple[int, ...]) -> DevicePlan:
    spec = needs.spec
    is_last = layers[-1] == spec.n_layer - 1
    kv = kv_bytes(spec, needs.n_cells, needs.kv_type, layers)
    n_rows = needs.n_rows if is_last else 0
    weights, compute = _weights(needs.sources, layers, is_last), _compute(needs, n_rows, is_whole=True)
    plan = DevicePlan(device, budget, layers, True, weights, kv, compute)
    classes = slot_classes(needs.experts[layer] for layer in layers)
    is_stacked = needs.may_be_whole and all(needs.sources.layers[layer].is_stacked for layer in layers)
    if (is_stacked or not classes) and plan.required <= budget:
        return plan
    if classes:
        weights = _weights(without_experts(needs.sources), layers, is_last)
        plan = replace(plan, is_whole=False, weights=weights, compute=_compute(needs, n_rows, is_whole=False))
    least = dict.fromkeys(classes, N_PASSING + 1)
    required = plan.required + sum(n * device_slot_bytes(kind) for kind, n in least.items())
    if required > budget:
        raise DoesNotFitError(
            f"{device.name} needs at least {human(required)} for its {len(layers)} layers, but its budget is "
            f"{human(budget)}.",
            required_bytes=required,
            available_bytes=budget,
            device=device.name,
            hint="Or use --device none.",
        )
    most = {kind: n + N_PASSING for kind, n in classes.items()}
    slots = divide_slots(most, least, budget - plan.required, device_slot_bytes)
    return replace(plan, n_slots=tuple(slots.items()))


def _weights(sources: ModelSources, layers: tuple[int, ...], is_last: bool) -> int:
    own = replace(sources, layers=tuple(sources.layers[layer] for layer in layers))
    every = matrix_bytes(own)
    return every if is_last else every - sources.output.weight.n_bytes


def _compute(needs: DeviceNeeds, n_rows: int, *, is_whole: bool) -> int:
    """Bytes of buffers on the device: for a graph of all layers or for segments, and what passes between them."""
    spec, n_batch = needs.spec, needs.n_batch
    d, n_used = spec.n_embd, max(1, spec.n_expert_used)
    exchange = n_batch * (4 * d * (2 + n_used) + 2 * needs.n_cells + 8 * max(1, spec.n_expert) + 64)
    rows = 5 * d * n_batch
    if is_whole:
        return exchange + rows + compute_bytes(spec, needs.n_cells, n_batch) + 4 * n_rows * spec.n_vocab + _GRAPH_BYTES
    segment = 4 * (n_batch * (6 * d + spec.attention.n_at_once) + n_rows * spec.n_vocab)
    experts = 4 * n_batch * n_used * (3 * widest(needs.experts) + 4 * d)
    return exchange + rows + segment + experts + _GRAPH_BYTES
