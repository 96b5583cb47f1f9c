"""Plans other limits for a model that is open: what it holds already is free for it. Apart: only an engine does so."""

from dataclasses import replace

from slimoe.offload.errors import UsageError
from slimoe.offload.ggml.devices import free_now
from slimoe.offload.plan.engine_config import EngineConfig
from slimoe.offload.plan.engine_plan import EnginePlan, plan_engine
from slimoe.offload.plan.machine import Machine
from slimoe.offload.resources.memory import HostMemory


def replan(config: EngineConfig, plan: EnginePlan) -> EnginePlan:
    """The plan for `config`, which differs in --ram and --vram only from that by which the model was opened, as `plan`.

    The kernels are those that every budget can have. Raises DoesNotFitError with the least sizes that would do,
    UsageError for what is no size, and what planning raises.
    """
    if config.trace is not None:
        raise UsageError("The selected experts are being recorded (--trace), which another budget would begin anew.")
    assert plan.machine is not None
    ours = {device.device.handle: device.required for device in plan.devices}
    devices = tuple(
        replace(device, free_bytes=min(device.total_bytes, free_now(device) + ours.get(device.handle, 0)))
        for device in plan.machine.devices
    )
    known, held = plan.machine.kernels or {}, plan.machine.held
    machine = Machine(HostMemory.now(), devices, plan.n_threads, held, known, is_rebudgeted=True)
    new = plan_engine(config, machine)
    if new.shortfall is not None:
        raise new.shortfall
    assert (new.kv, new.n_parallel) == (plan.kv, plan.n_parallel)
    return new
