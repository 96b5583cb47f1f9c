"""Mutants of GGUF files that are whole in their bytes and wrong in what they say."""

import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench.attacks.hostile_values import TEXTS

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_RANGES = {"B": (0, 2**8), "b": (-(2**7), 2**7), "H": (0, 2**16), "h": (-(2**15), 2**15), "I": (0, 2**32)}
_RANGES |= {"i": (-(2**31), 2**31), "Q": (0, 2**64), "q": (-(2**63), 2**63)}
_INTEGERS = (
    *(0, 1, 2, 3, 5, 7, 64, 255, 256, 4097, 65535, 2**24),
    *(2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1, -1, -2),
)
_FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-45, 1e-30, 1e30, 3e38, float("nan"), float("inf"), float("-inf"))


@dataclass(frozen=True, slots=True)
class Key:
    """A metadata value as it is stored: its kind, that of its elements if it is an array, and the value."""

    name: bytes
    kind: int
    item: int
    value: Any


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor's entry: its name, sizes in ggml's order, the number of its type, and where its data begin."""

    name: bytes
    ne: tuple[int, ...]
    type: int
    offset: int


@dataclass(slots=True)
class Header:
    """A file's header, and how many bytes it has."""

    keys: list[Key]
    tensors: list[Tensor]
    n_bytes: int = 0

    @property
    def alignment(self) -> Any:
        """What the data's offsets are multiples of, by the file's own word, which may be nonsense."""
        return next((key.value for key in self.keys if key.name == b"general.alignment"), 32)


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, code: str) -> Any:
        (result,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return result

    def text(self) -> bytes:
        length = self.take("Q")
        self.at += length
        return self.data[self.at - length : self.at]

    def scalar(self, kind: int) -> Any:
        return self.text() if kind == _STRING else self.take(_SCALARS[kind])

    def key(self) -> Key:
        name, kind = self.text(), self.take("I")
        if kind != _ARRAY:
            return Key(name, kind, 0, self.scalar(kind))
        item, count = self.take("I"), self.take("Q")
        return Key(name, kind, item, [self.scalar(item) for _ in range(count)])

    def tensor(self) -> Tensor:
        name, n_dims = self.text(), self.take("I")
        return Tensor(name, tuple(self.take("Q") for _ in range(n_dims)), self.take("I"), self.take("Q"))


def read_header(data: bytes) -> Header:
    """The header of a sound file."""
    reader = _Reader(data)
    reader.at = 8
    n_tensors, n_keys = reader.take("Q"), reader.take("Q")
    keys = [reader.key() for _ in range(n_keys)]
    tensors = [reader.tensor() for _ in range(n_tensors)]
    return Header(keys, tensors, reader.at)


def pack_header(header: Header) -> bytes:
    """A header's bytes in version 3 of the format, without padding."""
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(header.tensors), len(header.keys))]
    for key in header.keys:
        parts += [_text(key.name), struct.pack("<I", key.kind)]
        if key.kind == _ARRAY:
            parts.append(struct.pack("<IQ", key.item, len(key.value)))
            parts += [_scalar(key.item, one) for one in key.value]
        else:
            parts.append(_scalar(key.kind, key.value))
    for tensor in header.tensors:
        packed = struct.pack(f"<I{len(tensor.ne)}QIQ", len(tensor.ne), *tensor.ne, tensor.type, tensor.offset)
        parts += [_text(tensor.name), packed]
    return b"".join(parts)


def rewritten(data: bytes, change: Callable[[Header], None]) -> bytes:
    """A sound file with its header changed in place by `change`, and its data behind that as before."""
    header = read_header(data)
    payload = data[-(-header.n_bytes // header.alignment) * header.alignment :]
    change(header)
    packed, alignment = pack_header(header), header.alignment
    if isinstance(alignment, int) and 0 < alignment <= 65536:
        packed = packed.ljust(-(-len(packed) // alignment) * alignment, b"\0")
    return packed + payload


def gguf_mutant(rng: random.Random, data: bytes) -> bytes:
    """The file with one to three keys or tensors that say something else, its data behind it as before."""

    def worsen(header: Header) -> None:
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            if header.tensors and rng.random() < 0.3:
                _worse_tensor(rng, header.tensors)
            elif header.keys:
                _worse_key(rng, header.keys)

    return rewritten(data, worsen)


def _worse_key(rng: random.Random, keys: list[Key]) -> None:
    at = rng.randrange(len(keys))
    # The few keys that are lists hold most of what can be wrong.
    lists = [n for n, key in enumerate(keys) if key.kind == _ARRAY]
    if lists and rng.random() < 0.4:
        at = rng.choice(lists)
    key, kind = keys[at], rng.randrange(8)
    if kind == 0:
        del keys[at]
    elif kind == 1:
        keys.append(key)
    elif kind == 2:
        name = rng.choice((key.name + b"x", b"", b"general.alignment", b"\xff", key.name.upper()))
        keys[at] = replace(key, name=name)
    elif kind == 3:
        keys[at] = replace(rng.choice(keys), name=key.name)
    elif kind == 4 or key.kind != _ARRAY:  # another value, of the same type as often as of another
        other = key.kind if rng.random() < 0.6 else rng.choice((0, 4, 5, 6, 7, 8, 9, 10, 11, 12))
        if other == _ARRAY:
            item = rng.choice((4, 5, 6, 7, _STRING))
            values = [_any_scalar(rng, item) for _ in range(rng.choice((0, 1, 2, 384, 3000)))]
            keys[at] = Key(key.name, other, item, values)
        else:
            keys[at] = Key(key.name, other, 0, _any_scalar(rng, other))
    else:
        keys[at] = replace(key, value=_worse_list(rng, key.item, key.value))


def _worse_list(rng: random.Random, item: int, values: Sequence[Any]) -> list[Any]:
    worse = list(values)
    kind = rng.randrange(5)
    if kind == 0 or not worse:
        return worse[: rng.randrange(len(worse) + 1)]
    if kind == 1:
        return worse + worse[: rng.choice((1, len(worse)))]
    for _ in range(rng.choice((1, 1, 5, len(worse)))):
        worse[rng.randrange(len(worse))] = rng.choice(worse) if kind == 2 else _any_scalar(rng, item)
    return worse


def _any_scalar(rng: random.Random, kind: int) -> Any:
    if kind == _STRING:
        return rng.choice((rng.choice(TEXTS).encode("utf-8", "surrogatepass"), b"\xff\xfe", b"a" * 100_000, b"a b"))
    code = _SCALARS[kind]
    if code in "fd":
        return rng.choice(_FLOATS)
    if code == "?":
        return rng.random() < 0.5
    low, high = _RANGES[code]
    return rng.choice([number for number in _INTEGERS if low <= number < high])


def _worse_tensor(rng: random.Random, tensors: list[Tensor]) -> None:
    at = rng.randrange(len(tensors))
    tensor, kind = tensors[at], rng.randrange(7)
    if kind == 0:
        del tensors[at]
    elif kind == 1:
        tensors.append(tensor)
    elif kind == 2:
        name = rng.choice((tensor.name + b"x", b"", b"\xff", tensors[rng.randrange(len(tensors))].name, b"a" * 70_000))
        tensors[at] = replace(tensor, name=name)
    elif kind == 3:
        sizes = list(tensor.ne)
        sizes[rng.randrange(len(sizes))] = abs(rng.choice(_INTEGERS))
        tensors[at] = replace(tensor, ne=tuple(sizes))
    elif kind == 4:
        shapes = (tensor.ne[::-1], tensor.ne[:-1] or (1,), (*tensor.ne, 1), tensor.ne * 3)
        tensors[at] = replace(tensor, ne=rng.choice(shapes))
    elif kind == 5:
        tensors[at] = replace(tensor, type=rng.choice((*range(42), 99, 2**32 - 1)))
    else:
        tensors[at] = replace(tensor, offset=rng.choice((0, 1, 32, tensor.offset + 32, 2**40, 2**63, 2**64 - 32)))


def _text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _scalar(kind: int, value: Any) -> bytes:
    return _text(value) if kind == _STRING else struct.pack("<" + _SCALARS[kind], value)
