"""Two sound tokenizer.json documents to make mutants of. Apart: they are data, and the other specimens are made.

Both have tokens of single letters or bytes, and merges of the most frequent pairs of letters.
"""

from collections.abc import Sequence
from typing import Any

_SPECIAL = ("<unk>", "<s>", "</s>")
_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
_ADDED = [{"id": number, "content": name, **_FLAGS} for number, name in enumerate(_SPECIAL)]


def _vocabulary(space: str, units: Sequence[str]) -> tuple[dict[str, int], list[str]]:
    """The numbers of tokens, `units` first, and the merges that make the others; `space` is how a blank is written."""
    merges = [f"{a} {b}" for a in (*"taio", space) for b in "heansr" if a != b]
    tokens = dict.fromkeys((*units, *(merge.replace(" ", "") for merge in merges)))
    return {token: number for number, token in enumerate(tokens)}, merges


_LETTERS = [chr(n) for n in range(33, 127)]
_UNITS = [*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *_LETTERS]
_VOCABULARY, _MERGES = _vocabulary("▁", _UNITS[:360])
_TEMPLATE = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
_BLANKS = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
LIKE_SENTENCEPIECE: dict[str, Any] = {
    "version": "1.0",
    "added_tokens": _ADDED,
    "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, _BLANKS]},
    "pre_tokenizer": None,
    "post_processor": {
        "type": "TemplateProcessing",
        "single": _TEMPLATE,
        "pair": _TEMPLATE,
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    },
    "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
    "model": {
        "type": "BPE",
        "unk_token": "<unk>",
        "byte_fallback": True,
        "vocab": _VOCABULARY,
        "merges": [one for one in _MERGES if {*one.split(), one.replace(" ", "")} <= _VOCABULARY.keys()],
    },
}

_PRINTABLE = [chr(n) for n in (*range(33, 127), *range(161, 173), *range(174, 256))]
_OTHERS = [chr(256 + n) for n in range(256 - len(_PRINTABLE))]
_BYTE_VOCABULARY, _BYTE_MERGES = _vocabulary("Ġ", [*_SPECIAL, *_PRINTABLE, *_OTHERS])
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
BYTE_LEVEL: dict[str, Any] = {
    "version": "1.0",
    "added_tokens": _ADDED,
    "normalizer": None,
    "pre_tokenizer": _BYTE_LEVEL,
    "post_processor": _BYTE_LEVEL,
    "decoder": _BYTE_LEVEL,
    "model": {"type": "BPE", "vocab": _BYTE_VOCABULARY, "merges": [merge.split() for merge in _BYTE_MERGES]},
}
