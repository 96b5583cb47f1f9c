"""The devices to compute on besides the CPU: those ggml finds on this machine, and those that RPC servers lend."""

import ctypes
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from slimoe.offload.errors import DeviceError, UsageError
from slimoe.offload.ggml import device as ggml_device
from slimoe.offload.ggml.buffers import ggml_backend_reg_dev_get
from slimoe.offload.ggml.rpc_endpoint import RpcEndpoint, check_answers, parse_endpoint

_METAL = "MTL"
_SOFTWARE = ("llvmpipe", "SwiftShader")
"""How drivers describe devices that compute on the CPU, in its memory; ggml calls them GPUs like any other."""


@dataclass(frozen=True, slots=True)
class DriverMemory:
    """Bytes of host memory that a driver takes in this process: for the device when it is `opened`, and more for its
    kernels when they are compiled and run.

    With `is_device_resident` what the device holds counts as this process's own memory as well.
    """

    opened: int = 0
    kernels: int = 0
    is_device_resident: bool = False

    @property
    def total(self) -> int:
        """All of it, at most."""
        return self.opened + self.kernels


@dataclass(frozen=True, slots=True)
class Device:
    """A device as ggml describes it: its memory in bytes, and ggml's own address of it.

    `hardware_id` is the same for one card that two drivers show, empty where it is not known. What a device holds
    that `shares_host_memory` is taken from the host. It `is_lent` by an RPC server, and then its driver is there.
    Where it `pins_host_memory` it copies from that by itself.
    """

    name: str
    description: str
    free_bytes: int
    total_bytes: int
    handle: int
    is_integrated: bool = False
    shares_host_memory: bool = False
    hardware_id: str = ""
    is_lent: bool = False
    driver: DriverMemory = DriverMemory()
    pins_host_memory: bool = False


def available_devices(rpc: Sequence[str] = ()) -> tuple[Device, ...]:
    """All GPUs of this machine, then those of the RPC servers HOST:PORT, in the order given.

    Raises UsageError for what is no endpoint, DeviceError for a server that cannot be used, and LibraryError where
    ggml has no RPC.
    """
    handles = (ggml_device.ggml_backend_dev_get(index) for index in range(ggml_device.ggml_backend_dev_count()))
    # The CPU and what speeds up single matrices do not compute whole graphs in memory of their own.
    own_graphs = (ggml_device.TYPE_GPU, ggml_device.TYPE_IGPU)
    local = [_described(handle) for handle in handles if ggml_device.ggml_backend_dev_type(handle) in own_graphs]
    endpoints = dict.fromkeys(parse_endpoint(text) for text in rpc)
    return (*local, *(device for endpoint in endpoints for device in _lent(endpoint)))


def free_now(device: Device) -> int:
    """What a device has free at this moment, of all programs' memory."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    ggml_device.ggml_backend_dev_memory(device.handle, ctypes.addressof(free), ctypes.addressof(total))
    return free.value


def choose_devices(
    wanted: str = "auto",
    rpc: Sequence[str] = (),
    find: Callable[[Sequence[str]], Sequence[Device]] = available_devices,
) -> tuple[Device, ...]:
    """The devices to use of those that `find` finds, in order of preference.

    `wanted` is auto for all, none for no device, or names with commas between, in any case. auto takes a card that two
    drivers show once, and integrated GPUs only where there is no other, since they are slow and take the CPU's memory.
    Raises UsageError for a name that there is not, and as `available_devices` does.
    """
    names = [name.strip() for name in wanted.split(",")]
    words = [name.lower() for name in names]
    if "" in words:
        raise UsageError(
            f"--device is {wanted!r}, which has nothing before or after a comma. Write names between them."
        )
    mixed = [word for word in ("none", "auto") if word in words and len(words) > 1]
    if mixed:
        what = {"none": "takes no device", "auto": "takes every GPU there is"}[mixed[0]]
        raise UsageError(f"--device is {wanted!r}, but {mixed[0]} {what}. Write it alone, or names of devices.")
    if words == ["none"]:
        if rpc:
            raise UsageError("--device none takes no device, but --rpc names one. Leave one of them out.")
        return ()
    devices = find(rpc)
    if words == ["auto"]:
        return tuple(_best(devices))
    chosen = {name: _named(name, devices) for name in names}
    return tuple(dict.fromkeys(chosen.values()))


def _best(devices: Sequence[Device]) -> Iterator[Device]:
    seen = set()
    discrete = [device for device in devices if not device.is_integrated]
    for device in discrete or devices:
        if not device.hardware_id or device.hardware_id not in seen:
            yield device
        seen.add(device.hardware_id)


def _named(name: str, devices: Sequence[Device]) -> Device:
    for device in devices:
        if device.name.lower() == name.lower():
            return device
    if not devices:
        raise UsageError(
            f"--device names {name!r}, but there is none on this machine. Leave --device out to compute on the CPU, "
            "name another machine's with --rpc, or build ggml for your GPU, as docs/devices.md says."
        )
    there = ", ".join(f"{device.name} ({device.description})" for device in devices)
    raise UsageError(f"--device names {name!r}, but there is no such device. There is {there}; or use auto or none.")


def _described(handle: int) -> Device:
    props = ggml_device.DeviceProps()
    ggml_device.ggml_backend_dev_get_props(handle, ctypes.addressof(props))
    name = (props.name or b"").decode("utf-8", "replace")
    description = (props.description or b"").decode("utf-8", "replace")
    is_integrated = props.type == ggml_device.TYPE_IGPU
    return Device(
        name,
        description,
        props.memory_free,
        props.memory_total,
        handle,
        is_integrated,
        shares_host_memory=is_integrated or name.startswith(_METAL) or description.startswith(_SOFTWARE),
        hardware_id=(props.device_id or b"").decode(),
        pins_host_memory=bool(props.caps.asynchronous and props.caps.events and props.caps.host_buffer),
    )


def _lent(endpoint: RpcEndpoint) -> Iterable[Device]:
    """The devices of an RPC server; ggml calls all of them GPUs, whatever they are there."""
    from slimoe.offload.ggml import ggml_rpc

    check_answers(endpoint, ggml_rpc.protocol_version())
    registry = ggml_rpc.ggml_backend_rpc_add_server(str(endpoint).encode())
    if not registry:
        raise DeviceError(f"The RPC server {endpoint} lends no device. Start it with one, or leave --rpc out.")
    for index in range(ggml_device.ggml_backend_reg_dev_count(registry)):
        handle = ggml_backend_reg_dev_get(registry, index)
        yield replace(_described(handle), shares_host_memory=endpoint.is_local, is_lent=True)
