"""Plans what devices hold: which layers, and how many of their experts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from gguf import GGMLQuantizationType

from slimoe.offload.cache.device_pool import device_slot_bytes
from slimoe.offload.cache.slots import divide_slots, slot_classes, widest
from slimoe.offload.errors import DoesNotFitError
from slimoe.offload.ggml import device as ggml_device
from slimoe.offload.ggml import ops as ggml
from slimoe.offload.ggml.devices import Device
from slimoe.offload.graph.expert_ffn import add_expert_ffn, layer_extras
from slimoe.offload.graph.kv_cache import kv_bytes
from slimoe.offload.model.architecture import Architecture
from slimoe.offload.model.experts import ExpertLayer, SlotClass
from slimoe.offload.model.regrouped import without_experts
from slimoe.offload.model.spec import ModelSpec
from slimoe.offload.model.tensors import ModelSources
from slimoe.offload.plan.weight_forms import compute_bytes, matrix_bytes
from slimoe.offload.resources.memory import human

N_PASSING = 2
"""Slots of each class for experts that are copied for one step: so many are computed in one graph."""
_N_NODES = 16
_GRAPH_BYTES = 8 << 20
"""A device's copies of graphs and the like."""


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """Bytes on one device, within `budget`, for the consecutive `layers` that are computed there.

    With `is_whole` the device has all experts of its layers, and its graphs are not cut at routers. Otherwise `n_slots`
    is the number of slots of each class, those for experts that pass through included; there are none for the classes
    that are `left_to_host`, since the device does not compute them.
    """

    device: Device
    budget: int
    layers: tuple[int, ...]
    is_whole: bool
    weights: int
    kv: int
    compute: int
    n_slots: tuple[tuple[SlotClass, int], ...] = ()
    left_to_host: tuple[SlotClass, ...] = ()

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
    every = slot_classes(needs.experts[layer] for layer in layers)
    classes = {kind: n for kind, n in every.items() if _computes(device, spec.architecture, kind)}
    left = tuple(kind for kind in every if kind not in classes)
    is_stacked = needs.may_be_whole and all(needs.sources.layers[layer].is_stacked for layer in layers)
    if (not every or (is_stacked and not left)) and plan.required <= budget:
        return plan
    if every:
        weights = _weights(without_experts(needs.sources), layers, is_last)
        compute = _compute(needs, n_rows, is_whole=False)
        plan = replace(plan, is_whole=False, weights=weights, compute=compute, left_to_host=left)
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


def _computes(device: Device, architecture: Architecture, slot_class: SlotClass) -> bool:
    """Whether a device computes experts of a class; an RPC device says so of all."""
    n_bytes = _N_NODES * ggml.ggml_tensor_overhead() + ggml.ggml_graph_overhead_custom(_N_NODES, False)
    ctx = ggml.ggml_init(ggml.InitParams(n_bytes, None, True))
    try:
        graph = ggml.ggml_new_graph_custom(ctx, _N_NODES, False)
        *gate_up, down = (ggml.ggml_new_tensor_3d(ctx, kind, ne[0], ne[1], 1) for kind, ne in slot_class)
        rows = ggml.ggml_new_tensor_3d(ctx, GGMLQuantizationType.F32, ggml.tensor_at(gate_up[0]).ne[0], 1, 1)
        ids = ggml.ggml_new_tensor_2d(ctx, GGMLQuantizationType.I32, 1, 1)
        outputs = add_expert_ffn(ctx, gate_up, down, rows, ids, layer_extras(ctx, architecture, None))
        ggml.ggml_build_forward_expand(graph, outputs)
        nodes = (ggml.ggml_graph_node(graph, index) for index in range(ggml.ggml_graph_n_nodes(graph)))
        return all(ggml_device.ggml_backend_dev_supports_op(device.handle, node) for node in nodes)
    finally:
        ggml.ggml_free(ctx)


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
    segment = 4 * (n_batch * ((6 + 4 * spec.n_expert_aux) * d + spec.attention.n_at_once) + n_rows * spec.n_vocab)
    experts = 4 * n_batch * n_used * (3 * widest(needs.experts) + 4 * d)
    return exchange + rows + segment + experts + _GRAPH_BYTES
