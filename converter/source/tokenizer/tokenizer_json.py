"""Reads Hugging Face's `tokenizer.json`: byte-level BPE (GPT-2, Llama 3) and sentencepiece-like BPE (Llama 2)."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
from gguf import TokenType

from slimoe.converter.document import read_json
from slimoe.converter.source.tokenizer.bpe_model import BYTES, BpeModel
from slimoe.converter.source.tokenizer.settings import AddedToken, TokenizerSettings
from slimoe.converter.source.tokenizer.space_prefix import SpacePrefix
from slimoe.converter.source.tokenizer.steps import Step, Steps
from slimoe.offload.errors import ModelFileError, UnsupportedModelError
from slimoe.offload.gguf import keys
from slimoe.offload.gguf.header import Value

_PLAIN = TokenizerSettings()
_AGAIN = "Download the tokenizer again."


class _Added(AddedToken, frozen=True, kw_only=True):
    id: int


class _Kind(msgspec.Struct):
    type: str = "BPE"


class _Outline(msgspec.Struct):
    model: _Kind


class _Padding(msgspec.Struct):
    pad_token: str | None = None


class _File(msgspec.Struct):
    model: BpeModel
    added_tokens: list[_Added] = []
    normalizer: Step | None = None
    pre_tokenizer: Step | None = None
    post_processor: Step | None = None
    decoder: Step | None = None
    padding: _Padding | None = None


@dataclass(frozen=True, slots=True)
class TokenizerJson:
    """What the file says.

    `pre` is llama.cpp's name for how text is split, and `added` are tokens added after training, by id. `before` and
    `behind` are the special tokens around a whole text, and batches are filled up with `padding_token`. With
    `has_normalizer` texts are rewritten before they are split, with `is_composed` only to Unicode's normal form C.
    """

    path: Path
    kind: str
    pre: str
    model: BpeModel
    merges: list[tuple[str, str]]
    added: dict[int, AddedToken]
    has_normalizer: bool
    is_composed: bool
    space_prefix: SpacePrefix | None
    before: list[str]
    behind: list[str]
    padding_token: str | None

    @classmethod
    def read(cls, path: Path, settings: TokenizerSettings = _PLAIN) -> "TokenizerJson":
        """Raises ModelFileError for a damaged file, UnsupportedModelError for one that a GGUF file cannot hold."""
        kind = read_json(path, _Outline).model.type
        if kind != "BPE":
            raise UnsupportedModelError(path, f"a tokenizer of type {kind} is not supported, only BPE.")
        file = read_json(path, _File)
        parts = (file.normalizer, file.pre_tokenizer, file.post_processor, file.decoder)
        model, steps = file.model, Steps.of(path, parts)
        model.check(path)
        added: dict[int, AddedToken] = {}
        for token in file.added_tokens:
            if token.id < 0 or token.id in added or model.vocab.get(token.content, token.id) != token.id:
                raise ModelFileError(path, f"the added token {token.content!r:.100} cannot have id {token.id}.", _AGAIN)
            added[token.id] = AddedToken(**{name: getattr(token, name) for name in AddedToken.__struct_fields__})
        before, behind = steps.around()
        steps.check_decoder()
        is_bytes, prefix = steps.is_byte_level, None
        if is_bytes:
            model.check_bytes(path)
        else:
            prefix = steps.space_prefix()
            splits_words = steps.splits_words and not settings.is_llama_class
            model.check_characters(path, [token.content for token in file.added_tokens], splits_words)
            prefix = settings.llama_prefix if settings.is_llama_class else prefix
        return cls(
            path=path,
            kind=keys.BYTE_LEVEL if is_bytes else keys.SENTENCEPIECE,
            pre=steps.pre_tokenizer_name(model.ignore_merges) if is_bytes else "default",
            model=model,
            merges=model.pairs(path),
            added=added,
            has_normalizer=bool(steps.normalizer) and not is_bytes and not settings.is_llama_class,
            is_composed=bool(steps.normalizer) and is_bytes,
            space_prefix=prefix,
            before=before,
            behind=behind,
            padding_token=file.padding.pad_token if file.padding else None,
        )

    @property
    def highest_id(self) -> int:
        """The last token's id; -1 without tokens."""
        return max(self.model.vocab.values(), default=-1)

    def check_merges(self, special: Iterable[str]) -> None:
        """Raises UnsupportedModelError for a sentencepiece-like tokenizer that llama.cpp would merge otherwise.

        `special` are further tokens that are never merged.
        """
        if self.space_prefix is not None:
            self.model.check_merges(self.path, [*special, *(token.content for token in self.added.values())])

    def with_listed_merges(self) -> "TokenizerJson | None":
        """The same in a file that lists the merges of characters, as Gemma 4's have them; None where texts begin with
        a space that they do not have, for which such files have no word.
        """
        if self.space_prefix is None or self.space_prefix.is_added:
            return None
        return replace(self, kind=keys.BYTE_FALLBACK, pre=keys.BYTE_FALLBACK)

    def tokens(self) -> Iterator[tuple[str, float, int]]:
        """(text, score, type) in id order; ids without a token are unused ones.

        A sentencepiece score orders merges, as the list of merges does: a piece's is minus the first merge's place.
        """
        ranks: dict[str, int] = {}
        for rank, (left, right) in enumerate(self.merges):
            ranks.setdefault(left + right, rank)
        texts = {token: text for text, token in self.model.vocab.items()}
        has_characters, single_bytes = self.kind != keys.BYTE_LEVEL, frozenset(BYTES)
        for token in range(self.highest_id + 1):
            text = texts.get(token)
            if text is None:
                yield f"[PAD{token}]", -1000.0, TokenType.UNUSED
            elif has_characters and text in single_bytes:
                yield text, 0.0, TokenType.BYTE
            elif has_characters and text == (self.model.unk_token or "<unk>"):
                yield text, 0.0, TokenType.UNKNOWN
            else:
                yield text, -float(ranks.get(text, len(self.merges))), TokenType.NORMAL

    def metadata(self) -> dict[str, Value]:
        """The keys that the file decides, without the tokens."""
        values: dict[str, Value] = {keys.TOKENIZER_MODEL: self.kind, keys.TOKENIZER_PRE: self.pre}
        if self.is_composed:
            values[keys.NORMALIZER] = "nfc"
        if self.kind != keys.SENTENCEPIECE:
            values[keys.MERGES] = [f"{left} {right}" for left, right in self.merges]
        return values | (self.space_prefix.metadata() if self.space_prefix else {})
