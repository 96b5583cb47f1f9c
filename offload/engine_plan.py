"""What opening a model will take, decided from its header before a weight is read."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from offload.backend import CpuBackend, default_threads
from offload.budget import decide_budget
from offload.errors import DoesNotFitError, ModelFileError, UsageError
from offload.expert_source import ExpertLayer, cache_priors, expert_layers
from offload.file_keys import TOKENS
from offload.gguf_file import GGUFFile, read_gguf
from offload.kv_cache import CELL_STEP, kv_bytes, kv_type
from offload.memory import require, resident_bytes
from offload.model_spec import ModelSpec, check_tensors
from offload.placement import Needs, Placement, decide_placement, matrix_bytes, repackable_types
from offload.probe import KernelSpeed, measured_speeds
from offload.tier_plan import TierPlan, plan_tiers, program_bytes, tiered_compute_bytes, widest
from offload.weight_source import ModelSources, model_sources, without_experts

DEFAULT_CTX = 4096
MAX_THREADS = 512  # ggml's own limit
MAX_PARALLEL = 256
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
    tiers: TierPlan | None = None
    shortfall: DoesNotFitError | None = None
    priors: NDArray[np.float64] | None = None


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
    budget = decide_budget(config.ram, config.vram, (), config.reserve_bytes)
    program = program_bytes(resident_bytes(), spec.n_vocab)
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
    )
    return _within_budget(config, plan, program)


def _within_budget(config: EngineConfig, plan: EnginePlan, program: int) -> EnginePlan:
    """The plan with tiers if it needs them, or with what it lacks."""
    is_resident = plan.placement.required <= plan.available or config.weights not in ("auto", "copied")
    try:
        if any(plan.layers) and not (is_resident and all(layer.is_stacked for layer in plan.sources.layers)):
            return replace(plan, tiers=_tiers(config, plan, program))
        require(plan.placement.required, plan.available, _what(config, plan))
    except DoesNotFitError as error:
        return replace(plan, shortfall=error.with_traceback(None))
    return plan


def _batch_sizes(n_batch: int, n_parallel: int) -> list[int]:
    """Batches to try: a smaller one may be what lets a model stay resident, and costs little."""
    return [n_batch, *(n for n in (256, 128) if max(n_parallel, 1) <= n < n_batch)]


def is_budgeted(config: EngineConfig) -> bool:
    """Whether the kernels must be those that every budget can have, so that all budgets give the same tokens."""
    return config.ram is not None or bool(config.vram)


def _tiers(config: EngineConfig, plan: EnginePlan, program: int) -> TierPlan:
    """Tiers for a model that does not fit whole. Raises DoesNotFitError."""
    spec = plan.spec
    return plan_tiers(
        plan.layers,
        plan.available,
        program=program,
        weights=matrix_bytes(without_experts(plan.sources)),
        kv=plan.placement.kv,
        compute=tiered_compute_bytes(spec, plan.n_cells, plan.n_batch, widest(plan.layers)),
        what=_what(config, plan),
    )


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
