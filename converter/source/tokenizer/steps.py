"""The steps of a tokenizer.json around BPE: those that a GGUF file can hold, and refusals that name the others.

Source: the JSON that Hugging Face's tokenizers library writes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import msgspec

from slimoe.converter.source.tokenizer.space_prefix import SpacePrefix
from slimoe.offload.errors import UnsupportedModelError

_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_ENDS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_MARKED = r"[\p{L}\p{M}]"
_UNMARKED = r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_DEEPSEEK_LETTERS = (
    r"A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫ"
    r"ᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴ"
    r"ℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
    r""
)
_GPT_2 = "GPT-2's"
_DIGITS = "single digits"
_PRE_TOKENIZERS: dict[tuple[str, ...], tuple[str | None, str | None]] = {
    (_GPT_2,): ("gpt-2", None),
    (_DIGITS, _GPT_2): ("starcoder", None),
    (f"{_ENGLISH}|{_WORD}|\\p{{N}}{{1,3}}|{_TAIL}",): ("dbrx", "llama-bpe"),
    (f"{_ENGLISH}|{_WORD}|\\p{{N}}|{_TAIL}",): ("qwen2", None),
    (f"{_ENGLISH}|{_BEFORE}{_MARKED}+|\\p{{N}}|{_UNMARKED}",): ("qwen35", None),
    (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",): (
        "bailingmoe2",
        None,
    ),
    (f"{_BEFORE}{_UPPER}*{_LOWER}+{_ENGLISH}?|{_BEFORE}{_UPPER}+{_LOWER}*{_ENGLISH}?|\\p{{N}}{{1,3}}|{_ENDS}",): (
        "gpt-4o",
        None,
    ),
    (f"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*|\\p{{N}}|{_ENDS}",): (None, "tekken"),
    (
        r"\p{N}{1,3}",
        "[一-龥぀-ゟ゠-ヿ]+",
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
        "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
    ): ("deepseek-v3", None),
    (
        "[\r\n]",
        rf"\s?[{_DEEPSEEK_LETTERS}]+",
        r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
        r"\s+$",
        "[一-龥ࠀ-一가-퟿]+",
        _DIGITS,
    ): ("deepseek-llm", None),
}
"""How text is split before BPE, by steps that follow each other, and llama.cpp's names for it: for tokenizers that
always merge, and for those that look for whole words in the vocabulary first (ignore_merges). Models whose tokenizers
split alike share a name, though llama.cpp has further ones for the same."""

_MARK = "▁"
_DECODERS = ("ByteLevel", "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace")


class Step(msgspec.Struct):
    """One step, or a sequence of them; what its `type` does not have is absent."""

    type: str
    normalizers: "list[Step] | None" = None
    pretokenizers: "list[Step] | None" = None
    processors: "list[Step] | None" = None
    decoders: "list[Step] | None" = None
    pattern: dict[str, str] | None = None
    content: str | None = None
    prepend: str | None = None
    replacement: str = _MARK
    prepend_scheme: str | None = None
    split: bool | None = None
    add_prefix_space: bool | None = None
    use_regex: bool | None = None
    behavior: str | None = None
    invert: bool | None = None
    individual_digits: bool | None = None
    single: list[dict[str, dict[str, str | int]]] | None = None


@dataclass(frozen=True, slots=True)
class Steps:
    """All steps of the file `path`; each method refuses, by UnsupportedModelError, what a GGUF file cannot hold."""

    path: Path
    normalizer: tuple[Step, ...]
    pre_tokenizer: tuple[Step, ...]
    post_processor: tuple[Step, ...]
    decoder: tuple[Step, ...]

    @classmethod
    def of(cls, path: Path, parts: Sequence[Step | None]) -> "Steps":
        """From the four parts of the file, each of which may be a sequence, or absent."""
        normalizer, pre_tokenizer, post_processor, decoder = (tuple(_flat(part)) for part in parts)
        return cls(path, normalizer, pre_tokenizer, post_processor, decoder)

    @property
    def is_byte_level(self) -> bool:
        """Whether tokens are made of bytes, and not of characters."""
        return any(step.type == "ByteLevel" for step in self.pre_tokenizer)

    def pre_tokenizer_name(self, ignores_merges: bool) -> str:
        """llama.cpp's name for how a byte-level tokenizer splits text."""
        for step in self.normalizer:
            if step.type != "NFC":
                self._refuse("normaliser", step.type)
        splits = tuple(self._split(step) for step in self.pre_tokenizer[:-1])
        last = self.pre_tokenizer[-1]
        splits += (_GPT_2,) if last.use_regex is not False else ()
        if splits not in _PRE_TOKENIZERS:
            if not splits or (splits[-1] == _GPT_2 and splits[:-1] in _PRE_TOKENIZERS):
                self._refuse("pre-tokenizer", f"ByteLevel with use_regex {str(bool(splits)).lower()}")
            problem = "the tokenizer splits text by a pattern that llama.cpp does not follow"
            raise UnsupportedModelError(self.path, f"{problem}: {', then '.join(splits):.300}.")
        if last.type != "ByteLevel":
            self._refuse("pre-tokenizer", last.type)
        if last.add_prefix_space is not False:
            self._refuse("pre-tokenizer", "ByteLevel with add_prefix_space")
        for step in self.pre_tokenizer[:-1]:
            if step.type == "Split" and (step.behavior != "Isolated" or step.invert):
                self._refuse("pre-tokenizer", f"Split ({step.behavior})")
        name = _PRE_TOKENIZERS[splits][ignores_merges]
        if name is None:
            self._refuse("setting", f"ignore_merges {str(ignores_merges).lower()} with this pattern")
        return name

    def _split(self, step: Step) -> str:
        """The pattern that a step before the last one splits text by."""
        if step.type == "Digits" and step.individual_digits:
            return _DIGITS
        if step.type != "Split":
            self._refuse("pre-tokenizer", step.type)
        return (step.pattern or {}).get("Regex") or str(step.pattern)

    def space_prefix(self) -> SpacePrefix:
        """When a sentencepiece-like tokenizer adds a space; refuses whatever else its steps do."""
        done: list[str] = []
        for step in self.normalizer:
            pattern, name = step.pattern or {}, ""
            if step.type == "Prepend" and step.prepend == _MARK:
                name = "prepend"
            elif step.type == "Replace" and (pattern, step.content) == ({"String": " "}, _MARK):
                name = "escape"
            elif step.type == "Replace" and (pattern, step.content) == ({"Regex": rf"\A{_MARK}"}, _MARK * 2):
                name = "double"
            if not name or name in done or (name == "double" and done != ["escape"]):
                self._refuse("normaliser", step.type)
            done.append(name)
        # Where the normaliser leaves no spaces, nothing is split at them.
        is_idle = [step.type == "Split" and step.pattern == {"String": " "} for step in self.pre_tokenizer]
        pre_tokenizer = self.pre_tokenizer if "escape" not in done or not all(is_idle) else ()
        for n, step in enumerate(pre_tokenizer):
            if step.type != "Metaspace" or step.replacement != _MARK or n:
                self._refuse("pre-tokenizer", step.type)
        first = pre_tokenizer[0] if pre_tokenizer else Step("Metaspace", prepend_scheme="never")
        scheme = first.prepend_scheme or ("never" if first.add_prefix_space is False else "always")
        if "escape" not in done and not pre_tokenizer:
            raise UnsupportedModelError(self.path, "the tokenizer is neither byte-level nor like sentencepiece.")
        if "prepend" in done:
            return SpacePrefix()
        if "double" in done and scheme != "always":
            self._refuse("normaliser", "Replace")
        return SpacePrefix(scheme != "never", scheme == "always", "double" in done)

    @property
    def splits_words(self) -> bool:
        """Whether no token may go on behind a space: a GGUF file can hold that only if no token would."""
        return any(step.type == "Metaspace" and step.split is not False for step in self.pre_tokenizer)

    def around(self) -> tuple[list[str], list[str]]:
        """The special tokens that are put before and behind a whole text."""
        templates = [step for step in self.post_processor if step.type != "ByteLevel"]
        for step in templates:
            if step.type != "TemplateProcessing" or len(templates) > 1:
                self._refuse("post-processor", step.type)
        names: list[str | None] = []
        for piece in (templates[0].single or []) if templates else []:
            special = piece.get("SpecialToken")
            names.append(None if special is None else str(special.get("id")))
        if names.count(None) > 1 or (templates and None not in names):
            self._refuse("post-processor", "TemplateProcessing")
        at = names.index(None) if names else 0
        return [str(name) for name in names[:at]], [str(name) for name in names[at + 1 :]]

    def check_decoder(self) -> None:
        """Refuses a decoder that makes other texts of tokens than those which they stand for."""
        for step in self.decoder:
            pattern = (step.pattern or {}).get("String")
            changes = step.type == "Replace" and (pattern, step.content) != (_MARK, " ")
            if step.type not in _DECODERS or changes or (step.type == "Strip" and step.content != " "):
                self._refuse("decoder", step.type)

    def _refuse(self, part: str, name: str) -> NoReturn:
        raise inexpressible(self.path, part, name)


def inexpressible(path: Path, part: str, name: str) -> UnsupportedModelError:
    """The error for a step of a tokenizer that changes its tokens and that llama.cpp does not have."""
    problem = f"the tokenizer's {part} {name} decides about tokens, but a GGUF file cannot hold it."
    return UnsupportedModelError(path, problem, "Only tokenizers without such a step can be converted.")


def _flat(step: Step | None) -> Iterator[Step]:
    """A part's steps, whether it is one, or a sequence, or absent."""
    if step is None:
        return
    inner = step.normalizers or step.pretokenizers or step.processors or step.decoders
    if step.type != "Sequence":
        yield step
    for one in inner or ():
        yield from _flat(one)
