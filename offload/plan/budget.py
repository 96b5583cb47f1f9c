"""Budgets: how many bytes of host and device memory this program may hold, by what --ram and --vram say."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Protocol

from slimoe.offload.errors import UsageError
from slimoe.offload.resources.memory import HostMemory, human, parse_bytes

AUTO = "auto"
_PERCENT = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*%")
_LARGEST_DEVICE_MARGIN = 1 << 30


class DeviceMemory(Protocol):
    """What a budget needs to know about a device, such as `slimoe.offload.ggml.devices.Device`."""

    @property
    def name(self) -> str:
        """The device's name in messages."""

    @property
    def free_bytes(self) -> int:
        """Bytes of the device's memory that nobody holds."""

    @property
    def total_bytes(self) -> int:
        """Bytes of all memory of the device."""

    @property
    def shares_host_memory(self) -> bool:
        """Whether the device has no memory of its own, but takes the host's."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes that may be held at most: `ram` in host memory, and one number of `vram` for each device.

    `notes` are sentences for the person who set the budget, where less is free than they allowed.
    """

    ram: int
    vram: tuple[int, ...]
    notes: tuple[str, ...] = ()


def parse_size(text: str, total: int, flag: str = "--ram") -> int | None:
    """The bytes that a person wrote after `flag`, None for auto.

    Units are those of `parse_bytes`, and % of `total`. Raises UsageError for what is no size.
    """
    if text.strip().lower() == AUTO:
        return None
    part = _PERCENT.fullmatch(text.strip())
    if part is not None:
        percent = Decimal(part[1])
        if percent > 100:
            raise UsageError(f"{flag} is {text}, more than there is. Write at most 100%, or a size like 8GiB.")
        return int(percent * total / 100)
    size = parse_bytes(text)
    if size is None:
        raise UsageError(f"{flag} is {text!r}, which is no size. Write one like 8GiB, 500MB or 50%, or auto.")
    return size


def decide_budget(
    ram: str | None,
    vram: Sequence[str],
    devices: Sequence[DeviceMemory],
    memory: HostMemory,
    held_bytes: int = 0,
) -> Budget:
    """The budget in bytes: what the flags --ram and --vram say, but no more than is free.

    `ram` is for all our processes; of these, others than this one hold `held_bytes` already, which need not be free.
    `vram` has one size for all devices or one for each. auto, or None, is what is free, less a margin: `memory`
    knows which on the host; a device keeps a sixteenth of its memory, at most 1 GiB, for screens and for what its
    driver allocates while it computes. What devices take that share the host's memory is taken off the host's: together
    at most three quarters. Raises UsageError for what is no size, and for sizes that do not match the devices.
    """
    notes: list[str] = []
    taken: list[int] = []
    holdable = memory.holdable + held_bytes
    # Apple's limit for what a device may hold of the memory it shares is about as much; the rest is the host's.
    lendable = left = holdable * 3 // 4
    each = left // max(1, sum(device.shares_host_memory for device in devices))
    for size, device in zip(_per_device(vram, devices), devices, strict=True):
        asked, free = parse_size(size, device.total_bytes, "--vram"), device.free_bytes
        if asked is None:
            free -= min(_LARGEST_DEVICE_MARGIN, device.total_bytes // 16)
        if device.shares_host_memory:
            free = min(free, left, left if asked is not None else each)
        if asked is not None and asked > free:
            notes.append(_short("--vram", asked, free, device.name))
        taken.append(max(0, free if asked is None else min(asked, free)))
        if device.shares_host_memory:
            left -= taken[-1]
    shared = lendable - left
    asked = parse_size(AUTO if ram is None else ram, memory.limit)
    free = max(0, (holdable if asked is None else memory.grantable + held_bytes) - shared)
    if asked is not None and asked > free:
        notes.append(_short("--ram", asked, free, "the host"))
    return Budget(free if asked is None else min(asked, free), tuple(taken), tuple(notes))


def _per_device(vram: Sequence[str], devices: Sequence[DeviceMemory]) -> Sequence[str]:
    if not vram or all(size == AUTO for size in vram):
        return (AUTO,) * len(devices)
    if not devices:
        raise UsageError("--vram is given, but no device is used that it could be for. Leave it out, or see --device.")
    if len(vram) == 1:
        return (*vram,) * len(devices)
    if len(vram) != len(devices):
        names = ", ".join(device.name for device in devices)
        raise UsageError(
            f"--vram has {len(vram)} sizes, but the devices are {len(devices)} ({names}). "
            "Give one size for all, or one for each."
        )
    return vram


def _short(flag: str, asked: int, free: int, where: str) -> str:
    return f"{flag} is {human(asked)}, but {where} has {human(free)} to give now: taking no more than that."
