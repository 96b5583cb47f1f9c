"""Reads a sentencepiece `tokenizer.model`, a protobuf message, without the protobuf and sentencepiece packages.

Source: sentencepiece_model.proto. Its piece types have the numbers of GGUF's token types.
"""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gguf import TokenType

from slimoe.converter.source.tokenizer.bpe_model import BYTES
from slimoe.converter.source.tokenizer.steps import inexpressible
from slimoe.offload.errors import ModelFileError, UnsupportedModelError
from slimoe.offload.files.regular_file import open_regular, reason

_PIECE, _TRAINER, _NORMALIZER, _DENORMALIZER = 1, 2, 3, 5
_TYPES = {1: "unigram", 2: "BPE", 3: "word", 4: "char"}
_BPE = 2
_MAX_BYTES = 64 << 20
_BYTES = frozenset(BYTES)
_PIECE_TYPES = frozenset(int(kind) for kind in TokenType)
_AGAIN = "Download the tokenizer again."


@dataclass(frozen=True, slots=True)
class Piece:
    """One token: its text, merge score (higher first) and type."""

    text: str
    score: float
    type: int


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """A sentencepiece model: its pieces in the order of ids, and whether a text gets a space before it."""

    pieces: tuple[Piece, ...]
    add_dummy_prefix: bool

    @classmethod
    def read(cls, path: Path) -> "SentencePieceModel":
        """Raises ModelFileError for a damaged file, UnsupportedModelError for one that llama.cpp cannot express."""
        try:
            with open_regular(path) as file:
                data = file.read(_MAX_BYTES + 1)
        except OSError as error:
            raise ModelFileError(path, f"the file cannot be read ({reason(error)}).") from None
        if len(data) > _MAX_BYTES:
            raise ModelFileError(
                path, f"this is larger than {_MAX_BYTES:,} bytes, the most that is read of such a file."
            )
        pieces: list[Piece] = []
        trainer: dict[int, bytes | int] = {}
        normalizer: dict[int, bytes | int] = {}
        denormalizer: dict[int, bytes | int] = {}
        try:
            for field, value in _fields(data):
                if field == _PIECE:
                    pieces.append(_piece(_message(value)))
                elif field == _TRAINER:
                    trainer = dict(_fields(_message(value)))
                elif field == _NORMALIZER:
                    normalizer = dict(_fields(_message(value)))
                elif field == _DENORMALIZER:
                    denormalizer = dict(_fields(_message(value)))
        except (ValueError, LookupError, struct.error):
            raise ModelFileError(path, "this is not a whole sentencepiece model.", _AGAIN) from None
        if not pieces or not trainer:
            raise ModelFileError(path, "this is not a whole sentencepiece model.", _AGAIN)
        _check_pieces(path, pieces)
        _check_expressible(path, pieces, trainer, normalizer)
        if denormalizer.get(2):
            raise inexpressible(path, "denormaliser", "precompiled_charsmap")
        return cls(tuple(pieces), bool(normalizer.get(3, 1)))


def _check_pieces(path: Path, pieces: list[Piece]) -> None:
    seen: set[str] = set()
    for token, piece in enumerate(pieces):
        if not piece.text or piece.text in seen:
            raise ModelFileError(path, f"piece {token}, {piece.text!r:.100}, is empty or there twice.", _AGAIN)
        seen.add(piece.text)
        if not math.isfinite(piece.score):
            raise ModelFileError(path, f"piece {token}, {piece.text!r:.100}, has the score {piece.score}.", _AGAIN)
        is_byte = piece.text in _BYTES
        if piece.type not in _PIECE_TYPES or (piece.type == TokenType.BYTE) != is_byte:
            raise ModelFileError(path, f"piece {token}, {piece.text!r:.100}, has the type {piece.type}.", _AGAIN)


def _check_expressible(
    path: Path, pieces: list[Piece], trainer: dict[int, bytes | int], normalizer: dict[int, bytes | int]
) -> None:
    """Refuses what llama.cpp's sentencepiece does not do; absent fields have the defaults of the .proto file."""
    kind = trainer.get(3, 1)
    if kind != _BPE:
        name = _TYPES.get(kind, "unknown") if isinstance(kind, int) else "unknown"
        raise UnsupportedModelError(path, f"this is a sentencepiece model of type {name}; only BPE is supported.")
    if normalizer.get(2):
        name = _message(normalizer.get(1, b"unnamed")).decode("utf-8", "replace")
        raise inexpressible(path, "normaliser", f"{name:.50} (precompiled_charsmap)")
    if normalizer.get(4, 1):
        raise inexpressible(path, "normaliser", "remove_extra_whitespaces true")
    if not normalizer.get(5, 1):
        raise inexpressible(path, "normaliser", "escape_whitespaces false")
    if trainer.get(24, 0):
        raise inexpressible(path, "setting", "treat_whitespace_as_suffix true")
    if any(piece.type == TokenType.UNUSED for piece in pieces):
        raise inexpressible(path, "setting", "of unused pieces")
    n_bytes = sum(piece.type == TokenType.BYTE for piece in pieces)
    if not trainer.get(35, 0) or n_bytes != len(_BYTES):
        raise inexpressible(path, "setting", f"byte_fallback false (or {n_bytes} of 256 bytes)")


def _piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    score = fields.get(2, 0)
    kind = fields.get(3, 1)
    if not isinstance(score, int) or not isinstance(kind, int):
        raise ValueError("a message where a number belongs")
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
