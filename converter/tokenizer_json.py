"""Reads Hugging Face's `tokenizer.json`: byte-level BPE (GPT-2, Llama 3) and sentencepiece-like BPE (Llama 2)."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType

from converter.checkpoint import read_json
from offload import file_keys as keys
from offload.errors import ModelFileError, UnsupportedModelError
from offload.gguf_file import Value

_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_PRE_TOKENIZERS = {
    f"{_ENGLISH}|{_WORD}|\\p{{N}}{{1,3}}|{_TAIL}": "llama-bpe",
    f"{_ENGLISH}|{_WORD}|\\p{{N}}|{_TAIL}": "qwen2",
    f"{_CASED}|\\p{{N}}|" + _TAIL.replace(r"[\r\n]*", r"[\r\n/]*", 1): "tekken",
}
"""The regular expressions that split text before BPE, and llama.cpp's names for them."""

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_AGAIN = "Download the tokenizer again."


@dataclass(frozen=True, slots=True)
class TokenizerJson:
    """The parsed file; `kind` is GGUF's name of the tokenizer model, `added_tokens` are id: (text, special)."""

    path: Path
    kind: str
    pre: str
    vocabulary: dict[str, int]
    merges: tuple[tuple[str, str], ...]
    added_tokens: dict[int, tuple[str, bool]]
    add_space_prefix: bool
    prefix_after_special: bool
    adds_bos: bool

    @classmethod
    def read(cls, path: Path) -> "TokenizerJson":
        """Raises ModelFileError for a damaged file, UnsupportedModelError for one a GGUF cannot express."""
        data = read_json(path)
        try:
            return cls._parse(path, data)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise ModelFileError(path, "the tokenizer lacks parts that it needs.", _AGAIN) from None

    @classmethod
    def _parse(cls, path: Path, data: dict[str, Any]) -> "TokenizerJson":
        model = data["model"]
        if model.get("type", "BPE") != "BPE":
            raise UnsupportedModelError(path, f"a tokenizer of type {model['type']} is not supported, only BPE.")
        steps = [*_steps(data, "normalizer"), *_steps(data, "pre_tokenizer")]
        byte_level = any(step["type"] == "ByteLevel" for step in steps)
        prefixes = [scheme for step in steps if (scheme := _prefix_scheme(step))]
        pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
        template = next((s for s in _steps(data, "post_processor") if s["type"] == "TemplateProcessing"), {})
        return cls(
            path=path,
            kind=keys.BYTE_LEVEL if byte_level else keys.SENTENCEPIECE,
            pre=_pre_tokenizer(path, steps) if byte_level else "default",
            vocabulary=model["vocab"],
            merges=tuple((left, right) for left, right in pairs),
            added_tokens={t["id"]: (t["content"], bool(t["special"])) for t in data.get("added_tokens", [])},
            add_space_prefix=bool(prefixes),
            prefix_after_special=prefixes != ["first"],
            adds_bos="SpecialToken" in next(iter(template.get("single", [])), {}),
        )

    def tokens(self) -> Iterator[tuple[str, float, int]]:
        """(text, score, type) in id order; ids without a token are unused ones.

        A sentencepiece score orders merges, as the list of merges does: a piece's is minus the first merge's place.
        """
        ranks: dict[str, int] = {}
        for rank, (left, right) in enumerate(self.merges):
            ranks.setdefault(left + right, rank)
        texts = {token: text for text, token in self.vocabulary.items()}
        for token in range(max(texts, default=-1) + 1):
            text = texts.get(token)
            if text is None:
                yield f"[PAD{token}]", -1000.0, TokenType.UNUSED
            elif self.kind == keys.SENTENCEPIECE and _BYTE.fullmatch(text):
                yield text, 0.0, TokenType.BYTE
            elif self.kind == keys.SENTENCEPIECE and text == "<unk>":
                yield text, 0.0, TokenType.UNKNOWN
            else:
                yield text, -float(ranks.get(text, len(self.merges))), TokenType.NORMAL

    def metadata(self) -> dict[str, Value]:
        """The keys that the file decides, without the tokens."""
        values: dict[str, Value] = {
            keys.TOKENIZER_MODEL: self.kind,
            keys.TOKENIZER_PRE: self.pre,
            keys.ADD_BOS: self.adds_bos,
        }
        if self.kind == keys.BYTE_LEVEL:
            values[keys.MERGES] = [f"{left} {right}" for left, right in self.merges]
        else:
            values[keys.ADD_SPACE_PREFIX] = self.add_space_prefix
            if not self.prefix_after_special:
                values[keys.PREFIX_AFTER_SPECIAL] = False
        return values


def _steps(data: dict[str, Any], part: str) -> list[dict[str, Any]]:
    """A part's steps, whether it is one or a sequence."""
    step = data.get(part)
    if not step:
        return []
    inner = next((step[name] for name in ("normalizers", "pretokenizers", "processors") if name in step), None)
    return list(inner) if inner is not None else [step]


def _prefix_scheme(step: dict[str, Any]) -> str | None:
    """When a step puts a space before a text: "always" (after special tokens too), "first", or None for never."""
    if step["type"] == "Prepend":
        return "always"
    if step["type"] == "Metaspace":
        scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
        return None if scheme == "never" else str(scheme)
    return None


def _pre_tokenizer(path: Path, steps: list[dict[str, Any]]) -> str:
    patterns = [step["pattern"].get("Regex", "") for step in steps if step["type"] == "Split"]
    if not patterns and any(step["type"] == "ByteLevel" and step.get("use_regex", True) for step in steps):
        return "gpt-2"
    name = _PRE_TOKENIZERS.get("|".join(patterns))
    if name is None:
        raise UnsupportedModelError(path, "the tokenizer splits text by a pattern that is not known here.")
    return name
