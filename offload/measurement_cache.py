"""Remembers what was measured on this machine, so that it is measured once and not at every start.

One JSON file holds values by machine and by name. Measuring again is always right, so nothing about the file is an
error: what cannot be read, or is not what was asked for, counts as unknown, and what cannot be written is lost.
"""

import contextlib
import functools
import json
import os
import platform
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import psutil
from platformdirs import user_cache_dir

from offload.library import GGML_VERSION, library_directory

T = TypeVar("T")

_FORMAT = 2
_FILE = "measurements.json"


def default_path() -> Path:
    """`measurements.json` in SLIMOE_CACHE, or in the user's cache directory."""
    return Path(os.environ.get("SLIMOE_CACHE") or user_cache_dir("slimoe")) / _FILE


class MeasurementCache:
    """Values by name, of one machine: those of others in the same file are kept, and never seen.

    Values are whatever msgspec turns into JSON and back: numbers, frozen dataclasses, dicts of them.
    """

    def __init__(self, path: Path | None = None, machine: str | None = None) -> None:
        self._path = path or default_path()
        self._machine = machine or machine_name()

    def get(self, name: str, kind: type[T]) -> T | None:
        """The value of that name if it is known and of that type, else None."""
        known = self._read().get(self._machine)
        if not isinstance(known, dict) or name not in known:
            return None
        try:
            return msgspec.convert(known[name], kind)
        except msgspec.ValidationError:
            return None

    def put(self, values: Mapping[str, object]) -> None:
        """Remembers values; another process may read the file meanwhile and sees it whole."""
        if not values:
            return
        machines = self._read()
        known = machines.get(self._machine)
        machines[self._machine] = (known if isinstance(known, dict) else {}) | msgspec.to_builtins(dict(values))
        # A cache that cannot be written costs a measurement at the next start and nothing else.
        with contextlib.suppress(OSError):
            _replace(self._path, json.dumps({"format": _FORMAT, "machines": machines}, indent=1))

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self._path.read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            return {}
        machines = content.get("machines")
        return machines if isinstance(machines, dict) else {}


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        try:
            file.write(text)
            file.close()
            os.replace(file.name, path)
        except OSError:
            os.unlink(file.name)
            raise


@functools.cache
def machine_name() -> str:
    """What a measurement depends on: processor, cores, memory, and the very library that computes."""
    n_cores, n_gib = psutil.cpu_count() or 1, round(psutil.virtual_memory().total / 2**30)
    return f"{_processor()}, {n_cores} cores, {n_gib} GiB, ggml {GGML_VERSION} {_build()}"


def _processor() -> str:
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        return next(names, platform.machine())
    return platform.processor() or platform.machine()


def _build() -> str:
    """Tells two builds of one version apart: compiler flags change speeds by a factor."""
    files = sorted(path for path in library_directory().glob("*ggml*") if path.is_file())
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return f"{zlib.crc32(repr(stats).encode()):08x}"
