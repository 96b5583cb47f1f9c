"""Opens a model in tiers: experts in device slots, in the host expert cache and on disk, and the runner over them."""

import math
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass

from slimoe.offload.cache.device_pool import DeviceSlots, SlotPool
from slimoe.offload.cache.disk_reader import DiskReader
from slimoe.offload.cache.host_pool import HostPool
from slimoe.offload.cache.policy import Policy, PolicyContext, Values, make_policy
from slimoe.offload.cache.residency import Key, most_valuable
from slimoe.offload.cache.router_trace import TraceHeader, TraceWriter, routers_hash
from slimoe.offload.cache.slots import TierPlan, fit_slots, slot_kinds
from slimoe.offload.cache.uploads import Uploads
from slimoe.offload.experts.carried import Carried
from slimoe.offload.experts.constant_experts import read_constant_experts
from slimoe.offload.experts.device_experts import DeviceExperts
from slimoe.offload.experts.device_graph import SlotGraphs
from slimoe.offload.experts.device_part import DevicePart
from slimoe.offload.experts.device_watch import LinkProbes, choose_and_watch, exchange_now
from slimoe.offload.experts.hit_path import HitPath
from slimoe.offload.experts.host_experts import HostExperts
from slimoe.offload.experts.host_graph import ExpertGraphs, HostVectors
from slimoe.offload.experts.layer_banks import LayerBanks
from slimoe.offload.experts.moe_step import MoEStep
from slimoe.offload.experts.resident import ResidentExperts
from slimoe.offload.experts.runner import TieredRunner
from slimoe.offload.experts.single_token import SingleTokenSteps, SingleWeights, load_single_weights, single_token_bytes
from slimoe.offload.ggml.cpu_backend import Backend, CpuBackend
from slimoe.offload.ggml.device_backend import DeviceBackend
from slimoe.offload.graph.exchange import Exchange, ExchangeShape
from slimoe.offload.graph.token_rows import TokenRows
from slimoe.offload.graph.weights import WeightStore, WeightSubset, load_weights
from slimoe.offload.lossy.step import LossyStep
from slimoe.offload.memory.kv_store import HOST, KVPlace
from slimoe.offload.model.experts import ExpertCopy, SlotClass
from slimoe.offload.model.regrouped import join_layers, without_experts
from slimoe.offload.model.tensors import ModelSources
from slimoe.offload.plan.device_plan import DevicePlan
from slimoe.offload.plan.engine_config import EngineConfig
from slimoe.offload.plan.engine_plan import EnginePlan
from slimoe.offload.plan.program_memory import most_logit_rows, request_bytes
from slimoe.offload.plan.weight_forms import compute_bytes
from slimoe.offload.resources.memory import resident_bytes
from slimoe.offload.text.generation import ExchangeNow

Count = Callable[[int], None]


@dataclass(frozen=True, slots=True, eq=False)
class Tiers:
    """What `open_tiers` has opened: the runner, the experts' places and the lossy mode.

    `devices` has each device's plan and its experts in slots, None where the device holds all experts of its layers.
    `taken` are the bytes of host memory that turned out to be taken by everything but slots.
    """

    runner: TieredRunner
    plan: EnginePlan
    host_pool: HostPool | None
    reader: DiskReader | None
    devices: tuple[tuple[DevicePlan, DeviceExperts | None], ...]
    lossy: LossyStep | None = None
    taken: int = 0

    def resize(self, plan: EnginePlan, model: str) -> bool:
        """Carries out another plan for the same model by giving the host expert cache another size, if no more differs.

        Returns whether it did. Raises DoesNotFitError, and nothing has changed.
        """
        old, new, pool = self.plan.tiers, plan.tiers, self.host_pool
        if old is None or new is None or pool is None or self.devices or plan.devices or self.lossy or plan.lossy:
            return False
        is_same = (old.prefetch_depth, self.plan.n_batch) == (new.prefetch_depth, plan.n_batch)
        is_same &= self.plan.weight_forms.repacked_tokens == plan.weight_forms.repacked_tokens
        if not is_same or self.plan.repacked_beside != plan.repacked_beside:
            return False
        n_slots = dict(new.n_slots)
        if not new.is_final:
            n_slots = fit_slots(plan.cut_layers, new.budget, max(new.fixed, self.taken), model, new.low)
        if not pool.can_resize(n_slots):
            return False
        pool.resize(n_slots)
        return True

    def memory(self) -> dict[str, int]:
        """Bytes by tier, those of a device under its name."""
        n_bytes = 0 if self.host_pool is None else self.host_pool.n_bytes
        # `arena` is what the version before called it.
        host_pool = {} if self.host_pool is None else {"host_pool": n_bytes, "arena": n_bytes}
        on_devices = {device.device.name: device.required for device, _ in self.devices}
        pinned = sum(one.link.n_bytes for _, one in self.devices if one is not None)
        return {**self.plan.host_bytes, **host_pool, **({"pinned": pinned} if pinned else {}), **on_devices}

    @property
    def notes(self) -> tuple[str, ...]:
        """What opening has found out that no plan knows."""
        return tuple(one.link.note for _, one in self.devices if one is not None and one.link.note)

    def exchange(self) -> tuple[ExchangeNow, ...]:
        """How each device exchanges experts that has slots for some and watches what that costs."""
        by_device = ((plan.device.name, one) for plan, one in self.devices if one is not None)
        return tuple(now for name, one in by_device for now in exchange_now(name, one))

    def counters(self) -> dict[str, float]:
        """Running totals by name since the model was opened; none where host memory has room for all experts."""
        totals: dict[str, float] = {}
        if self.host_pool is not None and self.host_pool.has_all and not self.devices and self.lossy is None:
            return totals
        if self.host_pool is not None and self.reader is not None:
            reader = self.reader
            totals |= asdict(self.host_pool.counters)
            totals["ahead"] = totals["pending"]  # what the version before called it
            totals |= {"bytes_read": reader.n_read, "bytes_wasted": reader.n_wasted}
            totals["read_seconds"] = reader.busy_seconds
        experts = [one for _, one in self.devices if one is not None]
        if experts:
            totals["device_hits"] = sum(one.hits for one in experts)
            totals["bytes_uploaded"] = sum(one.bytes_uploaded for one in experts)
            totals["swaps"] = sum(one.n_swaps for one in experts)
            totals["streamed"] = sum(one.n_streamed for one in experts)
            totals["exchange_changes"] = sum(now.n_changes for now in self.exchange())
        if self.lossy is not None:
            totals |= self.lossy.counters.known()
        return totals


class _Elsewhere:
    """A cache policy's ranks for host memory, where experts that a device holds are worth nothing."""

    def __init__(self, policy: Policy, on_devices: DeviceSlots) -> None:
        self._policy, self._on_devices = policy, on_devices

    @property
    def shape(self) -> tuple[int, int]:
        return self._policy.shape

    @property
    def layer_weights(self) -> Values:
        return self._policy.layer_weights

    @property
    def n_falls(self) -> list[int]:
        return [sum(counts) for counts in zip(self._policy.n_falls, self._on_devices.n_arrived, strict=True)]

    def rank(self, key: Key) -> float:
        return -math.inf if self._on_devices.numbers[key] >= 0 else self._policy.rank(key)


def open_tiers(
    config: EngineConfig,
    plan: EnginePlan,
    cpu: CpuBackend,
    rows: TokenRows | None,
    opened: ExitStack,
    count: Count,
    carried: Carried,
) -> Tiers:
    """Opens the devices, the host expert cache and the runner as planned; `opened` closes them, also after an error.

    `rows` is where a step's rows of the token table go, None if the table is in memory; `count` is told of bytes made
    ready; `carried` is what an earlier opening has left. Raises DoesNotFitError, DeviceError and ModelFileError.
    """
    return _Opening(config, plan, cpu, rows, opened, count, carried).open()


class _Opening:
    """The steps of opening, which share most of what they need."""

    def __init__(
        self,
        config: EngineConfig,
        plan: EnginePlan,
        cpu: CpuBackend,
        rows: TokenRows | None,
        opened: ExitStack,
        count: Count,
        carried: Carried,
    ) -> None:
        self._carried = carried
        self._config, self._plan, self._cpu, self._rows = config, plan, cpu, rows
        self._opened, self._count = opened, count
        whole = {layer for device in plan.devices if device.is_whole for layer in device.layers}
        self._cut = [index for index, layer in enumerate(plan.layers) if layer is not None and index not in whole]
        self._copies: dict[Key, ExpertCopy] = {
            (index, expert): copies[0]
            for index in self._cut
            if (layer := plan.layers[index]) is not None
            for expert, copies in enumerate(layer.experts)
        }
        n_expert = max((len(layer.target) for layer in plan.layers if layer is not None), default=1)
        context = PolicyContext(len(plan.layers), n_expert, max(1, plan.spec.n_expert_used), plan.priors)
        self._policy = carried.policy or make_policy(config.memory.policy, context)
        carried.policy = self._policy
        self._n_expert = n_expert
        self._single: SingleWeights | None = None
        self._on_devices = DeviceSlots.empty(len(plan.layers), n_expert)

    def open(self) -> Tiers:
        plan = self._plan
        prefetch_depth = 0 if plan.tiers is None else plan.tiers.prefetch_depth
        backends = [self._opened.enter_context(closing(DeviceBackend(device.device))) for device in plan.devices]
        # Before anything else that is new: what moves lies in its old place as well for a moment.
        places = {HOST: KVPlace(self._cpu, tuple(range(plan.spec.n_layer)))}
        if plan.devices:
            by_device = zip(plan.devices, backends, strict=True)
            places = {device.device.name: KVPlace(backend, device.layers) for device, backend in by_device}
        self._carried.kv.arrange(places)
        host = self._exchange(self._cpu, prefetch_depth, has_layers=not plan.devices)
        by_device = zip(plan.devices, backends, strict=True)
        parts = [self._device_part(device, backend, prefetch_depth) for device, backend in by_device]
        parts = [self._table_part(host), *parts] if parts else [self._host_part(host)]
        experts = [part.experts for part in parts if part.experts is not None]
        sizes, is_watched = (plan.n_batch, most_logit_rows(plan.n_batch, plan.n_parallel)), plan.mtp is not None
        runner = TieredRunner(plan.spec, parts, self._cut, prefetch_depth, self._rows, *sizes, has_hidden=is_watched)
        self._opened.callback(runner.close)
        reader = host_pool = lossy = None
        taken = 0
        if plan.tiers is not None:
            possible = slot_kinds(plan.cut_layers, plan.tiers.low)
            vectors = self._host_vectors(parts[0])
            graphs = ExpertGraphs(self._cpu, host, set(possible), len(self._cut), vectors)
            self._opened.callback(graphs.close)
            reader = DiskReader(plan.gguf, direct=self._config.memory.direct_io)
            self._opened.callback(reader.close)
            rows = 0 if self._rows is None else self._rows.n_bytes
            taken = self._taken(runner.graph_bytes + graphs.compute_bytes + rows)
            n_slots = self._n_slots(plan.tiers, taken)
            ranks = _Elsewhere(self._policy, self._on_devices) if experts else self._policy
            host_pool = HostPool(reader, ranks, n_slots, possible)
            self._opened.callback(host_pool.close)
            # Its threads must have ended before the memory goes that they fill.
            self._opened.callback(reader.close)
            self._fill(host_pool, experts)
            if plan.lossy is not None:
                memory = ResidentExperts(plan.layers, host_pool, reader, self._on_devices)
                lossy = LossyStep(plan.layers, plan.lossy.tables, plan.lossy.chooser, memory, plan.lossy.limit)
            moe_step = self._moe_step(parts, host, graphs, host_pool, experts, lossy)
            runner.attach(moe_step)
            # Before the memory goes that copies to devices read.
            self._opened.callback(moe_step.rest)
            single = self._single_tokens(parts[0], host_pool, taken)
            if single is not None:
                runner.attach_single(single)
                taken += single.compute_bytes
        by_plan = zip(plan.devices, [part.experts for part in parts[1:]], strict=True)
        return Tiers(runner, plan, host_pool, reader, tuple(by_plan) if plan.devices else (), lossy, taken)

    def _exchange(self, backend: Backend, prefetch_depth: int, *, has_layers: bool = True) -> Exchange:
        spec, plan = self._plan.spec, self._plan
        n_used = max(1, spec.n_expert_used)
        n_cells, n_masked = (plan.kv.n_cells, plan.kv.n_masked(spec)) if has_layers else (1, 1)
        sizes = spec.n_embd, spec.n_embd_expert, plan.n_batch, n_cells, self._n_expert, n_used, prefetch_depth
        n_state_rows = plan.n_parallel * spec.recurrent.n_parts if spec.recurrent else 0
        shape = ExchangeShape(*sizes, n_masked - n_cells, spec.n_expert_aux, n_state_rows)
        return self._opened.enter_context(closing(Exchange(backend, shape)))

    # --- parts ----------------------------------------------------------------------------------------------

    def _host_part(self, exchange: Exchange) -> DevicePart:
        """All layers on the CPU."""
        plan = self._plan
        sources = join_layers(without_experts(plan.sources))
        store = self._store(self._cpu)
        table = None if self._rows is None else self._rows.tensor
        weights = load_weights(store, sources, plan.weight_forms.single_form, table)
        store.release_staging()
        if (beside := plan.repacked_beside) is not None:
            self._single = load_single_weights(store, plan.sources, sources, beside.single_form, table)
        return DevicePart(self._cpu, exchange, range(plan.spec.n_layer), self._carried.kv.caches[HOST], weights)

    def _table_part(self, exchange: Exchange) -> DevicePart:
        """The token table on the CPU: devices cannot look up rows of every type."""
        assert self._rows is not None
        store, subset = self._store(self._cpu), WeightSubset((), output=False)
        weights = load_weights(store, self._plan.sources, lambda _: "copied", self._rows.tensor, subset)
        return DevicePart(self._cpu, exchange, (), None, weights)

    def _device_part(self, device: DevicePlan, backend: DeviceBackend, prefetch_depth: int) -> DevicePart:
        plan = self._plan
        sources: ModelSources = plan.sources if device.is_whole else without_experts(plan.sources)
        subset = WeightSubset(device.layers, output=device.layers[-1] == plan.spec.n_layer - 1)
        store = self._store(backend)
        weights = load_weights(store, join_layers(sources), lambda _: "copied", 0, subset)
        store.release_staging()
        exchange = self._exchange(backend, prefetch_depth)
        cache = self._carried.kv.caches[device.device.name]
        if device.is_whole:
            return DevicePart(backend, exchange, device.layers, cache, weights)
        enter = self._opened.enter_context
        link = enter(closing(Uploads(device.device, device.pinned)))
        pools = {bank: enter(closing(SlotPool(backend, link, bank))) for bank in device.banks}
        graphs = SlotGraphs(backend, exchange, pools, plan.spec.architecture, weights.layers)
        own = {key: copy for key, copy in self._copies.items() if key[0] in device.layers}
        experts = DeviceExperts(pools, enter(closing(graphs)), own, self._on_devices, link)
        return DevicePart(backend, exchange, device.layers, cache, weights, experts)

    def _store(self, backend: Backend) -> WeightStore:
        return self._opened.enter_context(
            closing(WeightStore(self._plan.gguf, self._plan.sources, self._count, backend))
        )

    def _host_vectors(self, first: DevicePart) -> HostVectors:
        """The biases and scales of cut layers, which the first part has if it is the host, and are loaded else."""
        stacks, none = dict[int, tuple[int, ...]](), (0,) * len(self._plan.spec.architecture.projections)
        store = None if first.layers else self._store(self._cpu)
        for index in self._cut:
            source, weights = self._plan.sources.layers[index], first.weights.layers[index]
            biases, scales = weights.expert_biases, weights.expert_scales
            if store is not None:
                biases = tuple(store.weight(one, "copied") for one in source.expert_biases)
                scales = tuple(store.weight(one, "copied") if one else 0 for one in source.expert_scales)
            stacks[index] = (*(biases or none), *(scales or none))
        return HostVectors(self._plan.spec.architecture.activation, stacks)

    # --- experts --------------------------------------------------------------------------------------------

    def _fill(self, host_pool: HostPool, devices: list[DeviceExperts]) -> None:
        """Puts the most valuable experts on the devices, and the next ones into the host expert cache."""
        best = most_valuable(self._policy.values, self._copies, len(self._copies))
        for key in best:
            for device in devices:
                if key in device.copies and device.has_room(key):
                    host_pool.pin({key})
                    device.put(key, host_pool.addresses(host_pool.demand(key, self._copies[key], counts=0)))
                    self._count(self._copies[key].n_bytes)
        host_pool.pin(set())
        host_pool.forget()
        order = sorted(best, key=lambda key: bool(self._on_devices.numbers[key] >= 0))
        copies = [(key, self._copies[key]) for key in order]
        if self._plan.tiers is not None and self._plan.tiers.low != "none":
            # Low-bit copies have slots of their own.
            layers = self._plan.layers
            last = [(key, layer.experts[key[1]][-1]) for key in order if (layer := layers[key[0]]) is not None]
            copies = [(key, copy) for key, copy in last if copy is not self._copies[key]] + copies
        host_pool.fill(copies, self._count)

    def _taken(self, untouched: int) -> int:
        """What everything but slots takes; `untouched` are bytes that are allocated, but not yet in use."""
        plan, awaited = self._plan, sum(device.awaited for device in self._plan.devices)
        steps = request_bytes(plan.spec, plan.n_batch, plan.n_parallel)
        return resident_bytes() + untouched + awaited + steps + plan.reserve

    def _n_slots(self, tiers: TierPlan, taken: int) -> dict[SlotClass, int]:
        """The slots that were planned, or fewer if the program holds more than was planned; raises DoesNotFitError."""
        if tiers.is_final:
            return dict(tiers.n_slots)
        layers = [self._plan.layers[index] for index in self._cut]
        return fit_slots(layers, tiers.budget, max(tiers.fixed, taken), str(self._config.model), tiers.low)

    def _moe_step(
        self,
        parts: list[DevicePart],
        host: Exchange,
        graphs: ExpertGraphs,
        host_pool: HostPool,
        devices: list[DeviceExperts],
        lossy: LossyStep | None,
    ) -> MoEStep:
        plan = self._plan
        banks = [None if layer is None else LayerBanks.of(layer, host_pool.classes) for layer in plan.layers]
        host_experts = HostExperts(
            plan.layers,
            banks,
            self._cut,
            graphs,
            host_pool,
            self._on_devices if devices else None,
            None if lossy is None else lossy.prefetch_copy,
        )
        for device, part in zip(plan.devices, parts[1:], strict=True):
            if part.experts is not None:
                probes = LinkProbes(part.exchange, part.experts, host_experts)
                n_used = max(1, plan.spec.n_expert_used)
                choose_and_watch(device.device.name, part.experts, self._policy, probes, plan.n_batch, n_used)
        constants, trace, uses = read_constant_experts(plan.gguf, plan.layers), None, self._carried.uses
        if self._config.trace is not None:
            experts = (() if layer is None else layer.experts for layer in plan.layers)
            sizes = tuple(tuple(copies[0].n_bytes for copies in layer) for layer in experts)
            header = TraceHeader(routers_hash(plan.gguf), plan.spec.n_expert_used, sizes)
            trace = TraceWriter(self._config.trace, header)
        hit_path = None
        if not (plan.devices or constants or trace or lossy):
            hit_path = HitPath(plan.layers, host, graphs, host_pool, host_experts)
        return MoEStep(plan.layers, parts, host, host_experts, self._policy, constants, trace, lossy, uses, hit_path)

    def _single_tokens(self, part: DevicePart, host_pool: HostPool, taken: int) -> SingleTokenSteps | None:
        """Steps of one token in one graph, where nothing is to be decided between layers and memory is left."""
        plan, spec, told = self._plan, self._plan.spec, (self._policy, self._carried.uses)
        sources = [plan.sources.layers[index] for index in self._cut]
        has_more = spec.architecture.is_down_wide or any(one.expert_biases or one.expert_scales for one in sources)
        if plan.devices or plan.lossy or self._config.trace or has_more or not host_pool.has_all or plan.tiers is None:
            return None
        needed = single_token_bytes(spec, plan.layers) + compute_bytes(spec, plan.kv.n_masked(spec), 1)
        if taken + host_pool.n_bytes + needed > plan.tiers.budget:
            return None
        constants = read_constant_experts(plan.gguf, plan.layers)
        places, is_watched = (plan.layers, constants, host_pool, told, self._single), plan.mtp is not None
        return SingleTokenSteps(spec, part, self._rows, *places, has_hidden=is_watched)
