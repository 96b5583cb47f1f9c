"""How many processors this process may compute on."""

import math
import os
import sys
from pathlib import Path

import psutil

from slimoe.offload.resources.control_groups import ControlGroup, control_groups

_TELLS_AFFINITY = sys.platform == "linux"
_TOPOLOGY = Path("/sys/devices/system/cpu")


def default_threads() -> int:
    """Threads to compute with: one per physical core that this process may use, within every quota on its time.

    SMT siblings only get in each other's way in matrix products. Threads wait for each other by spinning, which a quota
    counts as work: with two threads on half a processor a token takes ten times as long as with one.
    """
    return _within_quota(_n_cores())


def usable_processors() -> int:
    """Processors that this process may use, SMT siblings counted one by one, within every quota on its time."""
    return _within_quota(len(os.sched_getaffinity(0)) if _TELLS_AFFINITY else os.cpu_count() or 1)


def _within_quota(n: int) -> int:
    return max(1, int(min(n, _quota())))


def _n_cores() -> int:
    """Physical cores that this process may run on; one per processor where the system does not tell which share one."""
    if not _TELLS_AFFINITY:
        return psutil.cpu_count(logical=False) or os.cpu_count() or 1
    return len({_siblings(cpu) for cpu in os.sched_getaffinity(0)})


def _siblings(cpu: int) -> str:
    try:
        return (_TOPOLOGY / f"cpu{cpu}" / "topology" / "thread_siblings").read_text()
    except OSError:
        return str(cpu)


def _quota() -> float:
    """Seconds of all processors per second that the control groups around this process allow it."""
    return min((_group_quota(group) for group in control_groups("cpu")), default=math.inf)


def _group_quota(group: ControlGroup) -> float:
    try:
        if group.version == 2:
            quota, period = (group.path / "cpu.max").read_text().split()
        else:
            quota, period = ((group.path / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        # Without a limit version 2 says max, version 1 says -1.
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf
