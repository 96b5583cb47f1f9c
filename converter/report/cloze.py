"""Cloze evaluation: whether a compressed model still knows the words that the reference predicts from their context.

Rare words are forgotten first, while perplexity and common sense hold (arXiv 2312.00960), so words are counted by
frequency. Any text serves as a cloze test: nothing here depends on a tokenizer or a language.
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
"""The characters for the space before a word, in sentencepiece and in byte-level BPE."""
_AMONG = 10
"""A model knows a word if the word is among this many likeliest tokens, and if `_GAIN` holds."""
_GAIN = math.log(8.0)
"""The least rise of a known word's log-probability by its context, over its frequency in any text."""

Mask = NDArray[np.bool_]
Counts = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Cloze:
    """The cloze evaluation of `n_words` content words of similar frequency; the commonest occurs `most_common` times.

    `reference_first` and `model_first` are the parts of the words that are the likeliest token for the reference and
    for the model. The others are of the `n_known` words that the reference knows, and None if there are none: `kept` is
    the part that the model has among its ten likeliest tokens too, and `log_probability_loss` is by how much the word's
    log-probability is lower for the model, in the mean.
    """

    n_words: int
    most_common: int
    reference_first: float
    model_first: float
    n_known: int
    kept: float | None
    log_probability_loss: float | None


def content_tokens(metadata: Mapping[str, Value]) -> Mask:
    """Which tokens of a vocabulary [n_vocab] begin content words: first pieces of words, with at least three letters.

    In scripts without capitals, whose words have few letters and often no spaces, every piece with a letter counts.
    """
    pieces = metadata["tokenizer.ggml.tokens"]
    assert isinstance(pieces, list | tuple | np.ndarray)
    content = np.zeros(len(pieces), np.bool_)
    for token, piece in enumerate(map(str, pieces)):
        letters = [letter for letter in piece if letter.isalpha() and letter not in _WORD_STARTS]
        has_no_capitals = any(letter.lower() == letter.upper() for letter in letters)
        content[token] = has_no_capitals or (piece.startswith(_WORD_STARTS) and len(letters) >= _FEWEST_LETTERS)
    return content


def cloze(compared: Comparison, content: Mask, counts: Counts) -> dict[str, Cloze]:
    """Evaluates the content words among the scored tokens, in three buckets of about equally many, by frequency.

    `content` [n_vocab] says which tokens begin content words, and `counts` [n_vocab] how often tokens occur in a large
    text, such as that of the calibration.
    """
    asked = content[compared.windows.targets]
    if not asked.any():
        return {}
    frequency = counts[compared.windows.targets]
    edges = np.quantile(frequency[asked], (1 / 3, 2 / 3))
    bucket = np.searchsorted(edges, frequency, side="left")
    likelihood = np.log((frequency + 1.0) / (counts.sum() + len(counts)))
    known = (compared.reference.rank < _AMONG) & (compared.reference.log_probability - likelihood >= _GAIN)
    reference, model = compared.reference, compared.model
    loss = reference.log_probability - model.log_probability
    found = {}
    for index, name in enumerate(BUCKETS):
        words = asked & (bucket == index)
        own = words & known
        if words.any():
            found[name] = Cloze(
                n_words=int(words.sum()),
                most_common=int(frequency[words].max()),
                reference_first=float((reference.rank[words] == 0).mean()),
                model_first=float((model.rank[words] == 0).mean()),
                n_known=int(own.sum()),
                kept=float((model.rank[own] < _AMONG).mean()) if own.any() else None,
                log_probability_loss=float(loss[own].mean(dtype=np.float64)) if own.any() else None,
            )
    return found
