"""Makes calls of the system fail in other processes: a small library, preloaded there, and a file that arms it."""

import errno
import mmap
import os
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from slimoe.offload.errors import SlimoeError

CALLS = (
    *("open", "read", "write", "sync", "truncate", "rename"),
    *("map", "memory", "thread", "allocate", "lock", "mkdir"),
)
"""In the order of the numbers that library.c has for them, from 1 on; `memory` is 2 MiB or more of no file."""
KINDS = {"short": -1, "end": -2}
"""What is no error: half of the bytes, and none. Others are errors' names."""
ALWAYS = 1 << 40

_STATE, _COUNTS = struct.Struct("@iiqqqq200s"), struct.Struct("@16q")
_EVERY = -1
_SOURCE = Path(__file__).with_name("library.c")


class NoCompilerError(SlimoeError):
    """There is no C compiler here, or it refuses the library."""


@dataclass(frozen=True, slots=True)
class Fault:
    """The `first` call of a kind whose path holds `pattern`, and those behind it up to `times`, end in `kind`."""

    call: str
    kind: str
    first: int = 1
    times: int = 1
    pattern: str = ""

    def __str__(self) -> str:
        often = "from then on" if self.times >= ALWAYS else f"{self.times} times" if self.times > 1 else "once"
        return f"{self.call} {self.kind} at call {self.first} {often}" + (f" of {self.pattern}" if self.pattern else "")


class FaultLibrary:
    """The compiled library, and what it is to do in all processes that have `environment`."""

    def __init__(self, directory: Path) -> None:
        """Compiles into `directory`; raises NoCompilerError."""
        library, state = directory / "faults.so", directory / "armed"
        command = ["cc", "-O1", "-fPIC", "-shared", "-o", str(library), str(_SOURCE), "-ldl", "-lpthread"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise NoCompilerError(f"The fault library needs a C compiler named cc ({error.strerror}).") from None
        if done.returncode:
            raise NoCompilerError(f"The fault library cannot be compiled: {done.stderr.strip()[:500]}")
        state.write_bytes(bytes(mmap.PAGESIZE))
        with state.open("r+b") as file:
            self._shared = mmap.mmap(file.fileno(), mmap.PAGESIZE)
        self.environment = {"LD_PRELOAD": str(library), "SLIMOE_FAULTS": str(state)}

    @contextmanager
    def armed(self, fault: Fault) -> Iterator[None]:
        """Faults happen within the block; counting starts anew."""
        number = KINDS.get(fault.kind) or getattr(errno, fault.kind)
        words = (number, fault.first, fault.times, 0, 0, os.fsencode(fault.pattern))
        _STATE.pack_into(self._shared, 0, 0, *words)
        _STATE.pack_into(self._shared, 0, CALLS.index(fault.call) + 1, *words)
        try:
            yield
        finally:
            struct.pack_into("@i", self._shared, 0, 0)

    @contextmanager
    def counting(self, pattern: str) -> Iterator[dict[str, int]]:
        """Calls of every kind whose path holds `pattern`, known behind the block; none fails."""
        counts: dict[str, int] = {}
        _COUNTS.pack_into(self._shared, _STATE.size, *[0] * 16)
        _STATE.pack_into(self._shared, 0, _EVERY, 0, 0, 0, 0, 0, os.fsencode(pattern))
        try:
            yield counts
        finally:
            struct.pack_into("@i", self._shared, 0, 0)
            counts.update(zip(CALLS, _COUNTS.unpack_from(self._shared, _STATE.size)[1:], strict=False))

    @property
    def n_hit(self) -> int:
        """How many calls were made to fail."""
        return int(_STATE.unpack_from(self._shared)[5])
