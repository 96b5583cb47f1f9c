"""The machine that is measured on: what it is, and what else runs on it.

ggml's threads wait by spinning, so that another process on the cores costs many times what it takes itself: no figure
taken beside one is worth writing down.
"""

import platform
import sys

import psutil

from slimoe.offload.errors import SlimoeError
from slimoe.offload.ggml.library import library_name
from slimoe.offload.machine.measurement_cache import processor_name

QUIET_CORES = 0.15


class BusyMachineError(SlimoeError):
    """Other processes use the cores that are to be measured."""

    exit_code = 75


def describe() -> dict[str, str | int]:
    """Processor, cores, memory in GiB, operating system and library, for a report."""
    return {
        "cpu": processor_name(),
        "cores": psutil.cpu_count() or 0,
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "library": library_name(),
    }


class OtherLoad:
    """Watches how much other processes compute, this one and its children left out."""

    def __init__(self) -> None:
        self._others, self._total = _cpu_seconds()

    def cores(self) -> float:
        """The mean number of cores they used since this was made; 0 as well before the clock has moved."""
        others, total = _cpu_seconds()
        elapsed = total - self._total
        return max(0.0, (others - self._others) / elapsed * psutil.cpu_count()) if elapsed > 0 else 0.0


def busy_note(cores: float) -> str | None:
    """The sentence that warns of figures beside which others used so many cores; None where these were few."""
    problem = f"Other processes used {cores:.1f} cores: the figures may be off by several percent."
    return problem if cores > QUIET_CORES else None


def _cpu_seconds() -> tuple[float, float]:
    """Seconds since boot, summed over the cores: spent by others, and in all."""
    times = psutil.cpu_times()
    total = sum(times[:8])  # what follows on Linux is guest time, which stands in the first eight already
    own = psutil.Process()
    children = [child for child in own.children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE]
    mine = sum(sum(process.cpu_times()[:4]) for process in (own, *children))
    return total - times.idle - getattr(times, "iowait", 0.0) - mine, total


def require_quiet(*, allow_busy: bool, is_smoke: bool = False) -> float:
    """Watches the cores for a second and returns how many of them others use; for a smoke, which measures nothing, 0.

    Raises BusyMachineError above QUIET_CORES; with `allow_busy` it only warns on stderr.
    """
    if is_smoke:
        return 0.0
    load = OtherLoad()
    most_busy = busiest(1.0)
    cores = load.cores()
    if cores > QUIET_CORES:
        message = f"Other processes use {cores:.1f} cores, most of all {most_busy}: the figures would mean nothing."
        if not allow_busy:
            raise BusyMachineError(f"{message} End them, or measure all the same with --allow-busy.")
        print(f"warning: {message}", file=sys.stderr)
    return cores


def busiest(seconds: float) -> str:
    """The name and process id of the process that uses most processor time in the next `seconds`."""
    own = psutil.Process().pid
    others = [process for process in psutil.process_iter(["name"]) if process.pid != own]
    before = {process.pid: _used(process) for process in others}
    psutil.cpu_percent(seconds)
    worst = max(others, key=lambda process: _used(process) - before[process.pid])
    return f"{worst.info['name']} ({worst.pid})"


def _used(process: psutil.Process) -> float:
    try:
        return float(sum(process.cpu_times()[:2]))
    except psutil.Error:
        return 0.0
