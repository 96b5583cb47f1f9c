"""What a plan must know of the machine that it is made for: memory, devices and threads."""

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

    This process holds `held` bytes before it opens a model. `kernels` are the speeds of plain and repacked weights, by
    type; with None the plan measures those that it must know.
    """

    memory: HostMemory
    devices: tuple[Device, ...]
    n_threads: int
    held: int
    kernels: Mapping[str, KernelSpeed] | None = None


def this_machine(config: EngineConfig, model_bytes: int = 0) -> Machine:
    """The machine that this process runs on, as it is now, with the devices that the configuration asks for.

    `model_bytes` of what this process holds belong to the model already. Raises UsageError and DeviceError.
    """
    devices = choose_devices(config.devices.device, config.devices.rpc)
    return Machine(HostMemory.now(), devices, default_threads(), held_bytes(resident_bytes() - model_bytes))
