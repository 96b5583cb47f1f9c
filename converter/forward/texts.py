"""The texts that a model is calibrated on, as sequences of tokens: files of a person's own, or a small mixture.

A file is plain text, or JSON lines: objects with `messages`, which the model's chat template writes out, or `text`.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from slimoe.converter.document import decode_json
from slimoe.offload.errors import ModelFileError, UsageError
from slimoe.offload.files.regular_file import read_regular, reason

MIN_TOKENS = 2048
DEFAULT_TOKENS, DEFAULT_LENGTH = 131072, 512
_SHORTEST = 16
"""Tokens that a text's last sequence needs to count, unless it is all there is."""
_CHARACTERS_PER_TOKEN = 32
_EXCERPTS = 64
_GOLDEN = (5**0.5 - 1) / 2
_HELD_OUT = 0.1
"""The part of our own mixture that is not calibrated on: the last lines of each file, for evaluating what was made."""
_OWN = Path(__file__).parents[1] / "texts"


class TextEncoder(Protocol):
    """A model's tokenizer and chat template."""

    def text(self, text: str, *, at_start: bool) -> list[int]:
        """The ids of a text, after the mark that begins one if it is not cut out of another."""
        ...

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The ids of a whole conversation; raises SlimoeError when the template refuses it."""
        ...


@dataclass(frozen=True, slots=True)
class TextFile:
    """A file of texts of one domain, of which the lines between the parts `begin` and `end` of its length count."""

    domain: str
    path: Path
    begin: float = 0.0
    end: float = 1.0

    @classmethod
    def parse(cls, value: str) -> "TextFile":
        """Parses FILE or DOMAIN=FILE; without a domain it is the file's name."""
        domain, equals, path = value.partition("=")
        if equals and domain and not os.path.lexists(value):
            return cls(domain, Path(path))
        return cls(Path(value).stem, Path(value))


@dataclass(frozen=True, slots=True)
class CalibrationText:
    """Sequences of token ids, and the domain of each."""

    tokens: tuple[tuple[int, ...], ...]
    domains: tuple[str, ...]

    @property
    def n_tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(map(len, self.tokens))

    @property
    def hash(self) -> str:
        """A digest of the tokens and domains."""
        return hashlib.sha256(json.dumps([self.tokens, self.domains]).encode()).hexdigest()


def default_texts() -> tuple[TextFile, ...]:
    """The mixture that comes with the program; where its parts are from stands beside them."""
    return _own_texts(0.0, 1.0 - _HELD_OUT)


def held_out_texts() -> tuple[TextFile, ...]:
    """What `default_texts` leaves out of the mixture."""
    return _own_texts(1.0 - _HELD_OUT, 1.0)


def _own_texts(begin: float, end: float) -> tuple[TextFile, ...]:
    paths = sorted(path for path in _OWN.iterdir() if path.suffix in (".txt", ".jsonl"))
    return tuple(TextFile(path.stem, path, begin, end) for path in paths)


def read_texts(
    files: Sequence[TextFile], encoder: TextEncoder, n_tokens: int, length: int, flag: str = "--text"
) -> CalibrationText:
    """Reads at most `n_tokens` in sequences of at most `length`, evenly from all domains and all over each file.

    Raises ModelFileError for a file that is no text, and UsageError for lines that are none or when there are fewer
    tokens than `MIN_TOKENS`, which says that `flag` takes more.
    """
    pieces: dict[str, list[tuple[int, ...]]] = {file.domain: [] for file in files}
    for file in files:
        for ids in documents(file, encoder, _CHARACTERS_PER_TOKEN * n_tokens):
            for begin in range(0, len(ids), length):
                piece = tuple(ids[begin : begin + length])
                if len(piece) >= _SHORTEST or (begin == 0 and len(piece) > 1):
                    pieces[file.domain].append(piece)
    # By steps of the golden ratio, so that any number of the first pieces come from all over the domain's files.
    spread = [
        [one for _, one in sorted(enumerate(some), key=lambda at: at[0] * _GOLDEN % 1)] for some in pieces.values()
    ]
    tokens: list[tuple[int, ...]] = []
    domains: list[str] = []
    n_left = n_tokens
    for in_turn in itertools.zip_longest(*spread):
        for domain, one in zip(pieces, in_turn, strict=True):
            if one is not None and n_left:
                tokens.append(one[:n_left])
                domains.append(domain)
                n_left -= len(tokens[-1])
    text = CalibrationText(tuple(tokens), tuple(domains))
    if text.n_tokens < MIN_TOKENS:
        least = f"{MIN_TOKENS - text.n_tokens:,} less than the least that a calibration needs"
        hint = "Ask for more --tokens." if n_tokens < MIN_TOKENS else f"Give longer or more texts with {flag}."
        raise UsageError(f"The calibration would have {text.n_tokens:,} tokens, {least}. {hint}")
    return text


def documents(file: TextFile, encoder: TextEncoder, n_characters: int) -> Iterator[list[int]]:
    """The ids of each text in a file; of a long text, those of about `n_characters` from all over it.

    Raises ModelFileError for a file that is no text, and UsageError for lines that are neither texts nor conversations.
    """
    try:
        whole = read_regular(file.path).decode("utf-8").replace("\r\n", "\n")
    except OSError as error:
        raise ModelFileError(file.path, f"the text cannot be read ({reason(error)}).", "Name a text file.") from None
    except UnicodeDecodeError:
        raise ModelFileError(
            file.path, "this is not UTF-8 text.", "Give plain text, or .jsonl with messages."
        ) from None
    text = whole[_line_at(whole, file.begin) : _line_at(whole, file.end)]
    if file.path.suffix == ".jsonl":
        yield from (_entry(file.path, n, line, encoder) for n, line in enumerate(text.splitlines(), 1) if line.strip())
        return
    for begin, part in _excerpts(text, n_characters):
        yield encoder.text(part, at_start=begin == 0)


def _line_at(text: str, part: float) -> int:
    """Where the first line begins behind a part of the text's length."""
    at = round(part * len(text))
    return at if at in (0, len(text)) else (text.find("\n", at) + 1 or len(text))


def _excerpts(text: str, n_characters: int) -> Iterator[tuple[int, str]]:
    """(where it begins, text): all of it, or where that is too long evenly spread parts that begin with a line."""
    if len(text) <= n_characters:
        yield 0, text
        return
    size = max(1, n_characters // _EXCERPTS)
    for n in range(_EXCERPTS):
        at = n * len(text) // _EXCERPTS
        begin = text.find("\n", at, at + size) + 1 if at else 0
        yield (begin or at), text[begin or at : at + size]


class _Message(msgspec.Struct):
    """One turn of a conversation."""

    role: str
    content: str


class _Entry(msgspec.Struct):
    """A line of JSON, which has one of both."""

    messages: tuple[_Message, ...] | None = None
    text: str | None = None


def _entry(path: Path, number: int, line: str, encoder: TextEncoder) -> list[int]:
    try:
        entry = decode_json(line.encode(), _Entry)
        if entry.messages is not None:
            return encoder.chat([{"role": one.role, "content": one.content} for one in entry.messages])
        if entry.text is not None:
            return encoder.text(entry.text, at_start=True)
        raise ValueError
    except ValueError:
        hint = "Each line is an object with `messages`, of which each has a role and content, or with `text`."
        raise UsageError(f"{path}: line {number} is no text or conversation. {hint}") from None
