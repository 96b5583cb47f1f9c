"""What a slimmed model still knows: words that the reference foretells from their context, by how rare they are.

Rare words are the first to go, while perplexity and common sense hold (arXiv 2312.00960), so every frequency is counted
apart. Any text is its own cloze test: nothing here depends on a tokenizer or a language.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slimoe.converter.report.quality import Comparison
from slimoe.offload.gguf.header import Value

BUCKETS = ("rare", "middling", "frequent")

_FEWEST_LETTERS = 3
_WORD_STARTS = ("▁", "Ġ")
"""What stands for the space before a word, in sentencepiece and in byte-level BPE."""
_AMONG = 10
"""A word is known if it is among the likeliest so many,"""
_GAIN = math.log(8.0)
"""and if the context makes it so many times as likely as it is anywhere."""

Mask = NDArray[np.bool_]
Counts = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Cloze:
    """Content words of some frequency: `n_words` that were asked for, `most_common` how often the commonest occurs.

    Over all: the shares that the reference and the model think likeliest (`reference_first`, `model_first`). Over the
    `n_known` that the reference knows, None without any: `kept`, the share that the model has among its first ten too,
    and `lost_nats`, by how much its log-probability is lower in the mean.
    """

    n_words: int
    most_common: int
    reference_first: float
    model_first: float
    n_known: int
    kept: float | None
    lost_nats: float | None


def content_tokens(metadata: Mapping[str, Value]) -> Mask:
    """Which tokens of a vocabulary begin content words [n_vocab]: a word's first piece, with at least three letters.

    Of scripts without capitals, where words have few letters and often no spaces, every piece with a letter counts.
    """
    pieces = metadata["tokenizer.ggml.tokens"]
    assert isinstance(pieces, list | tuple | np.ndarray)
    return np.array([_is_content(str(piece)) for piece in pieces], np.bool_)


def _is_content(piece: str) -> bool:
    letters = [letter for letter in piece if letter.isalpha() and letter not in _WORD_STARTS]
    if any(letter.lower() == letter.upper() for letter in letters):
        return True
    return piece.startswith(_WORD_STARTS) and len(letters) >= _FEWEST_LETTERS


def cloze(compared: Comparison, content: Mask, counts: Counts) -> dict[str, Cloze]:
    """Content words among the scored tokens, in three buckets of about equally many.

    `content` [n_vocab] are tokens worth asking for, `counts` [n_vocab] how often they occur in some large text, such as
    that of the calibration.
    """
    asked = content[compared.windows.targets]
    if not asked.any():
        return {}
    frequency = counts[compared.windows.targets]
    edges = np.quantile(frequency[asked], (1 / 3, 2 / 3))
    bucket = np.searchsorted(edges, frequency, side="left")
    likelihood = np.log((frequency + 1.0) / (counts.sum() + len(counts)))
    known = (compared.reference.rank < _AMONG) & (compared.reference.log_probability - likelihood >= _GAIN)
    found = {name: asked & (bucket == index) for index, name in enumerate(BUCKETS)}
    return {name: _cloze(compared, rows, known & rows, frequency) for name, rows in found.items() if rows.any()}


def _cloze(compared: Comparison, asked: Mask, known: Mask, frequency: Counts) -> Cloze:
    reference, model = compared.reference, compared.model
    lost = reference.log_probability - model.log_probability
    return Cloze(
        n_words=int(asked.sum()),
        most_common=int(frequency[asked].max()),
        reference_first=float((reference.rank[asked] == 0).mean()),
        model_first=float((model.rank[asked] == 0).mean()),
        n_known=int(known.sum()),
        kept=float((model.rank[known] < _AMONG).mean()) if known.any() else None,
        lost_nats=float(lost[known].mean(dtype=np.float64)) if known.any() else None,
    )
