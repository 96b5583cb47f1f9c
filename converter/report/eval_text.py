"""The texts that a model is evaluated on: given files, or what calibration leaves out of the shipped mixture."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from slimoe.converter.forward.texts import DEFAULT_LENGTH, TextEncoder, TextFile, documents, held_out_texts
from slimoe.converter.forward.windows import Windows, cut_windows
from slimoe.converter.stats.statistics import Statistics
from slimoe.offload.errors import UsageError

EVAL_TOKENS = 16384
_SPAN = 16
"""The number of tokens in a row that two texts do not share by chance."""
_CHARACTERS_PER_TOKEN = 32


@dataclass(frozen=True, slots=True)
class EvalText:
    """Windows to evaluate on; `is_own` says that they are of the shipped mixture and not of given files.

    `seen` is the part of their stretches of 16 tokens that occur in the calibration's texts, None if these are unknown.
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
    """Reads at most about `n_tokens` tokens, evenly from all domains of `files`, or of the shipped mixture without any.

    Raises UsageError for files that cannot be read or are too short.
    """
    chosen = tuple(files) or held_out_texts()
    texts: dict[str, list[int]] = {}
    for file in chosen:
        for ids in documents(file, encoder, _CHARACTERS_PER_TOKEN * n_tokens):
            texts.setdefault(file.domain, []).extend(ids)
    if not any(texts.values()):
        names = ", ".join(str(file.path) for file in chosen)
        raise UsageError(f"There is no text to evaluate on in {names}. Give longer files.")
    windows = eval_windows(texts, n_ctx_train, n_tokens)
    return EvalText(windows, not files, None if statistics is None else seen_share(windows, statistics))


def eval_windows(texts: dict[str, list[int]], n_ctx_train: int, n_tokens: int = EVAL_TOKENS) -> Windows:
    """Cuts tokens by domain into windows, equally many of each domain."""
    length = min(DEFAULT_LENGTH, n_ctx_train)
    return cut_windows(texts, length, max(1, n_tokens // (length * len(texts))))


def seen_share(windows: Windows, statistics: Statistics) -> float:
    """The part of the windows' stretches of 16 tokens that calibration texts have too; 0 if no window is so long."""
    known = set(_stretches(statistics.tokens))
    found = [stretch in known for stretch in _stretches(windows.sequences.tokens)]
    return sum(found) / len(found) if found else 0.0


def _stretches(texts: Sequence[Sequence[int]]) -> Iterator[bytes]:
    for text in texts:
        if len(text) >= _SPAN:
            windows = np.lib.stride_tricks.sliding_window_view(np.array(text, np.int32), _SPAN)
            yield from (window.tobytes() for window in windows)
