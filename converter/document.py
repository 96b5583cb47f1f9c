"""Decodes untrusted JSON and TOML into types: all of checkpoints, statistics, reports and recipes comes through here.

A type is a msgspec Struct, or any other that msgspec knows. Fields that the type does not have are skipped; fields of
another type than it says are refused, with their place and both types. Size and depth (by Python's limit on recursion)
are limited, so that no document takes more memory or time than its kind may need.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec

from slimoe.offload.errors import ModelFileError
from slimoe.offload.files.regular_file import open_regular, reason

T = TypeVar("T")

MAX_JSON_BYTES = 64 << 20
"""Most bytes of a JSON document: vocabularies of 260,000 tokens take some 35 MB."""
MAX_TOML_BYTES = 16 << 10
"""Most bytes of a TOML document: Python's parser takes memory with the square of a key's length."""

_AGAIN = "Download the checkpoint again."
_PLACE = re.compile(r"(?P<message>.*) - at `(?P<place>.*)`", re.DOTALL)

_WORDS = re.compile(rb'"(?:[^"\\]|\\.)*+"?|-?Infinity', re.DOTALL)
"""Strings, and what Python writes for numbers without an end, for which JSON has no word."""


class BadDocumentError(ValueError):
    """A document is too large, is no JSON or TOML, or has a value of another type; the message says what and where."""


def decode_json(data: bytes, kind: type[T], max_bytes: int = MAX_JSON_BYTES) -> T:
    """Decodes JSON as `kind`; raises BadDocumentError.

    Infinity, as Python's own json module writes it though JSON has no such word, is read as transformers 5 spells it,
    the object {"__float__": "Infinity"}.
    """

    def decode() -> T:
        try:
            return msgspec.json.decode(data, type=kind)
        except msgspec.ValidationError:
            raise
        except msgspec.DecodeError:
            return msgspec.json.decode(_WORDS.sub(_spelled, data), type=kind)

    return _decode(decode, "JSON", len(data), max_bytes)


def decode_toml(data: bytes, kind: type[T], max_bytes: int = MAX_TOML_BYTES) -> T:
    """Decodes TOML as `kind`; raises BadDocumentError."""
    return _decode(lambda: msgspec.toml.decode(data, type=kind), "TOML", len(data), max_bytes)


def read_json(path: Path, kind: type[T], max_bytes: int = MAX_JSON_BYTES) -> T:
    """Reads a JSON file of a checkpoint as `kind`; raises ModelFileError if it cannot be read or decoded."""
    try:
        with open_regular(path) as file:
            return decode_json(file.read(max_bytes + 1), kind, max_bytes)
    except OSError as error:
        raise ModelFileError(path, f"the file cannot be read ({reason(error)}).") from None
    except BadDocumentError as error:
        raise ModelFileError(path, f"{error}.", _AGAIN) from None


def _decode(decode: Callable[[], T], language: str, n_bytes: int, max_bytes: int) -> T:
    if n_bytes > max_bytes:
        raise BadDocumentError(f"this is larger than {max_bytes:,} bytes, the most that is read of such a file")
    try:
        return decode()
    except msgspec.ValidationError as error:
        raise BadDocumentError(_with_place(str(error))) from None
    except RecursionError:
        raise BadDocumentError(f"this is {language} that is nested too deeply") from None
    except (msgspec.DecodeError, ValueError) as error:
        # ValueError: bytes that are no text, and numbers with more digits than Python reads.
        raise BadDocumentError(f"this is not readable as {language} ({error})") from None


def _spelled(match: re.Match[bytes]) -> bytes:
    return match[0] if match[0].startswith(b'"') else b'{"__float__":"' + match[0] + b'"}'


def _with_place(message: str) -> str:
    """msgspec's message with the place in front, such as "rms_norm_eps: expected float, got array"."""
    match = _PLACE.fullmatch(message)
    text, place = (match["message"], match["place"]) if match else (message, "$")
    text = text.replace("`", "")
    return f"{place.removeprefix('$').removeprefix('.') or 'the whole of it'}: {text[:1].lower()}{text[1:]}"
