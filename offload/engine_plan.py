"""What opening a model will take, decided from its header before a weight is read."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from offload.backend import CpuBackend
from offload.budget import decide_budget
from offload.device_plan import Budgeted, DeviceNeeds, DevicePlan, plan_devices, plan_those_that_fit
from offload.devices import choose_devices
from offload.elastic import Elastic
from offload.errors import DoesNotFitError, ModelFileError, UsageError
from offload.expert_source import ExpertLayer, cache_priors, expert_layers
from offload.file_keys import TOKENS
from offload.gguf_file import GGUFFile, read_gguf
from offload.kv_cache import CELL_STEP, kv_bytes, kv_type
from offload.lossy import Lossy, make_lossy, mixed_lossy, with_resident
from offload.memory import require, resident_bytes
from offload.model_spec import ModelSpec, check_tensors
from offload.placement import Needs, Placement, decide_placement, matrix_bytes, repackable_types
from offload.probe import KernelSpeed, measured_speeds
from offload.processors import default_threads
from offload.tier_plan import TierPlan, most_logit_rows, plan_tiers, program_bytes, tiered_compute_bytes, widest
from offload.weight_source import ModelSources, model_sources, without_experts

DEFAULT_CTX = 4096
MAX_THREADS = 512  # ggml's own limit
MAX_PARALLEL = 256
TIERED_BATCH = 256
"""Larger batches gain little on a CPU, and what they take for intermediate results is better spent on experts."""
_PROBE_ABOVE_BYTES = 256 << 20
"""Smaller models answer before a measurement would be over."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How to open a model; None means: decide for me.

    `n_ctx` are the tokens of each of `n_parallel` requests at once, `n_batch` those of a step; `kv_type` is f32, f16 or
    q8_0, `weights` a mode of `Placement` or auto. `ram` and `vram` (one for each device, or one for all) are sizes as
    `budget.parse_size` reads them; `device` is auto, none or names with commas between, `rpc` are endpoints HOST:PORT.
    `trace` is the file to record routing to, `policy` the name of a cache policy, `max_kl` the loss allowed in nats per
    token, `lossy` the name of a lossy mode and, after a colon, its value. `reserve_bytes` are taken by other processes
    of ours and count inside `ram`.
    """

    model: Path
    n_ctx: int | None = None
    n_batch: int = 512
    n_parallel: int = 1
    n_threads: int | None = None
    kv_type: str = "f16"
    weights: str = "auto"
    ram: str | None = None
    vram: tuple[str, ...] = ()
    device: str = "auto"
    rpc: tuple[str, ...] = ()
    trace: Path | None = None
    policy: str = "heat"
    max_kl: float | None = None
    lossy: str | None = None
    direct_io: bool = True
    reserve_bytes: int = 0


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """Everything decided before the first weight is loaded; with a `shortfall` it cannot be loaded at all."""

    gguf: GGUFFile
    spec: ModelSpec
    sources: ModelSources
    n_ctx: int
    n_cells: int
    n_batch: int
    n_parallel: int
    n_threads: int
    placement: Placement
    available: int
    layers: tuple[ExpertLayer | None, ...]
    devices: tuple[DevicePlan, ...] = ()
    tiers: TierPlan | None = None
    shortfall: DoesNotFitError | None = None
    priors: NDArray[np.float64] | None = None
    notes: tuple[str, ...] = ()
    lossy: Lossy | None = None

    @property
    def cut_layers(self) -> list[ExpertLayer | None]:
        """The layers whose experts are not all in one graph, None in place of others."""
        whole = {layer for device in self.devices if device.is_whole for layer in device.layers}
        return [None if index in whole else layer for index, layer in enumerate(self.layers)]

    @property
    def is_resident(self) -> bool:
        """Whether the whole model is in host memory and a step is one graph."""
        return self.tiers is None and not self.devices

    @property
    def is_tied_on_host(self) -> bool:
        """Whether the token table is the output matrix, and in host memory as such."""
        return not self.devices and self.sources.output.weight is self.sources.token_embd

    @property
    def host_bytes(self) -> dict[str, int]:
        """Bytes in host memory by use, without experts' slots and intermediate results."""
        if self.is_resident:
            placement = self.placement
            by_form = {"mapped": placement.mapped, "copied": placement.copied, "repacked": placement.repacked}
            return {**by_form, "kv": placement.kv}
        return {"copied": self.tiers.weights if self.tiers else 0, "kv": self.tiers.kv if self.tiers else 0}

    @property
    def load_bytes(self) -> int:
        """What is read from the file before the first step."""
        on_devices = sum(device.weights + device.slots for device in self.devices)
        if self.is_resident:
            return self.placement.mapped + self.placement.copied + self.placement.repacked
        return on_devices + (self.tiers.weights + self.tiers.arena if self.tiers else 0)


def plan_engine(config: EngineConfig) -> EnginePlan:
    """Reads the header and decides; loads nothing.

    Raises ModelFileError, UnsupportedModelError and UsageError.
    """
    gguf = read_gguf(config.model)
    spec = ModelSpec.from_gguf(gguf)
    check_tensors(gguf, spec)
    _check_vocabulary(gguf, spec)
    sources = model_sources(gguf, spec)
    n_ctx = min(spec.n_ctx_train, DEFAULT_CTX) if config.n_ctx is None else config.n_ctx
    n_threads = default_threads() if config.n_threads is None else config.n_threads
    settings = {"--ctx": n_ctx, "--batch": config.n_batch, "--parallel": config.n_parallel, "--threads": n_threads}
    for name, value in settings.items():
        if value < 1:
            raise UsageError(f"{name} is {value}, but must be at least 1.")
    if n_threads > MAX_THREADS:
        raise UsageError(f"--threads is {n_threads}, but must be at most {MAX_THREADS}.")
    if config.n_parallel > MAX_PARALLEL:
        raise UsageError(f"--parallel is {config.n_parallel}, but must be at most {MAX_PARALLEL}.")
    n_cells = -(-n_ctx * config.n_parallel // CELL_STEP) * CELL_STEP
    # A step has room for a token of everyone.
    n_batch = max(config.n_parallel, min(config.n_batch, n_cells))
    kv = kv_bytes(spec, n_cells, kv_type(config.kv_type))
    devices = choose_devices(config.device, config.rpc)
    budget = decide_budget(config.ram, config.vram, devices, config.reserve_bytes)
    program = program_bytes(resident_bytes(), spec.n_vocab if has_tokenizer(gguf) else 0)
    speeds = {} if is_budgeted(config) else _speeds(config, sources, n_threads)
    for fewer in _batch_sizes(n_batch, config.n_parallel):
        needs = Needs(kv, program, n_cells, fewer)
        placement = decide_placement(sources, spec, config.weights, speeds, needs, budget.ram)
        if placement.required <= budget.ram:
            n_batch = fewer
            break
    layers = expert_layers(sources, spec)
    plan = EnginePlan(
        gguf=gguf,
        spec=spec,
        sources=sources,
        n_ctx=n_ctx,
        n_cells=n_cells,
        n_batch=n_batch,
        n_parallel=config.n_parallel,
        n_threads=n_threads,
        placement=placement,
        available=budget.ram,
        layers=layers,
        priors=cache_priors(layers),
        notes=budget.notes,
        lossy=make_lossy(config.lossy, config.max_kl, layers),
    )
    chosen = list(zip(devices, budget.vram, strict=True))
    return _within_budget(config, _with_devices(config, plan, chosen), chosen, program)


def _with_devices(config: EngineConfig, plan: EnginePlan, devices: Budgeted) -> EnginePlan:
    """The plan with what lies on devices. One that is too small is left out and noted, or with a name, refused."""
    if not devices:
        return plan
    # A mode that goes by shares must see those of every layer, and so must a trace.
    may_be_whole = config.trace is None and (plan.lossy is None or not plan.lossy.chooser.is_steady)
    kv, n_rows = kv_type(config.kv_type), most_logit_rows(plan.n_batch, plan.n_parallel)
    needs = DeviceNeeds(plan.spec, plan.sources, plan.layers, kv, plan.n_cells, plan.n_batch, n_rows, may_be_whole)
    if config.device == "auto" and not config.vram:
        fitting, notes = plan_those_that_fit(needs, devices)
        return replace(plan, devices=fitting, notes=(*plan.notes, *notes))
    try:
        return replace(plan, devices=plan_devices(needs, devices))
    except DoesNotFitError as error:
        return replace(plan, shortfall=error.with_traceback(None))


def _within_budget(config: EngineConfig, plan: EnginePlan, devices: Budgeted, program: int) -> EnginePlan:
    """The plan with tiers if it needs them, or with what it lacks."""
    if plan.shortfall is not None:
        return plan
    try:
        if plan.devices or _needs_tiers(config, plan):
            if not plan.devices:
                plan = replace(plan, n_batch=max(plan.n_parallel, min(plan.n_batch, TIERED_BATCH)))
            plan = _mixed(config, plan, devices, program)
            return _settled(replace(plan, tiers=_tiers(config, plan, program)))
        require(plan.placement.required, plan.available, _what(config, plan))
    except DoesNotFitError as error:
        return replace(plan, shortfall=error.with_traceback(None))
    return replace(plan, lossy=None)


def _needs_tiers(config: EngineConfig, plan: EnginePlan) -> bool:
    """Whether steps must stop at routers: for memory, for experts that no one graph computes, or to be watched."""
    if not any(plan.layers):
        return False
    fits = plan.placement.required <= plan.available or config.weights not in ("auto", "copied")
    is_stacked = all(layer.is_stacked for layer in plan.sources.layers)
    is_exact = plan.lossy is None or (plan.lossy.is_best_that_fits and fits)
    return config.trace is not None or not is_exact or not fits or not is_stacked


def _batch_sizes(n_batch: int, n_parallel: int) -> list[int]:
    """Batches to try: a smaller one may be what lets a model stay resident, and costs little."""
    return [n_batch, *(n for n in (256, 128) if max(n_parallel, 1) <= n < n_batch)]


def is_budgeted(config: EngineConfig) -> bool:
    """Whether the kernels must be those that every budget can have, so that all budgets give the same tokens."""
    return config.ram is not None or bool(config.vram)


def _tiers(config: EngineConfig, plan: EnginePlan, program: int) -> TierPlan | None:
    """Tiers in host memory, None if devices hold everything. Raises DoesNotFitError."""
    layers, fixed = plan.cut_layers, _fixed(plan, program)
    if not any(layers):
        require(sum(fixed.values()), plan.available, _what(config, plan))
        return None
    low = "none" if plan.lossy is None else plan.lossy.chooser.low_slots
    tiers = plan_tiers(layers, plan.available, **fixed, what=_what(config, plan), low=low)
    # An elastic mix was made for just these slots.
    return replace(tiers, is_final=plan.lossy is not None and isinstance(plan.lossy.chooser, Elastic))


def _fixed(plan: EnginePlan, program: int) -> dict[str, int]:
    """Bytes of host memory that experts cannot have."""
    n_cells = 1 if plan.devices else plan.n_cells
    compute = tiered_compute_bytes(plan.spec, n_cells, plan.n_batch, widest(plan.layers))
    fixed = {"program": program, "weights": 0, "kv": 0, "compute": compute}
    if not plan.devices:
        fixed |= {"weights": matrix_bytes(without_experts(plan.sources)), "kv": plan.placement.kv}
    return fixed


def _mixed(config: EngineConfig, plan: EnginePlan, devices: Budgeted, program: int) -> EnginePlan:
    """Of an elastic file, the plan with one copy of each expert. Raises DoesNotFitError and UsageError."""
    if plan.lossy is None or not isinstance(plan.lossy.chooser, Elastic):
        return plan
    if not any(plan.cut_layers):
        return replace(plan, lossy=None)
    fixed = sum(_fixed(plan, program).values())
    mix = plan.lossy.chooser.mix(plan.cut_layers, plan.available - fixed, fixed, plan.priors, _what(config, plan))
    layers = tuple(mixed or layer for mixed, layer in zip(mix.layers, plan.layers, strict=True))
    plan = replace(plan, layers=layers, lossy=mixed_lossy(plan.lossy, mix, config.max_kl))
    # Which classes of slots a device needs is known only now.
    return _with_devices(config, replace(plan, devices=()), devices) if plan.devices else plan


def _settled(plan: EnginePlan) -> EnginePlan:
    """The plan whose lossy mode knows what is in memory from the start."""
    if plan.lossy is None or plan.tiers is None:
        return plan
    lossy = with_resident(plan.lossy, plan.cut_layers, plan.tiers, plan.priors)
    return replace(plan, lossy=lossy, notes=(*plan.notes, lossy.note))


def _what(config: EngineConfig, plan: EnginePlan) -> str:
    return f"{config.model} with {plan.n_ctx} tokens of context"


def _check_vocabulary(gguf: GGUFFile, spec: ModelSpec) -> None:
    tokens = gguf.metadata.get(TOKENS)
    if isinstance(tokens, list) and len(tokens) != spec.n_vocab:
        problem = f"the tokenizer has {len(tokens)} tokens, the model {spec.n_vocab}."
        raise ModelFileError(gguf.path, problem, "Convert the model again, with the tokenizer that belongs to it.")


def _speeds(config: EngineConfig, sources: ModelSources, n_threads: int) -> dict[str, KernelSpeed]:
    if config.weights != "auto" or matrix_bytes(sources) < _PROBE_ABOVE_BYTES:
        return {}
    backend = CpuBackend(n_threads)
    try:
        return measured_speeds(repackable_types(sources), backend)
    finally:
        backend.close()


def has_tokenizer(gguf: GGUFFile) -> bool:
    """Whether the file carries a vocabulary; without one only token ids go in and out."""
    return TOKENS in gguf.metadata
