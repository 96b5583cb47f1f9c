"""What a plan must know of the machine that it is made for: memory, devices and threads."""

from collections.abc import Mapping
from dataclasses import dataclass

from slimoe.offload.errors import DeviceError
from slimoe.offload.ggml.devices import Device, choose_devices
from slimoe.offload.machine.driver_memory import with_driver_memory
from slimoe.offload.machine.probe import KernelSpeed
from slimoe.offload.plan.engine_config import EngineConfig
from slimoe.offload.plan.program_memory import held_bytes
from slimoe.offload.resources.memory import HostMemory, resident_bytes
from slimoe.offload.resources.processors import default_threads


@dataclass(frozen=True, slots=True)
class Machine:
    """Free host memory, the devices to use, threads where the configuration names none, and what is held already.

    This process holds `held` bytes before it opens a model. `kernels` are the speeds of plain and repacked weights, by
    type; with None the plan measures those that it must know. `notes` are about devices that cannot be used.
    `is_rebudgeted` says that an open model gets another budget, whatever the configuration says.
    """

    memory: HostMemory
    devices: tuple[Device, ...]
    n_threads: int
    held: int
    kernels: Mapping[str, KernelSpeed] | None = None
    notes: tuple[str, ...] = ()
    is_rebudgeted: bool = False


def this_machine(config: EngineConfig, model_bytes: int = 0) -> Machine:
    """The machine that this process runs on, as it is now, with the devices that the configuration asks for.

    `model_bytes` of what this process holds belong to the model already. A device whose driver fails is left out with a
    note, unless it was asked for. Raises UsageError and DeviceError.
    """
    devices, notes = list[Device](), list[str]()
    for device in choose_devices(config.devices.device, config.devices.rpc):
        try:
            devices.append(with_driver_memory(device))
        except DeviceError as error:
            if not config.devices.is_automatic:
                raise
            notes.append(f"Without {device.name}: {error}")
    held = held_bytes(resident_bytes() - model_bytes)
    return Machine(HostMemory.now(), tuple(devices), default_threads(), held, notes=tuple(notes))
