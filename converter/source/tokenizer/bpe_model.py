"""The model part of a tokenizer.json, byte pair encoding, and whether llama.cpp does the same with it.

llama.cpp merges as sentencepiece does: any two neighbours whose text is a token, the one of the highest score first.
Hugging Face's library merges what is in a list, in its order. Both are the same if the list has all pairs that make a
token, next to each other.
"""

from collections.abc import Collection
from pathlib import Path

import msgspec

from slimoe.converter.source.tokenizer.steps import inexpressible
from slimoe.offload.errors import ModelFileError, UnsupportedModelError

BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
"""sentencepiece's tokens for single bytes."""
ALPHABET = frozenset(chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 324)))
"""The characters that byte-level tokenizers write bytes as: printable ones as themselves, the others from 256 on."""
_MARK = "▁"
_AGAIN = "Download the tokenizer again."


class BpeModel(msgspec.Struct, frozen=True):
    """The `model` part of a tokenizer.json of byte pair encoding, field by field."""

    vocab: dict[str, int]
    merges: list[str | tuple[str, str]]
    unk_token: str | None = None
    dropout: float | None = None
    continuing_subword_prefix: str | None = None
    end_of_word_suffix: str | None = None
    byte_fallback: bool = False
    ignore_merges: bool = False

    def pairs(self, path: Path) -> list[tuple[str, str]]:
        """The merges; raises ModelFileError for one that is no pair of tokens, or does not make one."""
        pairs = []
        for merge in self.merges:
            pair = tuple(merge.split(" ")) if isinstance(merge, str) else merge
            if len(pair) != 2 or not {*pair, "".join(pair)} <= self.vocab.keys():
                raise ModelFileError(path, f"the merge {merge!r:.100} is not of two tokens into a third.", _AGAIN)
            pairs.append((pair[0], pair[1]))
        return pairs

    def check(self, path: Path) -> None:
        """Raises ModelFileError for ids that cannot be, UnsupportedModelError for what a GGUF file cannot hold."""
        if len(set(self.vocab.values())) < len(self.vocab):
            raise ModelFileError(path, "the vocabulary gives one id to several tokens.", _AGAIN)
        lowest = min(self.vocab, key=self.vocab.__getitem__, default="")
        if self.vocab.get(lowest, 0) < 0:
            raise ModelFileError(path, f"the token {lowest!r:.100} has the id {self.vocab[lowest]}.", _AGAIN)
        for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if getattr(self, name):
                raise inexpressible(path, "setting", f"{name} {getattr(self, name)!r}")

    def check_bytes(self, path: Path) -> None:
        """Refuses a byte-level tokenizer that has something else for bytes without a token."""
        for name in ("unk_token", "byte_fallback"):
            if getattr(self, name) and not self.vocab.keys() >= ALPHABET:
                raise inexpressible(path, "setting", f"{name} for bytes that have no token")

    def check_characters(self, path: Path, added: Collection[str], splits_words: bool) -> None:
        """Refuses a sentencepiece-like tokenizer that llama.cpp would not follow, but for its merges."""
        if not self.byte_fallback or not self.vocab.keys() >= set(BYTES):
            raise inexpressible(path, "setting", "byte_fallback false (or without all 256 bytes)")
        if self.ignore_merges:
            raise inexpressible(path, "setting", "ignore_merges true")
        if splits_words and any(_MARK in text[1:] for text in self._plain(added)):
            raise inexpressible(path, "pre-tokenizer", "Metaspace with split")

    def check_merges(self, path: Path, added: Collection[str]) -> None:
        """Refuses merges that are not those of a sentencepiece model; `added` are tokens that never merge."""
        pairs, plain = dict.fromkeys(self.pairs(path)), self._plain(added)
        for text in plain:
            for at in range(1, len(text)):
                left, right = text[:at], text[at:]
                parts = all(part in plain or (len(part) == 1 and part not in added) for part in (left, right))
                if parts and (left, right) not in pairs:
                    raise _not_sentencepieces(path, f"{left!r} and {right!r} are no merge, though {text!r} is a token")
        done, last = set(), ""
        for left, right in pairs:
            text = left + right
            if text != last and text in done:
                raise _not_sentencepieces(path, f"those that make {text!r} do not follow each other")
            done.add(text)
            last = text

    def _plain(self, added: Collection[str]) -> set[str]:
        return self.vocab.keys() - set(added) - set(BYTES)


def _not_sentencepieces(path: Path, problem: str) -> UnsupportedModelError:
    what = f"the tokenizer's merges are not sentencepiece's ({problem}), but llama.cpp would merge as if they were."
    return UnsupportedModelError(path, what, "Only merges made of a sentencepiece model can be converted.")
