"""What a plan must know of the machine that it is made for: memory, devices and threads."""

from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace

from gguf import GGMLQuantizationType

from slimoe.offload.errors import DeviceError
from slimoe.offload.ggml.cpu_backend import CpuBackend
from slimoe.offload.ggml.devices import Device, choose_devices
from slimoe.offload.machine.driver_memory import with_driver_memory
from slimoe.offload.machine.probe import KernelSpeed, measured_speeds
from slimoe.offload.plan.engine_config import EngineConfig
from slimoe.offload.plan.program_memory import held_bytes
from slimoe.offload.resources.memory import HostMemory, resident_bytes
from slimoe.offload.resources.processors import default_threads

PROBE_ABOVE_BYTES = 256 << 20
"""Smaller models answer before a measurement would be over."""
_PROBED_PART = 3
"""One in so many bytes of the memory that may be held is used to measure kernels."""


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


def with_kernels(machine: Machine, kinds: Iterable[GGMLQuantizationType], n_threads: int, max_bytes: int) -> Machine:
    """The machine with the speeds of these types, which are measured in a part of `max_bytes` if they are not known."""
    wanted = tuple(kinds)
    if not wanted:
        return replace(machine, kernels={})
    with closing(CpuBackend(n_threads)) as backend:
        return replace(machine, kernels=measured_speeds(wanted, backend, max_bytes // _PROBED_PART))
