"""Keys that a file gets after it was written, such as its measured quality: in room that its header keeps for them.

The room comes right behind the architecture, so that one small write changes the number of keys, the keys and what is
left of the room. Nothing else of the file moves.
"""

import os
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from slimoe.converter.gguf.bytes import read_bytes
from slimoe.converter.gguf.header import pack_keys
from slimoe.offload.errors import ModelFileError, UsageError
from slimoe.offload.files.regular_file import reason
from slimoe.offload.gguf import keys
from slimoe.offload.gguf.header import Value, read_gguf

ROOM_BYTES = 1024
_ARCHITECTURE = "general.architecture"
_N_KEYS_OFFSET, _KEYS_OFFSET = 16, 24


def room_for_late_keys(architecture: str) -> dict[str, Value]:
    """The first keys of a header that later ones can be added to."""
    return {_ARCHITECTURE: architecture, keys.RESERVED: " " * ROOM_BYTES}


def add_late_keys(path: Path, values: Mapping[str, Value]) -> None:
    """Writes keys into a file's room, or other values in place of those that were written there before.

    Raises ModelFileError for a file without such a room or with too little of it, and UsageError for one that cannot
    be written.
    """
    metadata = read_gguf(path).metadata
    names = list(metadata)
    if keys.RESERVED not in names or names[0] != _ARCHITECTURE:
        raise ModelFileError(path, "its header has no room for further keys.", "Convert it again.")
    stored = {name: metadata[name] for name in names[1 : names.index(keys.RESERVED)]}
    late = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in stored.items()}
    before = pack_keys({**late, keys.RESERVED: metadata[keys.RESERVED]})
    wanted = {**late, **values}
    assert not (metadata.keys() - late.keys()) & values.keys(), "keys that the file has elsewhere"
    left = len(before) - len(pack_keys({**wanted, keys.RESERVED: ""}))
    if left < 0:
        problem = f"its header has no room for {', '.join(values)}: {-left} bytes are missing."
        raise ModelFileError(path, problem, "Record less, or convert it again.")
    after = pack_keys({**wanted, keys.RESERVED: " " * left})
    begin = _KEYS_OFFSET + len(pack_keys({_ARCHITECTURE: metadata[_ARCHITECTURE]}))
    assert len(after) == len(before)
    assert read_bytes(path, begin, len(before)).tobytes() == before
    n_keys = struct.pack("<Q", len(metadata) + len(wanted) - len(late))
    between = read_bytes(path, _KEYS_OFFSET, begin - _KEYS_OFFSET).tobytes()
    _overwrite(path, _N_KEYS_OFFSET, n_keys + between + after)


def _overwrite(path: Path, offset: int, data: bytes) -> None:
    """Changes a few bytes of a file, all of them or none; raises UsageError."""
    before = read_bytes(path, offset, len(data)).tobytes()
    try:
        with path.open("r+b", buffering=0) as file:
            try:
                _write(file.fileno(), data, offset)
            except OSError:
                _write(file.fileno(), before, offset)
                raise
    except OSError as error:
        if read_bytes(path, offset, len(data)).tobytes() not in (before, data):
            raise ModelFileError(
                path, f"its header could not be written ({reason(error)}).", "Convert again."
            ) from None
        raise UsageError(f"{path} cannot be written ({reason(error)}). Check its permissions.") from None


def _write(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        n_written = os.pwrite(descriptor, view, offset)
        view, offset = view[n_written:], offset + n_written
    os.fsync(descriptor)
