"""Text to token ids and back, by the tokenizer that a GGUF file carries, whole or token by token.

Splitting text into tokens is libllama's work. Special tokens are ours: sentencepiece never builds one out of
written text, libllama may (`</s>` from `</` and `s>`), so its copy of the vocabulary gets names for them that no
text can spell, and they are placed by id. Likewise the space that sentencepiece puts before a text.
"""

import codecs
import itertools
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from slimoe.offload.gguf.header import GGUFFile, Value
from slimoe.offload.gguf.keys import BYTE_LEVEL
from slimoe.offload.text.vocabulary import LlamaVocab, VocabularySpec, raw_bytes

_BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))
_END_OF_TURN = frozenset(
    {"<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"}
    | {"<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "[e~["}
    | {"<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>"}
)
"""Tokens that llama.cpp takes for the end of an answer by their names, of whatever type they are."""
_OF_A_TOKENIZER = ("tokenizer.", "slimoe.tokenizer.")
_MOST_COMPOSED = 3
"""Bytes of UTF-8 that become one when a text is composed, at most."""
_SPACES = (" ", "▁")
"""sentencepiece writes a space as the second, so that both are the same in a text."""


class Tokenizer:
    """A model's tokenizer; `open` makes one from a file, `close` frees libllama's vocabulary (about 10 MB)."""

    def __init__(self, spec: VocabularySpec, vocab: LlamaVocab) -> None:
        self._spec = spec
        self._vocab = vocab
        self.n_vocab = len(spec.texts)
        self.bos: int | None = vocab.bos
        self.eos: int | None = vocab.eos
        self.add_bos: bool = vocab.add_bos and vocab.bos is not None
        self.chat_template = spec.chat_template
        self.special_tokens = {spec.texts[i]: i for i in sorted(spec.control | spec.user_defined, reverse=True)}
        named = {token for token, text in enumerate(spec.texts) if text in _END_OF_TURN}
        ends = named | spec.ends | ({vocab.eos} if vocab.eos is not None else set())
        inner = _inner_ends(spec.texts)
        self.eog = frozenset(token for token in ends if spec.texts[token] not in inner)
        self.control = spec.control
        self._any_special = _alternatives(self.special_tokens)
        self._user_defined = _alternatives(spec.texts[i] for i in spec.user_defined)
        self._pieces: dict[int, bytes] = {}

    @classmethod
    def open(cls, gguf: GGUFFile) -> "Tokenizer":
        """The tokenizer of `gguf`.

        Raises ModelFileError when the file has none or a damaged one, UnsupportedModelError for an unknown kind.
        """
        spec = VocabularySpec.from_gguf(gguf)
        return cls(spec, LlamaVocab(gguf, spec))

    @classmethod
    def of_metadata(cls, path: Path, metadata: Mapping[str, Value]) -> "Tokenizer":
        """The tokenizer that a file with these keys will hold; arrays may be lists. Raises as `open` does."""
        values = {key: value for key, value in metadata.items() if key.startswith(_OF_A_TOKENIZER)}
        for key, value in values.items():
            if isinstance(value, list) and value and not isinstance(value[0], str):
                values[key] = np.array(value)
        return cls.open(GGUFFile((path,), values, {}))

    @property
    def longest(self) -> int | None:
        """The most UTF-8 bytes of text that one token stands for; None where one unknown token may be any run."""
        spells_all = self._spec.model == BYTE_LEVEL or _BYTES.issubset(self._spec.texts)
        if not spells_all:
            return None
        return max(len(raw_bytes(text)) for text in self._spec.texts) * (
            _MOST_COMPOSED if self._spec.is_composed else 1
        )

    def close(self) -> None:
        """Frees libllama's copy; the tokenizer can no longer encode."""
        self._vocab.close()

    def encode(self, text: str, *, add_bos: bool = False, parse_special: bool = False) -> list[int]:
        """The token ids of `text`, with `add_bos` after a BOS, with `parse_special` with special tokens by their names.

        Raises UsageError for a text that libllama cannot split.
        """
        bos = [self.bos] if add_bos and self.bos is not None else []
        parts = list(_split(self._any_special, text, self.special_tokens)) if parse_special else [text]
        return bos + self.encode_segments(parts)

    def encode_segments(self, segments: Sequence[str | int]) -> list[int]:
        """The token ids of a prompt in pieces: an int is a token, a str is text that holds no special tokens.

        Neighbouring strings are one text. Where the tokenizer puts a space before texts, it does so at the start and,
        if it is of that kind, after each int. Raises UsageError for a text that libllama cannot split.
        """
        spec, tokens = self._spec, list[int]()
        for is_token, run in itertools.groupby(segments, lambda segment: isinstance(segment, int)):
            parts: Iterable[str | int] = list(run)
            if not is_token:
                text = "".join(map(str, parts))
                if spec.is_composed:
                    text = unicodedata.normalize("NFC", text)
                is_prefixed = spec.add_space_prefix and (not tokens or spec.prefix_after_special)
                if text and is_prefixed and (spec.prefix_before_space or text[0] not in _SPACES):
                    text = " " + text
                parts = _split(self._user_defined, text, self.special_tokens)
            for part in parts:
                tokens += [part] if isinstance(part, int) else self._vocab.encode(part)
        return tokens

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes that `token` stands for; a control token's are empty, or its name with `special`."""
        if token not in self._pieces:
            text = self.token_text(token)
            named = token in self._spec.control or token in self._spec.user_defined
            self._pieces[token] = raw_bytes(text) if named else self._vocab.piece(token)
        return b"" if token in self._spec.control and not special else self._pieces[token]

    def all_pieces(self) -> list[bytes]:
        """The bytes of every token, control tokens by name; none of them is remembered here."""
        spec = self._spec
        named = spec.control | spec.user_defined
        return [
            raw_bytes(text) if token in named else self._vocab.piece(token) for token, text in enumerate(spec.texts)
        ]

    def decode(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """The text of `tokens` without the space that `encode` puts first; control tokens by name with `special`."""
        text = b"".join(self.piece(token, special=special) for token in tokens).decode("utf-8", "replace")
        return text[1:] if self._spec.add_space_prefix and text.startswith(" ") else text

    def token_text(self, token: int) -> str:
        """The token's name in the file, such as `▁the`, `<0x0A>` or `</s>`."""
        if not 0 <= token < self.n_vocab:
            raise IndexError(f"token {token} is not one of {self.n_vocab}")
        return self._spec.texts[token]


def _inner_ends(texts: Sequence[str]) -> frozenset[str]:
    """Ends of an answer's parts that do not end the answer, where others end it or a call, as llama.cpp has it."""
    known = frozenset(texts) if "<|end|>" in texts else frozenset[str]()
    calls = not known.isdisjoint(("<|call|>", "<|calls|>"))
    return frozenset(["<|end|>"]) if calls and not known.isdisjoint(("<|return|>", "<|flush|>")) else frozenset()


def _alternatives(texts: Iterable[str]) -> re.Pattern[str] | None:
    """Matches any of `texts`, the longest one first."""
    ordered = sorted((text for text in texts if text), key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, ordered)) + ")") if ordered else None


def _split(pattern: re.Pattern[str] | None, text: str, tokens: dict[str, int]) -> Iterator[str | int]:
    parts = pattern.split(text) if pattern else [text]
    for n, part in enumerate(parts):
        if part:
            yield tokens[part] if n % 2 else part


class TextStream:
    """Turns token ids into text as they come: whole characters, and none that may begin a stop string.

    The argument `piece` gives a token's bytes. Once a stop string has appeared `stopped` is true, `stop_text` is that
    string, and neither it nor anything behind it is released. With `strips_space` one space at the very beginning is
    left out. The attribute `piece` is the bytes of the last token in this text, `added` the characters that they
    complete.
    """

    def __init__(self, piece: Callable[[int], bytes], stop: Sequence[str], strips_space: bool = False) -> None:
        self._piece_of = piece
        self._strips_space = strips_space
        self._stop = [text for text in stop if text]
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.piece, self.added = b"", ""
        self.stopped, self.stop_text = False, ""

    def feed(self, token: int) -> str:
        """Takes a token and returns the text that can now be told, which may be empty or hold earlier tokens' text."""
        if self.stopped:
            return ""
        self.piece = self._piece_of(token)
        if self._strips_space and self.piece:
            self.piece = self.piece.removeprefix(b" ")
            self._strips_space = False
        self.added = self._decoder.decode(self.piece)
        self._held += self.added
        # The longest end of the text that begins a stop string is held back.
        longest = min(max(map(len, self._stop), default=0), len(self._held))
        ends = (n for n in range(longest, 0, -1) if any(text.startswith(self._held[-n:]) for text in self._stop))
        return self._release(keep=next(ends, 0))

    def finish(self) -> str:
        """Returns the text that was held back, once no more tokens come."""
        if self.stopped:
            return ""
        self._held += self._decoder.decode(b"", True)
        return self._release(keep=0)

    def _release(self, keep: int) -> str:
        # Of several that begin at the same place the longest is meant.
        ends = [(at, -len(text), text) for text in self._stop if (at := self._held.find(text)) >= 0]
        if ends:
            at, _, self.stop_text = min(ends)
            self.stopped = True
            released, self._held = self._held[:at], ""
            return released
        split = len(self._held) - keep
        released, self._held = self._held[:split], self._held[split:]
        return released
