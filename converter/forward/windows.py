"""The tokens that a model is evaluated on: windows of texts, of which the later part is predicted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slimoe.converter.forward.stream import Sequences
from slimoe.offload.errors import UsageError

Rows = NDArray[np.int64]

_FEWEST = 4
"""Tokens of a text from which something can be predicted."""


@dataclass(frozen=True, slots=True)
class Windows:
    """Sequences, and the domain of each. Scored are the tokens of a sequence's second half, the middle one included.

    `rows` [n_scored] are the rows of all sequences that predict them, `targets` [n_scored] the tokens themselves,
    `owners` [n_scored] the sequence of each.
    """

    sequences: Sequences
    domains: tuple[str, ...]
    rows: Rows
    targets: Rows
    owners: Rows

    @property
    def n_scored(self) -> int:
        """Tokens that are predicted."""
        return len(self.rows)

    def domain_rows(self) -> dict[str, NDArray[np.bool_]]:
        """Which of the scored tokens are of a domain, by domain in order."""
        of_sequence = np.array(self.domains)
        return {domain: (of_sequence == domain)[self.owners] for domain in dict.fromkeys(self.domains)}


def cut_windows(texts: Mapping[str, Sequence[int]], length: int = 512, most: int | None = None) -> Windows:
    """Cuts each domain's text into consecutive windows of `length` tokens, and takes `most` of them, evenly spread.

    What is left at a text's end is not used; a text shorter than a window is one. Raises UsageError for a text too
    short to predict anything of it.
    """
    assert length >= _FEWEST
    found: list[tuple[str, tuple[int, ...]]] = []
    for domain, text in texts.items():
        if len(text) < _FEWEST:
            problem = f"The text {domain} has only {len(text)} tokens, but an evaluation needs {_FEWEST}."
            raise UsageError(f"{problem} Give a longer one.")
        n_windows = max(1, len(text) // length)
        spread = np.linspace(0, n_windows - 1, min(most or n_windows, n_windows)).round().astype(int)
        found += ((domain, tuple(text[n * length : (n + 1) * length])) for n in np.unique(spread).tolist())
    sequences = Sequences(tuple(window for _, window in found))
    rows, targets, owners = [], [], []
    for index, (begin, end) in enumerate(sequences.spans()):
        half = np.arange((end - begin) // 2, end - begin)
        rows.append(begin + half - 1)
        targets.append(np.array(sequences.tokens[index], np.int64)[half])
        owners.append(np.full(len(half), index))
    domains = tuple(domain for domain, _ in found)
    return Windows(sequences, domains, np.concatenate(rows), np.concatenate(targets), np.concatenate(owners))
