"""The tokens between which a model of code writes what is missing in the middle of a text."""

from collections.abc import Mapping
from dataclasses import dataclass

from slimoe.offload.gguf.header import Value


@dataclass(frozen=True, slots=True)
class InfillTokens:
    """What stands before the text before the gap, before the text behind it, and before what fills it.

    Some models also have a token that begins a repository, and one that begins a file.
    """

    prefix: int
    suffix: int
    middle: int
    repository: int | None = None
    file: int | None = None


_KEYS = {
    "prefix": ("fim_pre_token_id", "prefix_token_id"),
    "suffix": ("fim_suf_token_id", "suffix_token_id"),
    "middle": ("fim_mid_token_id", "middle_token_id"),
    "repository": ("fim_rep_token_id",),
    "file": ("fim_sep_token_id",),
}
_PREFIXES = "<|fim_prefix|> <fim-prefix> <fim_prefix> <｜fim▁begin｜> <PRE> ▁<PRE> <|code_prefix|> [PREFIX]"
_SUFFIXES = "<|fim_suffix|> <fim-suffix> <fim_suffix> <｜fim▁hole｜> <SUF> ▁<SUF> <|code_suffix|> [SUFFIX]"
_MIDDLES = "<|fim_middle|> <fim-middle> <fim_middle> <｜fim▁end｜> <MID> ▁<MID> <|code_middle|> [MIDDLE]"
_NAMES = {
    "prefix": _PREFIXES.split(),
    "suffix": _SUFFIXES.split(),
    "middle": _MIDDLES.split(),
    "repository": ["<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"],
    "file": ["<|file_sep|>"],
}
"""What such tokens are called in the vocabularies of files that do not tell them by a key."""


def infill_tokens(
    metadata: Mapping[str, Value], special_tokens: Mapping[str, int], n_vocab: int
) -> InfillTokens | None:
    """The tokens of a GGUF file, by its keys or their names; None unless the first three are all there."""
    found = {}
    for role, names in _KEYS.items():
        values = [metadata.get(f"tokenizer.ggml.{name}") for name in names]
        values += [special_tokens.get(name) for name in _NAMES[role]]
        token = next((value for value in values if type(value) is int and 0 <= value < n_vocab), None)
        if token is not None:
            found[role] = token
    return InfillTokens(**found) if found.keys() >= {"prefix", "suffix", "middle"} else None
