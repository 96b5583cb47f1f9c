"""Plans what devices hold: which layers, and how many of their experts."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from slimoe.offload.cache.device_pool import Bank, device_slot_bytes, n_passing
from slimoe.offload.cache.slots import divide_slots, slot_classes, widest
from slimoe.offload.cache.uploads import pinned_bytes
from slimoe.offload.errors import DeviceError, DoesNotFitError
from slimoe.offload.ggml.devices import Device
from slimoe.offload.memory.kv_cache import KVSize
from slimoe.offload.model.experts import ExpertLayer, SlotClass
from slimoe.offload.model.regrouped import join_layers, without_experts
from slimoe.offload.model.spec import ModelSpec
from slimoe.offload.model.tensors import ModelSources
from slimoe.offload.plan.device_steps import StepNeeds, not_computed
from slimoe.offload.plan.device_support import is_layer_computed, most_stacked
from slimoe.offload.plan.weight_forms import compute_bytes, matrix_bytes
from slimoe.offload.resources.memory import human

_GRAPH_BYTES = 8 << 20
"""A device's copies of graphs and the like."""


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """Bytes on one device, within `budget`, for the consecutive `layers` that are computed there.

    With `is_whole` the device has all experts of its layers, and its graphs are not cut at routers. Otherwise `banks`
    has its slots; there are none for the classes that are `left_to_host`, since the device does not compute them.
    `mtp` are the bytes of the block that drafts tokens, which the last device computes.
    """

    device: Device
    budget: int
    layers: tuple[int, ...]
    is_whole: bool
    weights: int
    kv: int
    compute: int
    banks: tuple[Bank, ...] = ()
    left_to_host: tuple[SlotClass, ...] = ()
    mtp: int = 0

    @property
    def note(self) -> str:
        """What there is to say about experts that the device does not compute, empty if it computes all."""
        if not self.left_to_host:
            return ""
        types = sorted({kind.name for slot_class in self.left_to_host for kind, _ in slot_class})
        return (
            f"{self.device.name} ({self.device.description}) does not multiply with experts of {', '.join(types)} as "
            "this model needs it: the CPU computes them."
        )

    @property
    def slots(self) -> int:
        """Bytes of all slots."""
        return sum(bank.n_slots * device_slot_bytes(bank.slot_class) for bank in self.banks)

    @property
    def n_own(self) -> Mapping[SlotClass, int]:
        """The slots of each class for experts that stay there."""
        slots: Counter[SlotClass] = Counter()
        for bank in self.banks:
            slots[bank.slot_class] += bank.n_slots - bank.n_passing
        return slots

    @property
    def pinned(self) -> int:
        """Bytes of host memory that experts pass through on their way to the device."""
        return pinned_bytes(self.device, (bank.slot_class for bank in self.banks))

    @property
    def required(self) -> int:
        """Bytes of everything on the device."""
        return self.weights + self.kv + self.compute + self.slots + self.mtp

    @property
    def awaited(self) -> int:
        """Host memory that its driver will take beyond what is resident once its weights are loaded.

        Less what lies there but is the device's own, which may be more.
        """
        driver = self.device.driver
        return driver.kernels - (self.weights + self.kv if driver.is_device_resident else 0)


@dataclass(frozen=True, slots=True)
class DeviceNeeds:
    """A model and how it is run, as far as plans for devices need to know.

    A step has at most `n_batch` tokens, and makes at most `n_rows` rows of logits. With `may_be_whole` a device that
    has room for all experts of its layers computes them in graphs that are not cut. `mtp` are the bytes of the block
    that drafts tokens, for the last device.
    """

    spec: ModelSpec
    sources: ModelSources
    experts: tuple[ExpertLayer | None, ...]
    kv: KVSize
    n_batch: int
    n_rows: int = 1
    may_be_whole: bool = True
    mtp: int = 0

    def lacking(self, device: Device) -> str:
        """What a device lacks for all but the experts, for a person; empty if it lacks nothing."""
        step = StepNeeds(self.kv, self.n_batch, self.n_rows)
        return not_computed(device, self.spec, self.sources, step)


Budgeted = Sequence[tuple[Device, int]]
"""Devices, each with its budget in bytes."""


def plan_those_that_fit(needs: DeviceNeeds, devices: Budgeted) -> tuple[tuple[DevicePlan, ...], tuple[str, ...]]:
    """Plans for the devices whose budgets suffice, and notes about those that were left out, the smallest first.

    Also left out are those that do not compute something of the model beside its experts.
    """
    left, notes = list[tuple[Device, int]](), list[str]()
    for device, budget in devices:
        if lack := needs.lacking(device):
            notes.append(f"Without {device.name}: {lack}")
        elif budget <= 0:
            notes.append(f"Without {device.name}: it says that none of its memory is free.")
        else:
            left.append((device, budget))
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

    Raises DoesNotFitError for a budget that does not even hold what a device needs without experts of its own, and
    DeviceError for a device that does not compute something of the model beside its experts.
    """
    for device, _ in devices:
        if lack := needs.lacking(device):
            raise DeviceError(f"{lack} Use --device none or another device, or a file of other types.")
    # Where nothing is free anywhere the first one says what it would need.
    used = [(device, budget) for device, budget in devices if budget > 0] or [*devices[:1]]
    plans, begin = [], 0
    total = sum(budget for _, budget in used) or 1
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
    kv = needs.kv.n_bytes(spec, layers)
    n_rows = needs.n_rows if is_last else 0
    weights, compute = _weights(needs.sources, layers, is_last), _compute(needs, n_rows, is_whole=True)
    plan = DevicePlan(device, budget, layers, True, weights, kv, compute, mtp=needs.mtp if is_last else 0)
    every = slot_classes(needs.experts[layer] for layer in layers)
    passing = _passing(needs, layers)
    most = {kind: most_stacked(device, spec.architecture, kind, n + passing[kind]) for kind, n in every.items()}
    classes = {kind: n for kind, n in every.items() if most[kind] > passing[kind]}
    left = tuple(kind for kind in every if kind not in classes)
    own = [needs.sources.layers[layer] for layer in layers]
    may_be_whole = needs.may_be_whole and all(layer.is_stacked for layer in own) and not left
    may_be_whole = may_be_whole and all(
        is_layer_computed(device, spec.architecture, layer)
        for layer in join_layers(replace(needs.sources, layers=tuple(own))).layers
    )
    if (not every or may_be_whole) and plan.required <= budget:
        return plan
    if every:
        weights = _weights(without_experts(needs.sources), layers, is_last)
        compute = _compute(needs, n_rows, is_whole=False)
        plan = replace(plan, is_whole=False, weights=weights, compute=compute, left_to_host=left)
    least = {kind: passing[kind] + 1 for kind in classes}
    required = plan.required + sum(n * device_slot_bytes(kind) for kind, n in least.items())
    if required > budget:
        block = " and the block that drafts tokens" if plan.mtp else ""
        raise DoesNotFitError(
            f"{device.name} needs at least {human(required)} for its {len(layers)} layers{block}, but its budget is "
            f"{human(budget)}.",
            required_bytes=required,
            available_bytes=budget,
            device=device.name,
            hint="Or use --device none.",
        )
    wanted = {kind: n + passing[kind] for kind, n in classes.items()}
    slots = divide_slots(wanted, least, budget - plan.required, device_slot_bytes)
    return replace(plan, banks=tuple(_banks(needs, layers, slots, most)))


def _banks(
    needs: DeviceNeeds, layers: tuple[int, ...], slots: Mapping[SlotClass, int], most: Mapping[SlotClass, int]
) -> Iterator[Bank]:
    """Divides the slots of each class among as few banks as have no more slots than `most`, by consecutive layers."""
    counts = {layer: slot_classes([needs.experts[layer]]) for layer in layers}
    passing = _passing(needs, layers)
    for kind, n_slots in slots.items():
        users = [layer for layer in layers if counts[layer][kind]]
        n_banks = min(len(users), -(-n_slots // most[kind]))
        n_own, n_all = n_slots - n_banks * passing[kind], sum(counts[layer][kind] for layer in users)
        for number in range(n_banks):
            group = users[len(users) * number // n_banks : len(users) * (number + 1) // n_banks]
            share = max(1, n_own * sum(counts[layer][kind] for layer in group) // n_all)
            yield Bank(kind, tuple(group), min(share + passing[kind], most[kind]), passing[kind])


def _passing(needs: DeviceNeeds, layers: tuple[int, ...]) -> dict[SlotClass, int]:
    """Slots of each class for experts that are copied for one step."""
    most: Counter[SlotClass] = Counter()
    for layer in layers:
        most |= slot_classes([needs.experts[layer]])
    return {kind: n_passing(kind, n) for kind, n in most.items()}


def _weights(sources: ModelSources, layers: tuple[int, ...], is_last: bool) -> int:
    own = replace(sources, layers=tuple(sources.layers[layer] for layer in layers))
    every = matrix_bytes(own)
    return every if is_last else every - sources.output.weight.n_bytes


def _compute(needs: DeviceNeeds, n_rows: int, *, is_whole: bool) -> int:
    """Bytes of buffers on the device: for a graph of all layers or for segments, and what passes between them."""
    spec, n_batch = needs.spec, needs.n_batch
    d, d_expert, n_used = spec.n_embd, spec.n_embd_expert, max(1, spec.n_expert_used)
    n_masked = needs.kv.n_masked(spec)
    exchange = n_batch * (4 * (d + d_expert * (1 + n_used)) + 2 * n_masked + 8 * max(1, spec.n_expert) + 72)
    rows = 5 * d * n_batch
    if is_whole:
        return exchange + rows + compute_bytes(spec, n_masked, n_batch) + 4 * n_rows * spec.n_vocab + _GRAPH_BYTES
    n_attention = max(of.n_at_once for of in spec.attentions)
    n_around = 4 * spec.n_expert_aux * d_expert + 2 * spec.experts.n_latent
    segment = 4 * (n_batch * (6 * d + n_around + n_attention) + n_rows * spec.n_vocab)
    experts = 4 * n_batch * n_used * (3 * widest(needs.experts) + 4 * d_expert)
    return exchange + rows + segment + experts + _GRAPH_BYTES
