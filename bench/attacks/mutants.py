"""Mutants of sound files: a seed and a number give always the same bytes.

Half of them are changed in their structure, as somebody would who knows the format: values of other types, extremes,
what is missing, twice or nested. The others are damaged as disks and networks do it.
"""

import json
import random
import struct
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.attacks.gguf_mutants import gguf_mutant
from bench.attacks.hostile_values import changed, nested, paths, value, without

Mutation = Callable[[random.Random, bytes], bytes]
_LENGTHS = (0, 1, 2, 255, 65536, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)


def mutant(kind: str, name: str, data: bytes, rng: random.Random) -> bytes:
    """The bytes of a sound file of that kind and name, made worse."""
    is_safetensors = kind in ("safetensors", "statistics")
    if rng.random() < 0.5:
        # Damage is most likely to be seen in the part before numbers that nobody checks.
        n_header = min(len(data), 16384) if kind in ("gguf", "native", "imatrix") else len(data)
        if is_safetensors and not name.endswith(".json"):
            n_header = 8 + int.from_bytes(data[:8], "little")
        return damaged(rng, data, n_header)
    return _BY_SUFFIX.get(Path(name).suffix, safetensors_mutant if is_safetensors else gguf_mutant)(rng, data)


def damaged(rng: random.Random, data: bytes, n_header: int = 0) -> bytes:
    """The data with flipped, lost, repeated or overwritten bytes, four out of five in the first `n_header` ones."""
    broken = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 3, 20))):
        span = n_header if n_header and rng.random() < 0.8 else len(broken)
        at = rng.randrange(max(1, min(span, len(broken))))
        kind = rng.randrange(8)
        if kind < 3 and broken:
            broken[at % len(broken)] ^= 1 << rng.randrange(8)
        elif kind == 3:
            del broken[at:]
        elif kind == 4:
            del broken[at : at + rng.choice((1, 4, 8, 100))]
        elif kind == 5:
            broken[at:at] = broken[at : at + rng.choice((1, 4, 8, 100))]
        elif kind == 6:
            size = rng.choice((4, 8))
            length = rng.choice(_LENGTHS) % (1 << 8 * size)
            broken[at : at + size] = length.to_bytes(size, "little")
        else:
            broken[at : at + 16] = rng.choice((bytes(16), b"\xff" * 16, rng.randbytes(16)))
    return bytes(broken)


def json_mutant(rng: random.Random, data: bytes) -> bytes:
    """A document with another value somewhere, without one, with one twice, or nested out of bounds."""
    document = json.loads(data)
    kind = rng.randrange(12)
    if kind == 0:
        depth = rng.choice((500, 5000, 200_000))
        return rng.choice((b"[" * depth, b'{"a":' * depth, b"[" * depth + b"]" * depth, b'{"model":' + b"[" * depth))
    if kind == 1 and document and isinstance(document, dict):
        key = rng.choice(list(document))
        return data.replace(b"{", b"{%b: %b, " % (json.dumps(key).encode(), json.dumps(value(rng)).encode()), 1)
    for _ in range(rng.choice((1, 1, 2))):
        document = _worse(rng, document)
    text = json.dumps(document)
    if kind == 2:
        text = text.replace("1", rng.choice(("1e999", "NaN", "9" * 5000, "-1", "1.0")), 1)
    return text.encode()


def toml_mutant(rng: random.Random, data: bytes) -> bytes:
    """A TOML document with another value somewhere, without one, or nested out of bounds."""
    document = tomllib.loads(data.decode())
    if rng.randrange(12) == 0:
        return b"a = " + b"[" * rng.choice((400, 900, 100_000))
    for _ in range(rng.choice((1, 1, 2))):
        document = _worse(rng, document)
    if not isinstance(document, dict):
        document = {"value": document}
    tables = {name: inner for name, inner in document.items() if isinstance(inner, dict)}
    lines = [f"{json.dumps(name)} = {_toml_value(inner)}" for name, inner in document.items() if name not in tables]
    for name, table in tables.items():
        lines.append(f"[{json.dumps(name)}]")
        lines += [f"{json.dumps(key)} = {_toml_value(inner)}" for key, inner in table.items()]
    return ("\n".join(lines) + "\n").encode("utf-8", "replace")


def _worse(rng: random.Random, document: Any) -> Any:
    # Every way down is as likely as the next, so that a long list does not hide all the rest.
    path: tuple[Any, ...] = ()
    here = document
    while isinstance(here, dict | list) and here and (not path or rng.random() < 0.75):
        step = rng.choice(list(here)) if isinstance(here, dict) else rng.randrange(len(here))
        path, here = (*path, step), here[step]
    kind = rng.randrange(6)
    if kind == 0:
        return without(document, path)
    if kind == 1:
        return changed(document, path, nested(rng, rng.choice((3, 40, 150))))
    if kind == 2 and len(path) and isinstance(path[-1], str):
        parent = dict(_at(document, path[:-1]))
        inner = parent.pop(path[-1])
        parent[rng.choice((path[-1].upper(), path[-1] + "x", "", "0"))] = inner
        return changed(document, path[:-1], parent)
    if kind == 3:
        others = list(paths(document))
        return changed(document, path, _at(document, rng.choice(others[:500])))
    return changed(document, path, value(rng))


def _at(document: Any, path: tuple[Any, ...]) -> Any:
    for step in path:
        document = document[step]
    return document


def _toml_value(inner: Any) -> str:
    if isinstance(inner, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml_value(item)}" for key, item in inner.items()) + "}"
    if isinstance(inner, list):
        return "[" + ", ".join(map(_toml_value, inner)) + "]"
    return "nan" if inner is None else json.dumps(inner)


def safetensors_mutant(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file whose header is another JSON document, or with other numbers behind a sound header."""
    length = int.from_bytes(data[:8], "little")
    header, payload = data[8 : 8 + length], data[8 + length :]
    kind = rng.randrange(6)
    if kind == 0:
        return rng.choice(_LENGTHS).to_bytes(8, "little") + header + payload
    if kind == 1:
        return data[: 8 + length] + _other_numbers(rng, payload)
    if kind == 2 and b'"statistics"' in header:
        document = json.loads(header)
        inner = document["__metadata__"]["statistics"]
        document["__metadata__"]["statistics"] = json_mutant(rng, inner.encode()).decode("utf-8", "replace")
        header = json.dumps(document).encode()
    else:
        header = json_mutant(rng, header)
    return len(header).to_bytes(8, "little") + header + payload


def _other_numbers(rng: random.Random, payload: bytes) -> bytes:
    """NaN, infinities and huge values in place of some, or all, numbers."""
    extreme = rng.choice(
        (b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff\xff\x7f\x7f", b"\xff\xff\xff\xff", b"\x00\x00\x00\x80")
    )
    if rng.random() < 0.3:
        return extreme * (len(payload) // 4) + payload[len(payload) // 4 * 4 :]
    changed_bytes = bytearray(payload)
    for _ in range(rng.choice((1, 10, 1000))):
        at = 4 * rng.randrange(len(payload) // 4)
        changed_bytes[at : at + 4] = extreme
    return bytes(changed_bytes)


def protobuf_mutant(rng: random.Random, data: bytes) -> bytes:
    """A protobuf message with one field more, of any number and wire type, with one that never ends, or twice."""
    kind = rng.randrange(5)
    number, wire = rng.choice((1, 2, 3, 4, 99, 2**20)), rng.randrange(8)
    tag = _varint(number << 3 | wire)
    if kind == 0:
        return data + tag + rng.randbytes(rng.choice((0, 1, 4, 8, 30)))
    if kind == 1:
        return data + _varint(1 << 3 | 2) + _varint(rng.choice(_LENGTHS)) + b"x"
    if kind == 2:
        return data + data
    if kind == 3:
        return b"\xff" * rng.choice((9, 1000, 1_000_000)) + data
    score = struct.pack("<f", rng.choice((float("nan"), float("inf"), -1e38)))
    text = rng.choice((b"", b"\xff\xfe", b"a" * 70_000, b"\x00", "▁".encode() * 3))
    piece = b"\x0a" + _varint(len(text)) + text + b"\x15" + score + b"\x18" + _varint(rng.choice((0, 1, 7, 2**40)))
    return data + b"\x0a" + _varint(len(piece)) + piece


def _varint(number: int) -> bytes:
    parts = []
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    return bytes((*parts, number))


_BY_SUFFIX: dict[str, Mutation] = {
    ".json": json_mutant,
    ".toml": toml_mutant,
    ".model": protobuf_mutant,
    ".dat": damaged,
}
