"""How much host memory there is, how much of it this process has used, and sizes in bytes as people write them."""

import contextlib
import ctypes
import mmap
import re
import resource
import sys
from dataclasses import dataclass
from decimal import Decimal

import psutil

from slimoe.offload.errors import DoesNotFitError
from slimoe.offload.resources.control_groups import ControlGroup, control_groups
from slimoe.offload.resources.system_files import SYSTEM, SystemFiles

_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*((?:[kmgt]i?)?b?)", re.IGNORECASE)
_LETTERS = "KMGT"


def parse_bytes(text: str) -> int | None:
    """The bytes that a person wrote; None for what is no size.

    Units are KiB, MiB, GiB and TiB or just K, M, G and T for powers of 1024, KB, MB, GB and TB for powers of 1000, B or
    none for bytes.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        return None
    unit = match[2].upper()
    step = 1000 if len(unit) == 2 and unit.endswith("B") else 1024
    power = _LETTERS.index(unit[0]) + 1 if unit[:1] in tuple(_LETTERS) else 0
    return int(Decimal(match[1]) * step**power)


def bytes_text(n_bytes: int) -> str:
    """The same bytes for `parse_bytes`, in the largest unit that they are a whole number of."""
    for power in range(len(_LETTERS), 0, -1):
        if n_bytes and n_bytes % 1024**power == 0:
            return f"{n_bytes // 1024**power}{_LETTERS[power - 1]}iB"
    return str(n_bytes)


LEAST_FREE_BYTES, LEFT_FREE_BYTES = 32 << 20, 64 << 20
"""In a full control group of 256 MiB another Python could start and read files, with no page fault that went to disk,
when 16 MiB were left; with 8 MiB left the kernel ended it. These are twice and four times as much."""


@dataclass(frozen=True, slots=True)
class _Version:
    """Where a version of control groups writes the limits and the use of memory, and how it names kinds of use.

    `summed` stands before the fields that count the groups inside as well.
    """

    limits: tuple[str, ...]
    used: str
    summed: str
    mapped: str


_VERSIONS = {
    1: _Version(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_", "mapped_file"),
    # Beyond memory.high nothing is killed, but processes are slowed down until they have given memory back.
    2: _Version(("memory.max", "memory.high"), "memory.current", "", "file_mapped"),
}


@dataclass(frozen=True, slots=True)
class _Room:
    """Bytes that a system or a control group may use, that it could give now, and of file pages mapped in it."""

    limit: int
    available: int
    mapped: int


def human(n_bytes: float) -> str:
    """Bytes as a person reads them: `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB"):
        if abs(n_bytes) < 1024:
            return f"{n_bytes:.0f} B" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.2f} GiB"


def human_up(n_bytes: int) -> str:
    """A size for a flag that is certainly enough: whole MiB, rounded up."""
    return f"{-(-n_bytes // (1 << 20))}MiB"


def available_bytes(system: SystemFiles = SYSTEM) -> int:
    """Host memory that can be taken now: the system's, or that of the tightest control group around this process."""
    return min(room.available for room in _rooms(system))


def memory_limit_bytes(system: SystemFiles = SYSTEM) -> int:
    """The most host memory that this process can ever hold: the system's, or the tightest control group's limit."""
    return min(room.limit for room in _rooms(system))


def holdable_bytes(system: SystemFiles = SYSTEM) -> int:
    """Host memory that this process can hold in all, what it holds already included, without harm to anybody.

    What is available, less the file pages that running programs have mapped: they count as available, for they could
    be dropped, but they are those programs' code, and the machine crawls once it reads its code from disk again and
    again. Our own mapped pages are among both. A page table takes 8 bytes for each page of 4 KiB. On systems that do
    not tell what is mapped a sixteenth of the memory stands for it.
    """
    return _held_and(min(room.available - room.mapped for room in _rooms(system)) - LEFT_FREE_BYTES)


def grantable_bytes(system: SystemFiles = SYSTEM) -> int:
    """Host memory that this process can hold for a person who names a size, and so has chosen their own margin.

    The system keeps only the least that it needs. A control group keeps nothing: its limit is a size that was named.
    """
    whole, *groups = (room.available - room.mapped for room in _rooms(system))
    return _held_and(min((whole - LEAST_FREE_BYTES, *groups)))


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Bytes that this process can hold in all: without being asked, by a size that a person named, and ever."""

    holdable: int
    grantable: int
    limit: int

    @classmethod
    def now(cls) -> "HostMemory":
        """What `holdable_bytes`, `grantable_bytes` and `memory_limit_bytes` say at this moment."""
        return cls(holdable_bytes(), grantable_bytes(), memory_limit_bytes())


def _held_and(room: int) -> int:
    """What this process holds and `room` more, less the page tables for it."""
    return max(0, room - room // 512 + resident_bytes())


def _rooms(system: SystemFiles) -> list[_Room]:
    """The system's, then those of the control groups that set a limit."""
    memory = psutil.virtual_memory()
    try:
        fields = dict(line.split(":") for line in (system.proc / "meminfo").read_text().splitlines())
        mapped = int(fields["Mapped"].removesuffix("kB")) << 10
    except (OSError, KeyError, ValueError):
        mapped = int(memory.total) // 16
    rooms = [_room(group) for group in control_groups("memory", system)]
    return [_Room(int(memory.total), int(memory.available), mapped), *(room for room in rooms if room is not None)]


def _room(group: ControlGroup) -> _Room | None:
    """A group's room, None where it sets no limit."""
    version = _VERSIONS[group.version]
    limits = []
    for name in version.limits:
        with contextlib.suppress(OSError, ValueError):  # says max where there is none
            limits.append(int((group.path / name).read_text()))
    try:
        used = int((group.path / version.used).read_text())
        fields = dict(line.split() for line in (group.path / "memory.stat").read_text().splitlines())
        names = ("inactive_file", "active_file", version.mapped)
        inactive, active, mapped = (int(fields.get(version.summed + name, fields.get(name, 0))) for name in names)
    except (OSError, ValueError):
        return None
    if not limits:
        return None
    # Clean page cache counts as used there, but is given back on demand.
    return _Room(min(limits), max(0, min(limits) - used + inactive + active), mapped)


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


def give_back_freed() -> None:
    """Gives the system back what the C library keeps of freed memory, of which much stays after a model is closed."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # of other C libraries than glibc
            ctypes.CDLL(None).malloc_trim(0)


def resident_bytes() -> int:
    """The memory this process holds resident now, mapped file pages included."""
    return int(psutil.Process().memory_info().rss)


def private_bytes() -> int:
    """The memory that this process holds resident now and shares with no other, as far as the system tells."""
    info = psutil.Process().memory_info()
    return int(info.rss - getattr(info, "shared", 0))


def peak_resident_bytes(system: SystemFiles = SYSTEM) -> int:
    """The most memory this process ever held resident, mapped file pages included.

    Linux counts in `ru_maxrss` what the process that started this one held at that moment, hence its other counter.
    """
    with contextlib.suppress(OSError, KeyError, ValueError):
        fields = dict(line.split(":", 1) for line in (system.proc / "self" / "status").read_text().splitlines())
        return int(fields["VmHWM"].removesuffix("kB")) << 10
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
