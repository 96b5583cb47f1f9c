"""The GGUF files in a folder, as models to serve. Apart: it reads names and sizes, and no file."""

import os
from dataclasses import dataclass
from pathlib import Path

from slimoe.offload.errors import UsageError
from slimoe.offload.files.regular_file import reason
from slimoe.offload.gguf.header import SHARD_NAME


@dataclass(frozen=True, slots=True)
class FoundModel:
    """A model in a folder: its file, or the first of its shards, and the bytes of all of them."""

    name: str
    path: Path
    n_bytes: int


def models_in(folder: Path) -> list[FoundModel]:
    """The models in a folder, by name; folders in it are not looked into. Raises UsageError when there is none."""
    try:
        files = sorted((entry.name, entry) for entry in os.scandir(folder) if not entry.name.startswith("."))
    except OSError as error:
        problem = f"--models {folder} cannot be read ({reason(error)}). Name a folder with GGUF files."
        raise UsageError(problem) from None
    sizes: dict[str, int] = {}
    first: dict[str, str] = {}
    for name, entry in files:
        if not name.lower().endswith(".gguf") or entry.is_dir():
            continue
        shard = SHARD_NAME.match(name)
        stem = shard["stem"] if shard is not None else name[: -len(".gguf")]
        # Of two files that would have the same name, the second is known by its whole one.
        known = name if shard is None and stem in first else stem
        first.setdefault(known, name)
        sizes[known] = sizes.get(known, 0) + (entry.stat().st_size if entry.is_file() else 0)
    if not first:
        raise UsageError(f"--models {folder} has no GGUF file. Put models there, or name another folder.")
    return [FoundModel(known, (folder / name).absolute(), sizes[known]) for known, name in first.items()]
