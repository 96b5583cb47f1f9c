"""What the drivers of graphics cards take of the host's memory, which no file and no flag tells: it is measured.

A context of CUDA takes hundreds of MB, and the compiler of a software device as much as a small model. `driver_trial`
measures it in a process of its own, once for each device and version of its driver, and remembers it.
"""

import contextlib
import os
import platform
import re
import signal
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import msgspec

from slimoe.offload.errors import DeviceError
from slimoe.offload.ggml.devices import Device, DriverMemory
from slimoe.offload.machine.measurement_cache import MeasurementCache
from slimoe.offload.resources.system_files import SYSTEM, SystemFiles

_DRIVERS = re.compile(r"/[^/]*(?:vulkan|nvidia|cuda|amdhip|hsa-runtime|libze_|libsycl|opencl)[^/]*\.so[^/]*$", re.I)
"""The files of graphics APIs and their drivers, as systems call them."""
_SECONDS = 300.0
"""A card is done in seconds. Of a software device, which compiles for long, counts what it took until then."""
_UNCACHED = {"MESA_SHADER_CACHE_DISABLE": "true"}
"""Kernels that were compiled before take less memory than those that a model may be the first to want."""


def with_driver_memory(device: Device, cache: MeasurementCache | None = None) -> Device:
    """The device with what its driver takes of the host's memory; measures what is not known yet.

    Raises DeviceError when the driver fails, or crashes, as it is measured. A device that an RPC server lends has its
    driver there.
    """
    if device.is_lent:
        return device
    cache = cache or MeasurementCache()
    name = f"{device.name} ({device.description}), driver {driver_version()}: host memory"
    taken = cache.get(name, DriverMemory)
    if taken is None:
        taken = _tried(device)
        cache.put({name: taken})
    return replace(device, driver=taken)


def driver_version(system: SystemFiles = SYSTEM) -> str:
    """A name that changes when a driver does, once ggml has asked the drivers for devices."""
    try:
        maps = (system.proc / "self" / "maps").read_text().splitlines()
    except OSError:
        return platform.version()
    paths = sorted({words[5] for line in maps if len(words := line.split(maxsplit=5)) > 5})
    files = []
    for path in paths:
        with contextlib.suppress(OSError):
            if _DRIVERS.search(path):
                stat = os.stat(path)
                files.append((Path(path).name, stat.st_size, stat.st_mtime_ns))
    return f"{zlib.crc32(repr(files).encode()):08x}"


def _tried(device: Device) -> DriverMemory:
    command = (sys.executable, "-P", "-m", "slimoe.offload.machine.driver_trial", device.name)
    what, hint = f"{device.name} ({device.description})", "Update its driver, or use --device none."
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            env=os.environ | _UNCACHED,
        )
    except subprocess.TimeoutExpired as error:
        until_then = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        told = _told(until_then.rpartition("\n")[0])
        if told.is_device_resident:
            return told
        raise DeviceError(f"{what} did not end a trial within {_SECONDS:.0f} seconds. {hint}") from None
    except OSError:
        return DriverMemory()
    if done.returncode < 0:
        raise DeviceError(f"The driver of {what} ended a trial by {signal.Signals(-done.returncode).name}. {hint}")
    if done.returncode:
        said = done.stderr.strip().rpartition("\n")[2]
        raise DeviceError(f"The driver of {what} failed in a trial ({said or done.returncode}). {hint}")
    return _told(done.stdout)


def _told(lines: str) -> DriverMemory:
    """What the last line says."""
    try:
        return msgspec.json.decode(lines.strip().rpartition("\n")[2], type=DriverMemory)
    except msgspec.DecodeError:
        return DriverMemory()
