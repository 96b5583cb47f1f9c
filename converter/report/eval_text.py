"""The texts that a compressed model is evaluated on: files given, or what calibration leaves out of our mixture."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slimoe.converter.forward.texts import DEFAULT_LENGTH, TextEncoder, TextFile, documents, held_out_texts
from slimoe.converter.forward.windows import Windows, cut_windows
from slimoe.converter.stats.statistics import Statistics
from slimoe.offload.errors import UsageError

EVAL_TOKENS = 16384
_SPAN = 16
"""So many tokens in a row that calibration saw too are no chance."""
_CHARACTERS_PER_TOKEN = 32


@dataclass(frozen=True, slots=True)
class EvalText:
    """Windows to evaluate on. `is_own`: they are the mixture's, not a person's choice. `seen` is the share of their
    stretches of 16 tokens that occur in the calibration's texts, None where these are unknown.
    """

    windows: Windows
    is_own: bool
    seen: float | None


def read_eval_text(
    files: Sequence[TextFile],
    encoder: TextEncoder,
    n_ctx_train: int,
    statistics: Statistics | None = None,
    n_tokens: int = EVAL_TOKENS,
) -> EvalText:
    """At most about `n_tokens` tokens, evenly from all domains of `files`, or of our own mixture without any.

    Raises UsageError for files that cannot be read or are too short.
    """
    chosen = tuple(files) or held_out_texts()
    texts: dict[str, list[int]] = {}
    for file in chosen:
        for ids in documents(file, encoder, _CHARACTERS_PER_TOKEN * n_tokens):
            texts.setdefault(file.domain, []).extend(ids)
    if not any(texts.values()):
        names = ", ".join(str(file.path) for file in chosen)
        raise UsageError(f"There is no text to judge by in {names}. Give longer ones.")
    windows = eval_windows(texts, n_ctx_train, n_tokens)
    return EvalText(windows, not files, None if statistics is None else seen_share(windows, statistics))


def eval_windows(texts: dict[str, list[int]], n_ctx_train: int, n_tokens: int = EVAL_TOKENS) -> Windows:
    """Windows of tokens by domain, as many of each."""
    length = min(DEFAULT_LENGTH, n_ctx_train)
    return cut_windows(texts, length, max(1, n_tokens // (length * len(texts))))


def seen_share(windows: Windows, statistics: Statistics) -> float:
    """The share of the windows' stretches of 16 tokens that a calibration ran over; 0 where none is so long."""
    known = set(_stretches(statistics.tokens))
    found = [stretch in known for stretch in _stretches(windows.sequences.tokens)]
    return sum(found) / len(found) if found else 0.0


def _stretches(texts: Sequence[Sequence[int]]) -> Iterator[bytes]:
    for text in texts:
        if len(text) >= _SPAN:
            yield from map(_bytes, np.lib.stride_tricks.sliding_window_view(np.array(text, np.int32), _SPAN))


def _bytes(tokens: NDArray[np.int32]) -> bytes:
    return tokens.tobytes()
