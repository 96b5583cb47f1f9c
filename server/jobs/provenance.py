"""What a result was measured with, so that somebody else can repeat it: the file, the versions, the machine."""

import hashlib
import os
import platform
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slimoe.offload.ggml.library import chosen
from slimoe.offload.gguf.header import GGUFFile, read_gguf
from slimoe.offload.machine.measurement_cache import machine_name
from slimoe.offload.resources.processors import usable_processors
from slimoe.server.options.installed import version_of

_BLOCK = 1 << 24
_LIBRARIES = ("slimoe", "gguf", "aiohttp", "numpy")


def file_facts(path: Path, *, whole: bool) -> dict[str, Any]:
    """A model file's name, size and hashes: of its headers, which tell models apart, and if asked for of all bytes.

    Of a model in shards each hash is of what the shards have, one after the other. Raises ModelFileError.
    """
    gguf = read_gguf(path)
    return {
        "name": gguf.path.name,
        "n_bytes": sum(os.path.getsize(shard) for shard in gguf.paths),
        "architecture": gguf.metadata.get("general.architecture"),
        "title": gguf.metadata.get("general.name"),
        "header_sha256": _digest(gguf.paths, _header_ends(gguf)),
        "sha256": _digest(gguf.paths, [None] * len(gguf.paths)) if whole else None,
    }


def run_facts(arguments: Sequence[str], versions: dict[str, str]) -> dict[str, Any]:
    """When, where, with which versions and by which command something ran."""
    library = chosen()
    found = {name: version_of(name) for name in _LIBRARIES} | {library.package.name: library.version}
    return {
        "command": shlex.join(["slimoe", *arguments]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {**found, **versions, "python": platform.python_version()},
        "machine": {
            "name": machine_name(),
            "system": platform.platform(),
            "usable_processors": usable_processors(),
        },
    }


def _header_ends(gguf: GGUFFile) -> list[int | None]:
    """Where the tensors of each shard begin; None for a shard without any, which is all header."""
    offsets: list[list[int]] = [[] for _ in gguf.paths]
    for tensor in gguf.tensors.values():
        offsets[tensor.shard].append(tensor.offset)
    return [min(found) if found else None for found in offsets]


def _digest(paths: Sequence[Path], ends: Sequence[int | None]) -> str:
    digest = hashlib.sha256()
    for path, end in zip(paths, ends, strict=True):
        with open(path, "rb") as file:
            left = os.fstat(file.fileno()).st_size if end is None else end
            while left and (block := file.read(min(left, _BLOCK))):
                digest.update(block)
                left -= len(block)
    return digest.hexdigest()
