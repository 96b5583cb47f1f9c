"""Remembers what was measured on this machine, so that it is measured once and not at every start.

One JSON file holds values by machine and by name. Measuring again is always right, so nothing about the file is an
error: what cannot be read, or is not what was asked for, counts as unknown, and what cannot be written is lost.
"""

import contextlib
import functools
import json
import platform
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import psutil

from slimoe.offload.errors import SlimoeError
from slimoe.offload.files.cache_folder import cache_folder
from slimoe.offload.files.regular_file import read_regular
from slimoe.offload.files.whole_file import Destination, write_whole
from slimoe.offload.ggml.library import chosen, ggml_version
from slimoe.offload.resources.processors import waits
from slimoe.offload.resources.system_files import SYSTEM, SystemFiles

T = TypeVar("T")

_FORMAT = 4
"""What older formats hold may have been measured beside busy programs, and knows no round trips."""
_FILE = "measurements.json"
_DISTURBED = 0.2
"""The part of its time that a thread waits for a core: with the cores to itself some percent, beside one other busy
program a third and more. Then repacked weights look no faster than plain ones, and steadily so."""


def default_path() -> Path:
    """`measurements.json` in SLIMOE_CACHE, or in the user's cache directory."""
    return cache_folder() / _FILE


class MeasurementCache:
    """Values by name, of one machine: those of other machines in the same file are kept, and never seen.

    Values are whatever msgspec turns into JSON and back: numbers, frozen dataclasses, dicts of them.
    """

    def __init__(self, path: Path | None = None, machine: str | None = None, system: SystemFiles = SYSTEM) -> None:
        self._path = path or default_path()
        self._machine = machine or machine_name()
        self._system = system
        self._disturbed: dict[str, object] = {}

    @property
    def disturbed(self) -> tuple[str, ...]:
        """The names of what this object measured while other programs disturbed it; files never hold such values."""
        return tuple(self._disturbed)

    def measured(
        self, name: str, kind: type[T], measure: Callable[[], T], is_steady: Callable[[], bool] = lambda: True
    ) -> T:
        """The value of that name, else what `measure` returns, which is remembered if nothing disturbed it.

        What was measured while a thread had to wait for a core, or what `is_steady` does not vouch for, is remembered
        by this object only.
        """
        value = self.get(name, kind)
        if value is None and isinstance(known := self._disturbed.get(name), kind):
            return known
        if value is None:
            before, begin = waits(self._system), time.perf_counter()
            value = measure()
            longest = max((after - before.get(one, 0.0) for one, after in waits(self._system).items()), default=0.0)
            if longest <= _DISTURBED * (time.perf_counter() - begin) and is_steady():
                self.put({name: value})
            else:
                self._disturbed[name] = value
        return value

    def get(self, name: str, kind: type[T]) -> T | None:
        """The value of that name if it is known and of that type, else None."""
        known = self.known()
        if name not in known:
            return None
        try:
            return msgspec.convert(known[name], kind)
        except msgspec.ValidationError:
            return None

    def known(self) -> dict[str, Any]:
        """All values that are remembered, by name, as JSON has them."""
        known = self._read().get(self._machine)
        return known if isinstance(known, dict) else {}

    def put(self, values: Mapping[str, object]) -> None:
        """Remembers values; what other processes read or remember meanwhile is whole and kept."""
        if not values:
            return
        # A cache that cannot be written costs a measurement at the next start and nothing else.
        with contextlib.suppress(OSError, SlimoeError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with Destination(self._path) as destination:
                machines = self._read()
                machines[self._machine] = self.known() | msgspec.to_builtins(dict(values))
                text = json.dumps({"format": _FORMAT, "machines": machines}, indent=1)
                write_whole(self._path, text.encode(), destination.folder)

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(read_regular(self._path))
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            return {}
        machines = content.get("machines")
        return machines if isinstance(machines, dict) else {}


def processor_name() -> str:
    """The processor as the system calls it."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        return next(names, platform.machine())
    return platform.processor() or platform.machine()


@functools.cache
def machine_name() -> str:
    """What a measurement depends on: processor, cores, memory, and the very library that computes."""
    # Two builds of one version differ: compiler flags change speeds by a factor.
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in chosen().files]
    build = f"{zlib.crc32(repr(stats).encode()):08x}"
    n_cores, n_gib = psutil.cpu_count() or 1, round(psutil.virtual_memory().total / 2**30)
    return f"{processor_name()}, {n_cores} cores, {n_gib} GiB, ggml {ggml_version()} {build}"
