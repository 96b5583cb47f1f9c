"""What a plan finds on the machine that it is made for: asked for once, or given by a caller who knows."""

from collections.abc import Mapping
from dataclasses import dataclass

from slimoe.offload.ggml.devices import Device, choose_devices
from slimoe.offload.machine.probe import KernelSpeed
from slimoe.offload.plan.engine_config import EngineConfig
from slimoe.offload.plan.program_memory import held_bytes
from slimoe.offload.resources.memory import HostMemory, resident_bytes
from slimoe.offload.resources.processors import default_threads


@dataclass(frozen=True, slots=True)
class Machine:
    """Free host memory, the devices to use, threads where the configuration names none, and what is held already.

    `held` is what this process holds before it opens a model. `kernels` are the speeds of plain and repacked weights;
    None has those measured that a plan must know.
    """

    memory: HostMemory
    devices: tuple[Device, ...]
    n_threads: int
    held: int
    kernels: Mapping[str, KernelSpeed] | None = None


def this_machine(config: EngineConfig, model_bytes: int = 0) -> Machine:
    """What there is now, as far as the configuration asks for it.

    `model_bytes` of what this process holds belong to the model already. Raises UsageError and DeviceError.
    """
    devices = choose_devices(config.devices.device, config.devices.rpc)
    return Machine(HostMemory.now(), devices, default_threads(), held_bytes(resident_bytes() - model_bytes))
