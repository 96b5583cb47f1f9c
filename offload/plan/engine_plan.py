"""Plans how a model will be opened, and what that takes, from its header, before a weight is read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from slimoe.offload.cache.slots import TierPlan, plan_tiers, tiered_compute_bytes, widest
from slimoe.offload.errors import DoesNotFitError
from slimoe.offload.gguf.header import GGUFFile, read_gguf
from slimoe.offload.gguf.keys import MERGES, TOKENS
from slimoe.offload.graph.token_rows import row_bytes
from slimoe.offload.lossy.elastic import Elastic
from slimoe.offload.lossy.modes import Lossy, make_lossy, mixed_lossy, with_resident
from slimoe.offload.machine.probe import KernelSpeed
from slimoe.offload.memory.kv_cache import CELL_STEP, KVSize, kv_size, kv_type
from slimoe.offload.model.experts import ExpertLayer, cache_priors, expert_layers
from slimoe.offload.model.model_file import ModelFile
from slimoe.offload.model.mtp_block import MtpBlock
from slimoe.offload.model.regrouped import without_experts
from slimoe.offload.model.spec import ModelSpec
from slimoe.offload.model.tensors import ModelSources
from slimoe.offload.plan.advice import advised
from slimoe.offload.plan.batch_sizes import batch_sizes, request_reads, tiered_batch_sizes
from slimoe.offload.plan.budget import decide_budget
from slimoe.offload.plan.context_notes import check_context, check_settings, context_notes, divisor_notes
from slimoe.offload.plan.device_plan import Budgeted, DeviceNeeds, DevicePlan, plan_devices, plan_those_that_fit
from slimoe.offload.plan.drafts import block_bytes, wanted_block, with_or_without
from slimoe.offload.plan.engine_config import EngineConfig as EngineConfig
from slimoe.offload.plan.machine import PROBE_ABOVE_BYTES, Machine, this_machine, with_kernels
from slimoe.offload.plan.program_memory import most_logit_rows, program_bytes, prompt_bytes, request_bytes
from slimoe.offload.plan.weight_forms import (
    Needs,
    WeightForms,
    choose_weight_forms,
    matrix_bytes,
    repackable_types,
    staging_bytes,
)
from slimoe.offload.resources.memory import human, resident_bytes

DEFAULT_CTX = 4096


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """Everything that is decided before the first weight is loaded; with a `shortfall` the model cannot be opened.

    `available` are the bytes of host memory for all our processes, of which those beside the engine's take `reserve`.
    `kv` is the size of the KV cache for all `n_parallel` requests. `machine` is what it was made for.
    """

    gguf: GGUFFile
    spec: ModelSpec
    sources: ModelSources
    n_ctx: int
    kv: KVSize
    n_batch: int
    n_parallel: int
    n_threads: int
    weight_forms: WeightForms
    available: int
    reserve: int
    layers: tuple[ExpertLayer | None, ...]
    devices: tuple[DevicePlan, ...] = ()
    tiers: TierPlan | None = None
    shortfall: DoesNotFitError | None = None
    priors: NDArray[np.float64] | None = None
    notes: tuple[str, ...] = ()
    lossy: Lossy | None = None
    machine: Machine | None = None
    mtp: MtpBlock | None = None
    """The block that drafts tokens, None where none is run."""
    mtp_bytes: int = 0
    """Bytes of host memory that it takes, which `tiers` and `weight_forms` count as program; a device may have it."""
    repacked_beside: WeightForms | None = None
    """Which weights of a model in tiers lie in memory a second time, for steps of one token; None for none."""

    @property
    def cut_layers(self) -> list[ExpertLayer | None]:
        """The layers whose experts are in several places, so that steps stop at their routers; None for others."""
        whole = {layer for device in self.devices if device.is_whole for layer in device.layers}
        return [None if index in whole else layer for index, layer in enumerate(self.layers)]

    @property
    def pinned(self) -> int:
        """Bytes of host memory that experts pass through on their way to devices, a part of the tiers' `compute`."""
        return sum(device.pinned for device in self.devices)

    @property
    def is_resident(self) -> bool:
        """Whether the whole model is in host memory and a step is one graph."""
        return self.tiers is None and not self.devices

    @property
    def driver_bytes(self) -> int:
        """Bytes of host memory that the devices' drivers take, which `tiers` and `weight_forms` count as program."""
        return sum(device.device.driver.total for device in self.devices)

    @property
    def host_bytes(self) -> dict[str, int]:
        """Bytes in host memory by use, without experts' slots and intermediate results."""
        if self.is_resident:
            weight_forms = self.weight_forms
            by_form = {"mapped": weight_forms.mapped, "copied": weight_forms.copied, "repacked": weight_forms.repacked}
            return {**by_form, "kv": weight_forms.kv}
        beside = {"repacked": self.repacked_beside.repacked} if self.repacked_beside else {}
        return {"copied": self.tiers.weights if self.tiers else 0, "kv": self.tiers.kv if self.tiers else 0, **beside}

    @property
    def load_bytes(self) -> int:
        """Bytes that are read from the file before the first step."""
        on_devices = sum(device.weights + device.slots for device in self.devices)
        if self.is_resident:
            return self.weight_forms.mapped + self.weight_forms.copied + self.weight_forms.repacked
        beside = self.repacked_beside.repacked if self.repacked_beside else 0
        return on_devices + beside + (self.tiers.weights + self.tiers.host_pool if self.tiers else 0)


@dataclass(frozen=True, slots=True)
class _Model:
    """What is known of a model and of the machine, whatever the budget.

    `program` are the bytes of the program itself, without what grows with the size of a batch.
    """

    gguf: GGUFFile
    spec: ModelSpec
    sources: ModelSources
    layers: tuple[ExpertLayer | None, ...]
    machine: Machine
    n_threads: int
    program: int
    speeds: Mapping[str, KernelSpeed]


def plan_engine(config: EngineConfig, machine: Machine | None = None) -> EnginePlan:
    """Plans how to open a model from its header; loads nothing. Every command that asks the same gets the same plan.

    The plan is for this machine as it is now, or for the `machine` that is given. Raises ModelFileError,
    UnsupportedModelError, DeviceError and UsageError.
    """
    return plan_each([config], machine)[0]


def plan_each(configs: Sequence[EngineConfig], machine: Machine | None = None) -> list[EnginePlan]:
    """The plans for one model, whose header is read once, in several budgets and contexts; raises as `plan_engine`."""
    if not configs:
        return []
    config, resident = configs[0], resident_bytes()
    file = ModelFile.of(read_gguf(config.model))
    gguf, spec, sources = file.gguf, file.spec, file.sources
    layers = expert_layers(sources, spec)
    machine = machine or this_machine(config, resident_bytes() - resident)
    n_texts = sum(len(texts) for key in (TOKENS, MERGES) if isinstance(texts := gguf.metadata.get(key), list))
    n_copies = sum(len(copies) for layer in layers if layer is not None for copies in layer.experts)
    program = program_bytes(machine.held, spec.n_layer, n_texts, n_copies)
    n_threads = machine.n_threads if config.n_threads is None else config.n_threads
    if machine.kernels is None:
        is_measured = config.memory.weights == "auto" and gguf.n_bytes >= PROBE_ABOVE_BYTES
        least = min(decide_budget(one.memory.ram, (), (), machine.memory).ram for one in configs)
        machine = with_kernels(machine, repackable_types(sources) if is_measured else (), n_threads, least)
    model = _Model(gguf, spec, sources, layers, machine, n_threads, program, machine.kernels or {})
    names, plans = [device.name for device in machine.devices], []
    for config in configs:
        plan = _decide(config, model)
        if plan.shortfall is not None:
            advice = advised(config, names, plan.shortfall, lambda tried: _decide(tried, model).shortfall)
            # What it lacks is told of the smallest batch that was tried.
            plan = replace(plan, shortfall=advice, n_batch=plan.weight_forms.n_batch)
        plans.append(plan)
    return plans


def _decide(config: EngineConfig, model: _Model) -> EnginePlan:
    """The plan for the configuration's budget, with a shortfall if that is too small, and a note if nothing drafts."""
    block = wanted_block(config, model.gguf, model.spec, model.sources)
    n_devices = len(model.machine.devices)
    plan, notes = with_or_without(config, block, n_devices, lambda mtp: _decide_with(config, model, mtp))
    return replace(plan, notes=(*plan.notes, *notes))


def _decide_with(config: EngineConfig, model: _Model, mtp: MtpBlock | None) -> EnginePlan:
    """The same with a block that drafts tokens, or without."""
    spec, layers = model.spec, model.layers
    machine, context, memory = model.machine, config.context, config.memory
    n_ctx = min(spec.n_ctx_exact, DEFAULT_CTX) if context.n_ctx is None else context.n_ctx
    sources = model.sources.in_context(n_ctx, spec.rope.n_ctx_orig)
    check_settings(config, n_ctx, model.n_threads)
    check_context(spec, n_ctx)
    n_cells = -(-n_ctx * context.n_parallel // CELL_STEP) * CELL_STEP
    # A step has room for a token of everyone.
    n_batch = max(context.n_parallel, min(context.n_batch, n_cells))
    kv = kv_size(spec, kv_type(context.kv_type), n_cells, n_batch, context.n_parallel)
    budget = decide_budget(memory.ram, config.devices.vram, machine.devices, machine.memory, memory.held_bytes)
    on_host, of_block = block_bytes(mtp, kv, n_batch, context.n_parallel) if mtp else (0, 0)
    own = model.program + memory.reserve_bytes + prompt_bytes(config.prompts, spec, kv.kind) + on_host
    # Kernels that every budget can have let all budgets give the same tokens.
    has_second = not (config.is_budgeted or machine.is_rebudgeted)
    for fewer in batch_sizes(n_batch, context.n_parallel):
        program = own + of_block + request_bytes(spec, fewer, context.n_parallel)
        needs = Needs(kv.n_bytes(spec), program, kv.n_masked(spec), fewer, context.has_all_logits)
        weight_forms = choose_weight_forms(
            sources, spec, memory.weights, model.speeds, needs, budget.ram, has_second=has_second
        )
        if weight_forms.required <= budget.ram:
            n_batch = fewer
            break
    plan = EnginePlan(
        gguf=model.gguf,
        spec=spec,
        sources=sources,
        n_ctx=n_ctx,
        kv=kv,
        n_batch=n_batch,
        n_parallel=context.n_parallel,
        n_threads=model.n_threads,
        weight_forms=weight_forms,
        available=budget.ram,
        reserve=memory.reserve_bytes,
        layers=layers,
        priors=cache_priors(layers),
        notes=(*machine.notes, *budget.notes, *context_notes(spec, n_ctx), *divisor_notes(model.sources, spec, n_ctx)),
        lossy=make_lossy(config.loss.lossy, config.loss.max_kl, layers),
        machine=machine,
        mtp=mtp,
        mtp_bytes=on_host + of_block,
    )
    chosen = list(zip(machine.devices, budget.vram, strict=True))
    decided = _with_devices(config, plan, chosen, of_block)
    if decided.devices:
        decided = _within_budget(config, replace(decided, mtp_bytes=on_host), chosen, own)
    else:
        decided = _within_budget(config, decided, chosen, own + of_block)
    if decided.shortfall is None or not decided.driver_bytes or not config.devices.is_automatic:
        return decided
    alone = _within_budget(config, plan, (), own + of_block)
    if alone.shortfall is not None:
        return decided
    drivers = (f"{one.device.name}, whose driver takes {human(one.device.driver.total)}" for one in decided.devices)
    note = f"Computing on the CPU: with {', '.join(drivers)}, {decided.shortfall.problem}"
    return replace(alone, notes=(*alone.notes, note))


def _with_devices(config: EngineConfig, plan: EnginePlan, devices: Budgeted, mtp: int = 0) -> EnginePlan:
    """The plan with what devices hold, `mtp` bytes of a block that drafts tokens among it.

    A device that is too small is left out and noted, but refused if named.
    """
    if not devices:
        return plan
    # A mode that goes by expert weights must see those of every layer, and so must a trace.
    may_be_whole = config.trace is None and (plan.lossy is None or not plan.lossy.chooser.is_steady)
    sizes = plan.kv, plan.n_batch, most_logit_rows(plan.n_batch, plan.n_parallel)
    needs = DeviceNeeds(plan.spec, plan.sources, plan.layers, *sizes, may_be_whole, mtp)
    if config.devices.is_automatic:
        plans, notes = plan_those_that_fit(needs, devices)
    else:
        try:
            plans, notes = plan_devices(needs, devices), ()
        except DoesNotFitError as error:
            return replace(plan, shortfall=error.with_traceback(None))
    notes = (*plan.notes, *notes, *(device.note for device in plans if device.note))
    notes = tuple(dict.fromkeys(notes))  # devices are planned twice in the elastic mode
    return replace(plan, devices=plans, notes=notes)


def _within_budget(config: EngineConfig, plan: EnginePlan, devices: Budgeted, program: int) -> EnginePlan:
    """The plan with tiers if it needs them, or with a shortfall."""
    if plan.shortfall is not None:
        return plan
    required = plan.weight_forms.required
    may_be_resident = not plan.devices and not _needs_tiers(config, plan, fits=True)
    try:
        if plan.devices or _needs_tiers(config, plan, fits=required <= plan.available):
            return _repacked_beside(config, plan.weight_forms, _in_tiers(config, plan, devices, program))
        _require(config, plan, required)
    except DoesNotFitError as error:
        if may_be_resident and required < error.required_bytes:
            # A small model may need less as a whole than in parts that are read when they are asked for.
            error = _lack(config, plan, required)
        return replace(plan, shortfall=error.with_traceback(None))
    return replace(plan, lossy=None)


def _in_tiers(config: EngineConfig, plan: EnginePlan, devices: Budgeted, program: int) -> EnginePlan:
    """The plan with experts in several places, or with all of the model on devices. Raises DoesNotFitError."""
    forms = plan.weight_forms.plain() if plan.devices else plan.weight_forms.in_tiers()
    plan = replace(plan, weight_forms=forms)
    if plan.devices:
        return _in_places(config, plan, devices, program)
    found, lack = list[EnginePlan](), None
    for n_batch in tiered_batch_sizes(plan.n_batch, plan.n_parallel):
        try:
            found.append(_in_places(config, replace(plan, n_batch=n_batch), devices, program))
        except DoesNotFitError as error:
            lack = error
    if not found:
        assert lack is not None
        raise lack
    return min(found, key=_request_reads)


def _request_reads(plan: EnginePlan) -> float:
    """Bytes that a typical request reads of experts that have no slot."""
    return 0.0 if plan.tiers is None else request_reads(plan.tiers, plan.layers, plan.n_batch)


def _in_places(config: EngineConfig, plan: EnginePlan, devices: Budgeted, program: int) -> EnginePlan:
    """The same with the plan's batch size. Raises DoesNotFitError and UsageError."""
    plan = _mixed(config, plan, devices, program)
    layers, fixed = plan.cut_layers, _fixed(plan, program)
    # Slots are not filled yet when other matrices are repacked.
    if sum(fixed.values()) + plan.weight_forms.dense_staging(plan.sources) > plan.available:
        plan = replace(plan, weight_forms=plan.weight_forms.plain())
    if not any(layers):
        # Host memory holds nothing of the model.
        _require(config, plan, sum(fixed.values()))
        forms = replace(plan.weight_forms, mapped=0, copied=0, repacked=0, kv=0, staging=0)
        return replace(plan, weight_forms=replace(forms, compute=fixed["compute"], program=fixed["program"]))
    low = "none" if plan.lossy is None else plan.lossy.chooser.low_slots
    tiers = plan_tiers(layers, plan.available, **fixed, what=_what(config, plan), low=low)
    if plan.lossy is None:
        return replace(plan, tiers=tiers)
    # An elastic mix was made for just these slots.
    tiers = replace(tiers, is_final=isinstance(plan.lossy.chooser, Elastic))
    lossy = with_resident(plan.lossy, layers, tiers, plan.priors)
    return replace(plan, tiers=tiers, lossy=lossy, notes=(*plan.notes, lossy.note))


def _repacked_beside(config: EngineConfig, forms: WeightForms, plan: EnginePlan) -> EnginePlan:
    """The plan with a second copy of weights for steps of one token, if `forms` want it and nothing is in its way.

    All experts must be in host memory, and nothing may watch steps between layers.
    """
    tiers = plan.tiers
    is_watched = config.trace is not None or plan.lossy is not None
    if forms.mode != "both" or tiers is None or plan.devices or is_watched or tiers.n_resident < tiers.n_experts:
        return plan
    repacked, staging = forms.repacked_beside(plan.sources)
    if not repacked or tiers.fixed + tiers.host_pool + repacked + staging > plan.available:
        return plan
    return replace(plan, repacked_beside=replace(forms, repacked=repacked, staging=staging))


def _needs_tiers(config: EngineConfig, plan: EnginePlan, *, fits: bool) -> bool:
    """Whether steps must stop at routers: for memory, for experts that no one graph computes, or to be watched."""
    if not any(plan.layers):
        return False
    fits = fits or config.memory.weights not in ("auto", "copied")
    is_stacked = all(layer.is_stacked for layer in plan.sources.layers)
    is_exact = plan.lossy is None or (plan.lossy.is_best_that_fits and fits)
    return config.trace is not None or not is_exact or not fits or not is_stacked


def _require(config: EngineConfig, plan: EnginePlan, required: int) -> None:
    if required > plan.available:
        raise _lack(config, plan, required)


def _lack(config: EngineConfig, plan: EnginePlan, required: int) -> DoesNotFitError:
    return DoesNotFitError(
        f"{_what(config, plan)} needs at least {human(required)} of memory, but the budget is {human(plan.available)}.",
        required_bytes=required,
        available_bytes=plan.available,
    )


def _fixed(plan: EnginePlan, program: int) -> dict[str, int]:
    """Bytes of host memory that experts cannot have, by use."""
    n_masked = 1 if plan.devices else plan.kv.n_masked(plan.spec)
    compute = tiered_compute_bytes(plan.spec, n_masked, plan.n_batch, widest(plan.layers))
    compute += plan.pinned + row_bytes(plan.sources.token_embd, plan.n_batch)
    program += request_bytes(plan.spec, plan.n_batch, plan.n_parallel) + plan.driver_bytes
    if plan.devices:
        return {"program": program + staging_bytes(plan.sources), "weights": 0, "kv": 0, "compute": compute}
    weights = matrix_bytes(without_experts(plan.sources))
    return {"program": program, "weights": weights, "kv": plan.weight_forms.kv, "compute": compute}


def _mixed(config: EngineConfig, plan: EnginePlan, devices: Budgeted, program: int) -> EnginePlan:
    """In the elastic mode, the plan with one copy of each expert. Raises DoesNotFitError and UsageError."""
    if plan.lossy is None or not isinstance(plan.lossy.chooser, Elastic):
        return plan
    if not any(plan.cut_layers):
        return replace(plan, lossy=None)
    fixed = sum(_fixed(plan, program).values())
    mix = plan.lossy.chooser.mix(plan.cut_layers, plan.available - fixed, fixed, plan.priors, _what(config, plan))
    layers = tuple(mixed or layer for mixed, layer in zip(mix.layers, plan.layers, strict=True))
    plan = replace(plan, layers=layers, lossy=mixed_lossy(plan.lossy, mix, config.loss.max_kl))
    # Which classes of slots a device needs is known only now.
    return _with_devices(config, replace(plan, devices=()), devices) if plan.devices else plan


def _what(config: EngineConfig, plan: EnginePlan) -> str:
    return f"{config.model} with {plan.n_ctx} tokens of context"
