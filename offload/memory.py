"""How much host memory there is, and how much of it this process has used."""

import ctypes
import mmap
import resource
import sys
from pathlib import Path

import psutil

from offload.errors import DoesNotFitError

_CGROUP = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")
_FILES = ("memory.max", "memory.current", "memory.stat")
_FILES_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")


def human(n_bytes: float) -> str:
    """Bytes as a person reads them: `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB"):
        if abs(n_bytes) < 1024:
            return f"{n_bytes:.0f} B" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.2f} GiB"


def available_bytes() -> int:
    """Host memory that can be taken now: the system's, or that of the tightest control group around this process."""
    rooms = [_cgroup_room(group, *_FILES) for group in _cgroups()]
    rooms.append(_cgroup_room(_CGROUP / "memory", *_FILES_V1))
    return min([int(psutil.virtual_memory().available), *(room for room in rooms if room is not None)])


def _cgroups() -> list[Path]:
    """Directories of this process's control group and of those around it (cgroup v2)."""
    try:
        lines = _MEMBERSHIP.read_text().splitlines()
    except OSError:
        lines = []
    inside = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    own = _CGROUP / inside
    return [group for group in (own, *own.parents) if group.is_relative_to(_CGROUP)]


def _cgroup_room(group: Path, limit: str, used: str, stat: str) -> int | None:
    try:
        maximum = (group / limit).read_text().strip()
        if maximum == "max":
            return None
        fields = dict(line.split() for line in (group / stat).read_text().splitlines())
        # Clean page cache counts as used there, but is given back on demand.
        reclaimable = int(fields.get("inactive_file", 0)) + int(fields.get("active_file", 0))
        return max(0, int(maximum) - int((group / used).read_text()) + reclaimable)
    except (OSError, ValueError):
        return None


def advise_huge_pages(address: int, n_bytes: int) -> None:
    """Asks for huge pages under memory that was allocated but not yet touched; a wish that may go unheard.

    A weight is read once per token from end to end: with 4 KiB pages every page costs a walk through the page
    tables, which on a virtual machine are two.
    """
    if sys.platform != "linux" or n_bytes < 4 << 20:
        return
    begin = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (address + n_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
    ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_HUGEPAGE)


def resident_bytes() -> int:
    """The memory this process holds resident now, mapped file pages included."""
    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """The most memory this process ever held resident, mapped file pages included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def out_of_memory(n_bytes: int) -> DoesNotFitError:
    """The error for memory that was planned but not given, as when another program took it meanwhile."""
    available = available_bytes()
    return DoesNotFitError(
        f"The system gave no {human(n_bytes)} of memory, though {human(available)} seem available. "
        "Free some memory or raise the limit for this process (ulimit -v).",
        required_bytes=n_bytes,
        available_bytes=available,
    )


def require(required: int, available: int, what: str) -> None:
    """Raises DoesNotFitError, with both numbers, unless `required` bytes are available."""
    if required > available:
        raise DoesNotFitError(
            f"{what} needs {human(required)} of memory, but {human(available)} are available. "
            "Free some memory, lower --ctx, or use a smaller file.",
            required_bytes=required,
            available_bytes=available,
        )
