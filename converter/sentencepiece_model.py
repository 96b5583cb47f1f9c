"""Reads a sentencepiece `tokenizer.model`, a protobuf message, without the protobuf and sentencepiece packages.

Source: sentencepiece_model.proto. Its piece types have the numbers of GGUF's token types.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from offload.errors import ModelFileError, UnsupportedModelError

_PIECE, _TRAINER, _NORMALIZER = 1, 2, 3
_BPE = 2
_AGAIN = "Download the tokenizer again."


@dataclass(frozen=True, slots=True)
class Piece:
    """One token: its text, merge score (higher first) and type."""

    text: str
    score: float
    type: int


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """The pieces in id order, and whether a text gets a space before it."""

    pieces: tuple[Piece, ...]
    add_dummy_prefix: bool

    @classmethod
    def read(cls, path: Path) -> "SentencePieceModel":
        """Raises ModelFileError for a damaged file, UnsupportedModelError for one that llama.cpp cannot express."""
        pieces: list[Piece] = []
        trainer: dict[int, bytes | int] = {}
        normalizer: dict[int, bytes | int] = {}
        try:
            for field, value in _fields(path.read_bytes()):
                if field == _PIECE:
                    pieces.append(_piece(_message(value)))
                elif field == _TRAINER:
                    trainer = dict(_fields(_message(value)))
                elif field == _NORMALIZER:
                    normalizer = dict(_fields(_message(value)))
        except (ValueError, IndexError, struct.error):
            raise ModelFileError(path, "this is not a whole sentencepiece model.", _AGAIN) from None
        if not pieces or not trainer:
            raise ModelFileError(path, "this is not a whole sentencepiece model.", _AGAIN)
        _check_expressible(path, trainer, normalizer)
        return cls(tuple(pieces), bool(normalizer.get(3, 1)))


def _check_expressible(path: Path, trainer: dict[int, bytes | int], normalizer: dict[int, bytes | int]) -> None:
    if trainer.get(3, 1) != _BPE:
        raise UnsupportedModelError(path, "only sentencepiece models of type BPE are supported.")
    if normalizer.get(2):
        raise UnsupportedModelError(path, "the tokenizer rewrites characters (NFKC), which a GGUF cannot express.")


def _piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    score = fields.get(2, 0)
    assert isinstance(score, int)
    kind = fields.get(3, 1)
    assert isinstance(kind, int)
    return Piece(_message(fields[1]).decode(), struct.unpack("<f", struct.pack("<I", score))[0], kind)


def _message(value: bytes | int) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where a message belongs")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """The (field number, value) pairs of a message; the four wire types that proto2 still uses."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        wire = tag & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        n_bytes = {1: 8, 5: 4}.get(wire, 0)
        if wire == 2:
            n_bytes, at = _varint(data, at)
        elif not n_bytes:
            raise ValueError(f"wire type {wire}")
        chunk = data[at : at + n_bytes]
        if len(chunk) != n_bytes:
            raise ValueError("the message is cut off")
        at += n_bytes
        yield tag >> 3, chunk if wire == 2 else int.from_bytes(chunk, "little")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number is too long")
