"""A memory limit that holds: runs a command in a control group of its own, and says what it used.

The page cache that a command fills counts as well as its own memory, so that a mapped file is held to the limit as much
as an allocated buffer is. But a page belongs to the group that read it first: `drop_cached` empties the page cache of a
file before it is read under a limit. Linux only, both versions of control groups, as root or where the group around
this process may be divided. The last line of stdout is one JSON document.

    python -m bench.limits.cgroup --mib 1200 -- slimoe run model.gguf "The river"
"""

import contextlib
import ctypes
import json
import math
import mmap
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np

from slimoe.offload.errors import SlimoeError, UsageError

MOUNT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
_MIB = 1 << 20
_REMOVAL_TRIES = 50
_REMOVAL_PAUSE = 0.1
_DROP_TRIES = 5
# Joins the group before the command begins: what is charged to a group stays there when a process moves on.
_JOIN = 'echo $$ > "$0" && exec "$@"'


class NoControlGroupError(SlimoeError):
    """No memory control group can be made here."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class Version:
    """The files of a memory control group, and the fields to read in those that have several.

    `swap_limit` limits swap alone, or memory and swap together where `swap_counts_memory`.
    """

    limit: str
    peak: str
    swap_limit: str
    swap_counts_memory: bool
    limit_hits: tuple[tuple[str, str], ...]
    oom_kills: tuple[tuple[str, str], ...]


V1 = Version(
    limit="memory.limit_in_bytes",
    peak="memory.max_usage_in_bytes",
    swap_limit="memory.memsw.limit_in_bytes",
    swap_counts_memory=True,
    limit_hits=(("memory.failcnt", ""), ("memory.memsw.failcnt", "")),  # of two equal limits one is met first
    oom_kills=(("memory.oom_control", "oom_kill"),),
)
V2 = Version(
    limit="memory.max",
    peak="memory.peak",
    swap_limit="memory.swap.max",
    swap_counts_memory=False,
    limit_hits=(("memory.events", "max"),),
    oom_kills=(("memory.events", "oom_kill"),),
)


@dataclass(frozen=True, slots=True)
class Usage:
    """What a group used: its peak with page cache and kernel memory, how often it met the limit, and who died."""

    limit_bytes: int
    peak_bytes: int
    n_limit_hits: int
    n_oom_kills: int


class MemoryGroup:
    """A control group that holds commands to `limit_bytes`; `memory_group` makes one and removes it."""

    def __init__(self, path: Path, version: Version, limit_bytes: int) -> None:
        self.path, self.version = path, version
        self.limit_bytes = limit_bytes
        (path / version.limit).write_text(str(limit_bytes))
        with contextlib.suppress(OSError):  # the file is missing where the kernel counts no swap
            (path / version.swap_limit).write_text(str(limit_bytes if version.swap_counts_memory else 0))

    def entering(self, command: Sequence[str]) -> list[str]:
        """The command that joins the group and becomes `command`."""
        return ["/bin/sh", "-c", _JOIN, str(self.path / "cgroup.procs"), *command]

    def usage(self) -> Usage:
        """What the group used until now."""
        return Usage(
            limit_bytes=self.limit_bytes,
            peak_bytes=int((self.path / self.version.peak).read_text()),
            n_limit_hits=sum(self._count(*source) for source in self.version.limit_hits),
            n_oom_kills=sum(self._count(*source) for source in self.version.oom_kills),
        )

    def _count(self, file: str, field: str) -> int:
        try:
            text = (self.path / file).read_text()
        except FileNotFoundError:  # the kernel counts no swap
            return 0
        if not field:
            return int(text)
        fields = dict(line.split() for line in text.splitlines())
        return int(fields.get(field, 0))

    def remove(self) -> None:
        """Ends what still runs in the group and removes it; its page cache goes with it."""
        for _ in range(_REMOVAL_TRIES):
            for pid in (self.path / "cgroup.procs").read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            with contextlib.suppress(OSError):  # v1 only
                (self.path / "memory.force_empty").write_text("0")
            with contextlib.suppress(OSError):
                self.path.rmdir()
                return
            time.sleep(_REMOVAL_PAUSE)  # a killed process is counted until its parent has asked for its end
        raise SlimoeError(f"The control group {self.path} cannot be removed. End its processes, then use rmdir.")


@contextlib.contextmanager
def memory_group(limit_bytes: int, mount: Path = MOUNT, membership: Path = MEMBERSHIP) -> Iterator[MemoryGroup]:
    """A group with a hard limit, swap included, in the innermost group around this process that can be divided.

    Raises NoControlGroupError where there is none.
    """
    path, version = _make(mount, membership)
    try:
        group = MemoryGroup(path, version, limit_bytes)
    except OSError as error:
        path.rmdir()
        raise NoControlGroupError(f"{path} takes no limit of {limit_bytes} bytes ({error.strerror}).") from None
    try:
        yield group
    finally:
        group.remove()


def _make(mount: Path, membership: Path) -> tuple[Path, Version]:
    problem = "this system has no control groups"
    for parent, version in _surroundings(mount, membership):
        path = parent / f"slimoe-{uuid.uuid4().hex[:12]}"
        try:
            path.mkdir()
        except OSError as error:
            problem = f"{parent}: {error.strerror}"
            continue
        if (path / version.limit).exists():
            return path, version
        path.rmdir()  # of version 2, in a group that has processes of its own or was not given the controller
        problem = f"{parent} limits no memory"
    raise NoControlGroupError(
        f"No memory limit can be set here ({problem}). Run as root, or under: systemd-run --user --scope"
    )


def _surroundings(mount: Path, membership: Path) -> Iterator[tuple[Path, Version]]:
    """The groups around this process, innermost first, those of version 1 before those of version 2."""
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        return
    for _, controllers, inside in lines:
        if "memory" in controllers.split(","):
            yield from ((group, V1) for group in _upwards(mount / "memory", inside))
    for number, controllers, inside in lines:
        if (number, controllers) == ("0", ""):
            unified = mount / "unified" if (mount / "unified").is_dir() else mount
            yield from ((group, V2) for group in _upwards(unified, inside))


def _upwards(top: Path, inside: str) -> list[Path]:
    own = top / inside.lstrip("/")
    return [group for group in (own, *own.parents) if group.is_relative_to(top) and group.is_dir()]


def smallest_check() -> dict[str, object]:
    """Shows that a limit holds: a command that takes more is killed, one that takes less is not."""
    take = "import sys; block = bytearray(int(sys.argv[1])); block[::4096] = b'x' * len(block[::4096])"
    seen: dict[str, object] = {}
    try:
        for name, n_mib in (("within", 16), ("beyond", 256)):
            with memory_group(128 * _MIB) as group:
                command = group.entering([sys.executable, "-c", take, str(n_mib * _MIB)])
                done = subprocess.run(command, check=False)
                seen[name] = {"exit_code": done.returncode} | asdict(group.usage())
    except NoControlGroupError as error:
        return {"can_limit": False, "problem": str(error)}
    return {"can_limit": True} | seen


class StillCachedError(SlimoeError):
    """Pages of the file stay in the page cache."""

    exit_code = 75


def cached_bytes(path: Path) -> int:
    """How many bytes of a file lie in the page cache, whoever read it.

    For a file of another user the system says so to root alone; to others it shows all of it as cached.
    """
    n_bytes = path.stat().st_size
    if not n_bytes:
        return 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), n_bytes, access=mmap.ACCESS_READ) as mapped:
        flags = np.zeros(math.ceil(n_bytes / mmap.PAGESIZE), np.uint8)
        # A view of numpy's, since ctypes gives no address of a map that cannot be written; one that can be counts as
        # memory that the system must have, more than there is for a large file.
        view = np.frombuffer(mapped, np.uint8)
        address = ctypes.c_void_p(view.ctypes.data)
        status = ctypes.CDLL(None).mincore(address, ctypes.c_size_t(n_bytes), ctypes.c_void_p(flags.ctypes.data))
        del view  # or the map cannot be closed
    assert status == 0, f"mincore fails on {path}"
    return int(np.count_nonzero(flags & 1)) * mmap.PAGESIZE


def drop_cached(path: Path) -> None:
    """Writes a file out and drops it from the page cache.

    Raises StillCachedError, as when another program has the file mapped.
    """
    file = os.open(path, os.O_RDONLY)
    try:
        for _ in range(_DROP_TRIES):
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            left = cached_bytes(path)
            if not left:
                return
    finally:
        os.close(file)
    raise StillCachedError(
        f"{left} bytes of {path} stay in the page cache: another program has it open. End that program."
    )


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--mib", type=click.IntRange(1), help="The limit in MiB.")
@click.option("--smoke", is_flag=True, help="Only shows whether limits can be set here, and that they hold.")
@click.argument("command", nargs=-1)
def main(mib: int | None, smoke: bool, command: tuple[str, ...]) -> None:
    """Run COMMAND within a memory limit and report what it used; exits as it does."""
    if smoke:
        print(json.dumps(smallest_check()))
        return
    try:
        if mib is None or not command:
            raise UsageError("Name a limit and a command: --mib 1200 -- COMMAND.")
        with memory_group(mib * _MIB) as group:
            done = subprocess.run(group.entering(command), check=False)
            usage = group.usage()
    except SlimoeError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    print(json.dumps({"exit_code": done.returncode} | asdict(usage)))
    sys.exit(done.returncode if done.returncode >= 0 else 128 - done.returncode)


if __name__ == "__main__":
    main()
