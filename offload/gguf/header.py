"""Reads the header of a GGUF file, of one or many shards, without touching tensor data.

Written here and not taken from gguf-py because a header must be read in milliseconds (a 32k vocabulary
takes gguf-py seconds) and because every count in a damaged file is checked against the bytes that are
there before anything is allocated. Source: ggml's docs/gguf.md, versions 2 and 3.
"""

import math
import mmap
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from slimoe.offload.errors import ModelFileError, UnsupportedModelError
from slimoe.offload.files.regular_file import open_regular, reason
from slimoe.offload.gguf.foreign_file import foreign_directory, foreign_file

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4
MAX_STRING_BYTES, MAX_ARRAY_ITEMS = 1 << 26, 1 << 24
"""No header holds more; a damaged count in a file of many gigabytes would otherwise be believed."""
SHARD_NAME = re.compile(r"^(?P<stem>.+)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf$")

_DOWNLOAD_AGAIN = "Download or convert it again."
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

Value = Any
"""A metadata value: bool, int, float, str, list[str], or a numpy array of numbers."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: `ne` in ggml's order (contiguous axis first), `offset` from the shard's start."""

    name: str
    ne: tuple[int, ...]
    type: GGMLQuantizationType
    shard: int
    offset: int
    n_bytes: int

    @property
    def n_elements(self) -> int:
        """Number of weights."""
        return int(np.prod(self.ne, dtype=np.int64))


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """A read header: shard paths, metadata (of the first shard) and tensors by name, in file order."""

    paths: tuple[Path, ...]
    metadata: dict[str, Value]
    tensors: dict[str, TensorInfo]

    @property
    def path(self) -> Path:
        """The first shard: what a person calls the model."""
        return self.paths[0]

    @property
    def n_bytes(self) -> int:
        """Size of all shards on disk."""
        return sum(path.stat().st_size for path in self.paths)


def number_array(value: Value) -> np.ndarray | None:
    """A metadata value that is a list of numbers, as an array of one dimension; None for any other value.

    numpy would also make an array of texts, in which each takes as much room as the longest.
    """
    if isinstance(value, list) and not any(isinstance(one, str) for one in value):
        value = np.asarray(value)
    return value if isinstance(value, np.ndarray) and value.ndim == 1 else None


class _Cursor:
    """A read position in mapped bytes that refuses to run past the end."""

    def __init__(self, path: Path, data: mmap.mmap | bytes) -> None:
        self.path = path
        self.data = data
        self.at = 0

    def take(self, n_bytes: int) -> int:
        """Advances by `n_bytes` and returns where they begin."""
        begin = self.at
        if n_bytes > len(self.data) - begin:
            raise ModelFileError(self.path, "the file ends inside its header.", _DOWNLOAD_AGAIN)
        self.at += n_bytes
        return begin

    def scalar(self, code: str) -> Any:
        size = struct.calcsize("<" + code)
        return struct.unpack_from("<" + code, self.data, self.take(size))[0]

    def string(self) -> str:
        n_bytes = self.scalar("Q")
        if n_bytes > MAX_STRING_BYTES:
            raise ModelFileError(self.path, f"the header holds a string of {n_bytes} bytes.", _DOWNLOAD_AGAIN)
        begin = self.take(n_bytes)
        return self.data[begin : begin + n_bytes].decode("utf-8", "surrogateescape")

    def value(self, kind: int) -> Value:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        raise ModelFileError(self.path, f"the header holds a value of unknown kind {kind}.", _DOWNLOAD_AGAIN)

    def array(self) -> Value:
        kind, count = self.scalar("I"), self.scalar("Q")
        if count > MAX_ARRAY_ITEMS:
            raise ModelFileError(self.path, f"the header holds an array of {count} values.", _DOWNLOAD_AGAIN)
        if kind in _SCALARS:
            dtype = np.dtype("<" + _SCALARS[kind]) if kind != 7 else np.dtype(np.bool_)
            begin = self.take(count * dtype.itemsize)
            return np.frombuffer(self.data[begin : begin + count * dtype.itemsize], dtype)
        if kind != _STRING:
            raise UnsupportedModelError(self.path, f"the header holds an array of kind {kind}, which is not readable.")
        if count * 8 > len(self.data) - self.at:
            raise ModelFileError(self.path, "the file ends inside its header.", _DOWNLOAD_AGAIN)
        return [self.string() for _ in range(count)]


def shard_paths(path: Path) -> tuple[Path, ...]:
    """All shards of the model that `path` names; raises ModelFileError when one is missing."""
    match = SHARD_NAME.match(path.name)
    if match is None:
        return (path,)
    count = int(match["count"])
    if not 1 <= int(match["no"]) <= count:
        problem = f"the name counts its shards wrongly: it says shard {int(match['no'])} of {count}."
        raise ModelFileError(path, problem, "Name the shards NAME-00001-of-0000N.gguf, as they were.")
    paths = tuple(path.with_name(f"{match['stem']}-{no:05d}-of-{count:05d}.gguf") for no in range(1, count + 1))
    missing = [p.name for p in paths if not os.path.isfile(p)]
    if missing:
        raise ModelFileError(path, f"shard {missing[0]} is missing.", "Put all shards into one directory.")
    return paths


def read_gguf(path: str | Path) -> GGUFFile:
    """Reads the header of `path` and of its further shards.

    Raises ModelFileError for a missing, truncated or corrupt file and UnsupportedModelError for a tensor type
    or file version that this program does not know.
    """
    paths = shard_paths(Path(path))
    metadata: dict[str, Value] = {}
    tensors: dict[str, TensorInfo] = {}
    for shard, shard_path in enumerate(paths):
        shard_metadata, shard_tensors = _read_shard(shard_path, shard)
        metadata = metadata or shard_metadata
        for tensor in shard_tensors:
            if tensor.name in tensors:
                raise ModelFileError(shard_path, f"tensor {tensor.name} occurs twice.", _DOWNLOAD_AGAIN)
            tensors[tensor.name] = tensor
    _check_shard_count(paths, metadata, tensors)
    return GGUFFile(paths, metadata, tensors)


def parse_gguf(path: Path, header: bytes, n_bytes: int) -> GGUFFile:
    """Parses a header as `read_gguf` would, of a file of `n_bytes` that begins with it; errors name `path`."""
    metadata, tensors = _parse(_Cursor(path, header), 0, n_bytes)
    return GGUFFile((path,), metadata, {tensor.name: tensor for tensor in tensors})


def _check_shard_count(paths: tuple[Path, ...], metadata: dict[str, Value], tensors: dict[str, TensorInfo]) -> None:
    count = _count(paths[0], metadata, "split.count", 0) or 1
    if count != len(paths) == 1:
        number, name = _count(paths[0], metadata, "split.no", 0) + 1, f"{paths[0].stem}-0000N-of-{count:05d}.gguf"
        problem = f"this is shard {number} of {count}, and its name does not say so."
        raise ModelFileError(paths[0], problem, f"Name the shards {name}, and put all of them into one directory.")
    if count != len(paths):
        problem = f"the file says it has {count} shards, its name says {len(paths)}."
        raise ModelFileError(paths[0], problem, "Name the shards NAME-00001-of-0000N.gguf as they were.")
    declared = _count(paths[0], metadata, "split.tensors.count", len(tensors))
    if declared != len(tensors):
        raise ModelFileError(paths[0], f"{declared} tensors are declared, {len(tensors)} are there.", _DOWNLOAD_AGAIN)


def _count(path: Path, metadata: dict[str, Value], key: str, default: int) -> int:
    value = metadata.get(key, default)
    if not isinstance(value, int):
        raise ModelFileError(path, f"{key} is {value!r}, which is no count.", _DOWNLOAD_AGAIN)
    return value


def _read_shard(path: Path, shard: int) -> tuple[dict[str, Value], list[TensorInfo]]:
    try:
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size < 24:
                head = file.read()
                if not head.startswith(MAGIC[: len(head)]):
                    raise foreign_file(path, head)
                raise ModelFileError(path, "this is not a GGUF file: it is too short.", _DOWNLOAD_AGAIN)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(_Cursor(path, data), shard, len(data))
    except FileNotFoundError:
        raise ModelFileError(path, "there is no such file.", "Check the path.") from None
    except IsADirectoryError:
        raise foreign_directory(path) from None
    except OSError as error:
        raise ModelFileError(path, f"the file cannot be read ({reason(error)}).") from None


def _parse(cursor: _Cursor, shard: int, n_bytes: int) -> tuple[dict[str, Value], list[TensorInfo]]:
    path = cursor.path
    begin = cursor.take(4)
    if cursor.data[begin : begin + 4] != MAGIC:
        raise foreign_file(path, bytes(cursor.data[:32]))
    version = cursor.scalar("I")
    if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
        raise UnsupportedModelError(path, "this is a big-endian GGUF file.", "Get the little-endian one.")
    if version not in VERSIONS:
        raise UnsupportedModelError(path, f"GGUF version {version} is not readable, only 2 and 3 are.")
    n_tensors, n_keys = cursor.scalar("Q"), cursor.scalar("Q")
    metadata: dict[str, Value] = {}
    for _ in range(n_keys):
        key = cursor.string()
        if key in metadata:
            raise ModelFileError(path, f"the header holds the key {key!r} twice.", _DOWNLOAD_AGAIN)
        metadata[key] = cursor.value(cursor.scalar("I"))
    headers = []
    for _ in range(n_tensors):
        name, n_dims = cursor.string(), cursor.scalar("I")
        if not 1 <= n_dims <= MAX_DIMS:
            raise ModelFileError(path, f"tensor {name!r} has {n_dims} dimensions.", _DOWNLOAD_AGAIN)
        ne = tuple(cursor.scalar("Q") for _ in range(n_dims))
        headers.append((name, ne, cursor.scalar("I"), cursor.scalar("Q")))
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise ModelFileError(path, f"the alignment {alignment!r} is not a power of two.", _DOWNLOAD_AGAIN)
    data_begin = -(-cursor.at // alignment) * alignment
    infos = [_tensor_info(path, shard, n_bytes, data_begin, *header) for header in headers]
    # Tensors follow each other without gaps but padding: anything else is damage that could go unseen.
    expected = data_begin
    for info in infos:
        if info.offset != expected:
            problem = f"tensor {info.name} lies at byte {info.offset}, but belongs at {expected}."
            raise ModelFileError(path, problem, _DOWNLOAD_AGAIN)
        expected += -(-info.n_bytes // alignment) * alignment
    return metadata, infos


def _tensor_info(
    path: Path, shard: int, file_bytes: int, data_begin: int, name: str, ne: tuple[int, ...], kind: int, offset: int
) -> TensorInfo:
    try:
        tensor_type = GGMLQuantizationType(kind)
    except ValueError:
        problem = f"tensor {name} has type {kind}, which this program does not know."
        raise UnsupportedModelError(path, problem, "Use a file of a known type, such as Q4_K.") from None
    if min(ne) <= 0:
        raise ModelFileError(path, f"tensor {name} has an empty shape {ne}.", _DOWNLOAD_AGAIN)
    block, block_bytes = GGML_QUANT_SIZES[tensor_type]
    if ne[0] % block:
        raise ModelFileError(path, f"tensor {name}: rows of {ne[0]} do not divide into {tensor_type.name} blocks.")
    n_bytes = math.prod(ne) // block * block_bytes
    begin = data_begin + offset
    if begin + n_bytes > file_bytes:
        problem = f"the file is truncated: tensor {name} ends at byte {begin + n_bytes}, the file at {file_bytes}."
        raise ModelFileError(path, problem, _DOWNLOAD_AGAIN)
    return TensorInfo(name, ne, tensor_type, shard, begin, n_bytes)
