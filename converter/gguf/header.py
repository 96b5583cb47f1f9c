"""Packs a GGUF header into bytes, so that its exact size is known before a file exists.

Source: ggml's docs/gguf.md, version 3.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gguf import GGMLQuantizationType

from slimoe.offload.gguf.header import DEFAULT_ALIGNMENT, MAGIC, Value

ALIGNMENT_KEY = "general.alignment"
_VERSION = 3
_START_BYTES = 24
_U32, _I32, _F32, _BOOL, _STRING, _ARRAY, _U64, _I64 = 4, 5, 6, 7, 8, 9, 10, 11


@dataclass(frozen=True, slots=True)
class HeaderTensor:
    """One tensor's entry; `offset` counts from the start of the data."""

    name: str
    ne: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int


def padded(n_bytes: int, alignment: int) -> int:
    """The next multiple of the alignment."""
    return -(-n_bytes // alignment) * alignment


def alignment_of(metadata: Mapping[str, Value]) -> int:
    """What tensors' offsets are multiples of: a key's value, or GGUF's default."""
    return int(metadata.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT))


def pack_header(metadata: Mapping[str, Value], tensors: Sequence[HeaderTensor]) -> bytes:
    """The header up to the first byte of tensor data, padding included."""
    start = MAGIC + struct.pack("<IQQ", _VERSION, len(tensors), len(metadata))
    header = start + pack_keys(metadata) + pack_tensors(tensors)
    return header.ljust(padded(len(header), alignment_of(metadata)), b"\0")


def header_bytes(n_key_bytes: int, tensors: Sequence[HeaderTensor], alignment: int) -> int:
    """What `pack_header` makes of keys that pack to so many bytes, counted."""
    return padded(_START_BYTES + n_key_bytes + len(pack_tensors(tensors)), alignment)


def pack_keys(metadata: Mapping[str, Value]) -> bytes:
    """Keys and values, as they follow each other in a header."""
    return b"".join(part for key, value in metadata.items() for part in (_string(key), _value(value)))


def pack_tensors(tensors: Sequence[HeaderTensor]) -> bytes:
    """The tensors' entries, as they follow each other in a header."""
    parts = []
    for tensor in tensors:
        parts.append(_string(tensor.name))
        parts.append(struct.pack(f"<I{len(tensor.ne)}QIQ", len(tensor.ne), *tensor.ne, tensor.type, tensor.offset))
    return b"".join(parts)


def _string(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data


def _value(value: Value) -> bytes:
    if isinstance(value, list):
        assert value, "an empty array has no element type"
        # Token types are signed in GGUF, so an array of integers is of int32.
        kind = _I32 if _kind(value[0]) == _U32 else _kind(value[0])
        return struct.pack("<IIQ", _ARRAY, kind, len(value)) + b"".join(_scalar(kind, one) for one in value)
    kind = _kind(value)
    return struct.pack("<I", kind) + _scalar(kind, value)


def _kind(value: Value) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and not 0 <= value < 1 << 32:
        return _U64 if value > 0 else _I64
    return {bool: _BOOL, int: _U32, float: _F32, str: _STRING}[type(value)]


def _scalar(kind: int, value: Value) -> bytes:
    if kind == _STRING:
        return _string(value)
    return struct.pack({_U32: "<I", _I32: "<i", _F32: "<f", _BOOL: "<?", _U64: "<Q", _I64: "<q"}[kind], value)
