"""How many processors this process may compute on, and how long its threads waited for one."""

import contextlib
import math
import os
import sys

import psutil

from slimoe.offload.resources.control_groups import control_groups
from slimoe.offload.resources.system_files import SYSTEM, SystemFiles

_TELLS_AFFINITY = sys.platform == "linux"


def default_threads(system: SystemFiles = SYSTEM) -> int:
    """The number of threads to compute with: one per physical core that this process may use, within its quotas.

    SMT siblings only get in each other's way in matrix products. Threads wait for each other by spinning, which a quota
    counts as work: with two threads on half a processor a token takes ten times as long as with one. Where the system
    does not tell which processors are siblings, each counts as a core.
    """
    if not _TELLS_AFFINITY:
        return _within_quota(psutil.cpu_count(logical=False) or os.cpu_count() or 1, system)
    cores = set()
    for cpu in os.sched_getaffinity(0):
        try:
            cores.add((system.cpus / f"cpu{cpu}" / "topology" / "thread_siblings").read_text())
        except OSError:
            cores.add(str(cpu))
    return _within_quota(len(cores), system)


def usable_processors(system: SystemFiles = SYSTEM) -> int:
    """The number of processors that this process may use, SMT siblings counted one by one, within its quotas."""
    return _within_quota(len(os.sched_getaffinity(0)) if _TELLS_AFFINITY else os.cpu_count() or 1, system)


def waits(system: SystemFiles = SYSTEM) -> dict[str, float]:
    """Seconds that each thread of this process, by its number, has waited for a processor while it could have run.

    Of threads that live, as Linux counts them (Documentation/scheduler/sched-stats.rst); of none elsewhere.
    """
    seconds = {}
    for file in (system.proc / "self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            seconds[file.parent.name] = int(file.read_text().split()[1]) / 1e9
    return seconds


def _within_quota(n: int, system: SystemFiles) -> int:
    """At most `n`, and no more than the control groups around this process allow seconds of processors per second."""
    quota = math.inf
    for group in control_groups("cpu", system):
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            if group.version == 2:
                allowed, period = (group.path / "cpu.max").read_text().split()
            else:
                allowed, period = ((group.path / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if int(allowed) > 0:  # without a limit version 2 says max, version 1 says -1
                quota = min(quota, int(allowed) / int(period))
    return max(1, int(min(n, quota)))
