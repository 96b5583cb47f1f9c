"""What a plan will do on this machine: measures the machine as far as the plan asks, and predicts both phases."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace

import numpy as np

from slimoe.offload.ggml.cpu_backend import CpuBackend
from slimoe.offload.ggml.device_backend import DeviceBackend
from slimoe.offload.ggml.devices import Device
from slimoe.offload.machine.cost_model import LOOK_AHEAD, Prediction, Residency, Step, predict
from slimoe.offload.machine.measure import Calibration, Limits, kernel_needs
from slimoe.offload.machine.measurement_cache import MeasurementCache
from slimoe.offload.machine.probe import FormSpeed, KernelSpeed, measured_speeds
from slimoe.offload.machine.speed import MachineSpeed, SpeedCurve
from slimoe.offload.machine.upload_costs import ExchangeChoice, UploadCosts, choose_exchange
from slimoe.offload.machine.workload import Workload, workload
from slimoe.offload.memory.kv_cache import kv_type
from slimoe.offload.plan.engine_config import EngineConfig
from slimoe.offload.plan.engine_plan import EnginePlan
from slimoe.offload.plan.expert_placement import ExpertPlacement, expert_placement

TYPICAL_PAST = 512
"""Tokens before the one that is predicted: decoding slows down as they grow in number."""


@dataclass(frozen=True, slots=True)
class PlanPrediction:
    """The speed expected of a plan: of one more token after `n_past`, and of a prompt's batch of `n_prompt` tokens.

    `exchange` says by device what becomes of experts that it lacks, of those that lack some, and `costs` by what.
    """

    decode: Prediction
    n_past: int
    prefill: Prediction
    n_prompt: int
    exchange: Mapping[str, ExchangeChoice] = field(default_factory=dict)
    costs: Mapping[str, UploadCosts] = field(default_factory=dict)


def measure_machine(
    config: EngineConfig,
    plan: EnginePlan,
    on_measure: Callable[[str], None],
    cache: MeasurementCache | None = None,
) -> MachineSpeed:
    """The speed of everything that the plan uses: from the cache, or measured, within the plan's memory.

    `on_measure` is told before each measurement, which takes seconds at most; what it raises ends them all. Raises
    DoesNotFitError, DeviceError, and what reading the file raises.
    """
    needs = kernel_needs(plan.spec, plan.sources, plan.layers, kv_type(config.context.kv_type))
    vram = min((device.budget for device in plan.devices), default=0)
    limits = Limits(ram=plan.available, vram=vram, direct_io=config.memory.direct_io)
    calibration = Calibration(needs, limits, cache, on_measure)
    with ExitStack() as opened:
        cpu = opened.enter_context(closing(CpuBackend(plan.n_threads)))
        calibration.cpu(cpu)  # raises where nothing may be measured, before devices are opened in vain
        devices = {
            known_as(device.device): opened.enter_context(closing(DeviceBackend(device.device)))
            for device in plan.devices
        }
        speed = calibration.machine(plan.gguf if expert_placement(plan).on_disk else None, cpu, devices)
        apart = {name: backend.device.pins_host_memory for name, backend in devices.items()}
        speed = replace(speed, links={name: replace(link, is_apart=apart[name]) for name, link in speed.links.items()})
        kinds = {kind.type for kind in plan.weight_forms.repacked_tokens}
        if not kinds:
            return speed
        on_measure("repacked weights")
        return repacked_speed(speed, plan, measured_speeds(kinds, cpu, plan.available // 2, cache))


def repacked_speed(speed: MachineSpeed, plan: EnginePlan, kernels: Mapping[str, KernelSpeed]) -> MachineSpeed:
    """The speed of a machine with the plan's forms of weights, where `speed` is that of plain ones; `kernels` by type.

    Rows of experts count as tokens of a step: few meet each.
    """
    curves, output_curves = dict(speed.cpu.kernels), dict[str, SpeedCurve]()
    for kind, n_most in plan.weight_forms.repacked_tokens.items():
        known = kernels.get(kind.type.name)
        prefix, suffix = f"{kind.type.name} ", " expert" if kind.is_expert else " dense"
        for name, plain in speed.cpu.kernels.items():
            if known is not None and name.startswith(prefix) and name.endswith(suffix):
                of_kind = output_curves if kind.is_output else curves
                of_kind[name] = _repacked(plain, known.expert if kind.is_expert else known.dense, n_most)
    # A kernel of other matrices is not the output's where that has one form only.
    output_curves = {**speed.cpu.kernels, **output_curves}
    return replace(speed, cpu=replace(speed.cpu, kernels=curves, output_kernels=output_curves))


def _repacked(curve: SpeedCurve, speed: FormSpeed, n_most: int) -> SpeedCurve:
    """The curve of a kernel that takes repacked weights for at most so many rows."""
    plain, repacked = speed.seconds(np.array(curve.n_rows, np.float64))
    ratios = np.where(np.array(curve.n_rows) <= n_most, repacked / plain, 1.0)
    return SpeedCurve(curve.n_rows, tuple(float(one) for one in ratios * np.array(curve.seconds_per_byte)))


def predict_plan(plan: EnginePlan, speed: MachineSpeed) -> PlanPrediction:
    """Predicts how fast a plan is on a machine. Of several devices, which take turns, the slowest stands for all."""
    n_past = min(TYPICAL_PAST, plan.n_ctx - 1)
    n_prompt = min(plan.n_batch, plan.n_ctx)
    decode = Step(n_past=n_past, look_ahead=_look_ahead(plan))
    prefill = Step(n_tokens=n_prompt, look_ahead=1.0)
    where = expert_placement(plan)
    slowest = [_slowest(plan, speed, where, step) for step in (decode, prefill)]
    load = workload(plan.spec, plan.sources, plan.layers)
    costs = _costs(load, plan, speed)
    exchange = {name: choose_exchange(one, load.n_used) for name, one in costs.items()}
    return PlanPrediction(slowest[0], n_past, slowest[1], n_prompt, exchange, costs)


def _look_ahead(plan: EnginePlan) -> float:
    """The share of a token's reads that begin before they are selected: none where no router is asked early."""
    return LOOK_AHEAD if plan.tiers is None or plan.tiers.prefetch_depth else 0.0


def predict_answers(plan: EnginePlan, speed: MachineSpeed, n_tokens: int) -> float:
    """Milliseconds of a step that continues answers by `n_tokens` tokens in all, each with logits of its own."""
    n_past = min(TYPICAL_PAST, plan.n_ctx - 1)
    step = Step(n_tokens=n_tokens, n_past=n_past, n_out=n_tokens, look_ahead=_look_ahead(plan))
    return n_tokens * _slowest(plan, speed, expert_placement(plan), step, is_answer=True).ms_per_token


def known_as(device: Device) -> str:
    """The name that tells a device from others, also at the next start."""
    return f"{device.name} ({device.description})"


def _costs(load: Workload, plan: EnginePlan, speed: MachineSpeed) -> dict[str, UploadCosts]:
    """What the engine will choose by, as far as it can be told from each side's speed while the other is idle."""
    on_host = speed.cpu.matrix_seconds(load.expert, 1)
    costs = {}
    for name, device in ((known_as(device.device), device) for device in plan.devices):
        if not device.is_whole and load.expert:
            copy = sum(load.expert.values()) / speed.links[name].to_device
            costs[name] = UploadCosts(on_host, speed.devices[name].matrix_seconds(load.expert, 1), copy, on_host, copy)
    return costs


def _slowest(
    plan: EnginePlan, speed: MachineSpeed, where: ExpertPlacement, step: Step, *, is_answer: bool = False
) -> Prediction:
    load = workload(plan.spec, plan.sources, plan.layers)
    host_share = where.found_share if step.n_tokens == 1 or is_answer else where.host_share
    residency = Residency(where.device_share, host_share, where.is_cut, where.by_layer)
    devices = [known_as(device.device) for device in plan.devices]
    processors: list[str | None] = [*devices] or [None]
    predictions = [predict(load, residency, speed, step, name) for name in processors]
    return max(predictions, key=lambda prediction: prediction.ms_per_token)
