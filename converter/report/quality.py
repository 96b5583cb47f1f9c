"""The quality of a compressed model: figures from its scores and the reference's of the same tokens."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slimoe.converter.forward.windows import Windows

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class TokenScores:
    """A model's predictions of the scored tokens, each [n_scored].

    `log_probability` is the natural logarithm of the token's probability, `rank` the number of likelier tokens, and
    `top` the likeliest token.
    """

    log_probability: Floats
    rank: Ints
    top: Ints


@dataclass(frozen=True, slots=True)
class Comparison:
    """The predictions of a model and of the reference; `divergence` [n_scored] is KL(reference, model) in nats.

    `flips` and `stream_error` are by block of the reference, None where there is nothing to compare. `flips` is the
    part of the reference's selected router rows that the model did not select too, over all tokens. `stream_error` is
    the root of the mean, over traced tokens, of the squared difference of the residual streams behind the block over
    the squared norm.
    """

    windows: Windows
    reference: TokenScores
    model: TokenScores
    divergence: Floats
    flips: tuple[float | None, ...]
    stream_error: tuple[float | None, ...]
    n_vocab: int


@dataclass(frozen=True, slots=True)
class Divergence:
    """The distribution of the KL divergence in nats per token.

    `error` is the standard error of the mean if windows are independent, and None if there is only one window.
    """

    mean: float
    median: float
    percentile_99: float
    percentile_999: float
    largest: float
    error: float | None


@dataclass(frozen=True, slots=True)
class DomainQuality:
    """The figures of one domain; `same_top` is the part of its tokens for which both models have the same likeliest
    token.
    """

    n_tokens: int
    divergence: Divergence
    perplexity: float
    reference_perplexity: float
    same_top: float

    @property
    def perplexity_rise(self) -> float:
        """The rise of the perplexity over the reference's, relative to the reference's."""
        return self.perplexity / self.reference_perplexity - 1.0


@dataclass(frozen=True, slots=True)
class Quality:
    """The figures of a comparison: by domain, by block as in `Comparison`, and in `total` of all domains not `unread`.

    The reference cannot read the `unread` domains, so its predictions there do not show what the model lost. If it can
    read none, `total` is of all domains.
    """

    total: DomainQuality
    domains: Mapping[str, DomainQuality]
    unread: tuple[str, ...]
    flips: tuple[float | None, ...]
    stream_error: tuple[float | None, ...]


def summarise(compared: Comparison) -> Quality:
    """Computes the figures of a comparison."""
    rows, unread = compared.windows.domain_rows(), unread_domains(compared)
    counted = [name for name in rows if name not in unread] or list(rows)
    total = _of(compared, np.any([rows[name] for name in counted], axis=0))
    domains = {name: _of(compared, found) for name, found in rows.items()}
    return Quality(total, domains, unread, compared.flips, compared.stream_error)


def unread_domains(compared: Comparison) -> tuple[str, ...]:
    """The domains whose tokens the reference predicts no better than their frequency in the texts does.

    The frequency is counted over the windows of all texts, plus once for every token of the vocabulary.
    """
    tokens = np.concatenate([np.array(one, np.int64) for one in compared.windows.sequences.tokens])
    counts = np.bincount(tokens, minlength=compared.n_vocab) + 1.0
    by_frequency = np.log(counts / counts.sum())[compared.windows.targets]
    gain = compared.reference.log_probability - by_frequency
    rows = compared.windows.domain_rows()
    return tuple(name for name, found in rows.items() if float(gain[found].mean(dtype=np.float64)) <= 0)


def _of(compared: Comparison, rows: Mask) -> DomainQuality:
    reference, model = compared.reference, compared.model
    values = compared.divergence[rows].astype(np.float64)
    mean = float(values.mean())
    _, window = np.unique(compared.windows.owners[rows], return_inverse=True)
    excess = np.bincount(window, values - mean)
    n_windows = len(excess)
    # Windows of unequal length weigh by their tokens.
    error = None
    if n_windows > 1:
        error = float(np.sqrt((excess**2).sum() * n_windows / (n_windows - 1)) / len(values))
    median, high, highest = (float(value) for value in np.quantile(values, (0.5, 0.99, 0.999)))
    return DomainQuality(
        n_tokens=int(rows.sum()),
        divergence=Divergence(mean, median, high, highest, float(values.max()), error),
        perplexity=_perplexity(model.log_probability[rows]),
        reference_perplexity=_perplexity(reference.log_probability[rows]),
        same_top=float((model.top[rows] == reference.top[rows]).mean()),
    )


def _perplexity(log_probability: Floats) -> float:
    return float(np.exp(-log_probability.mean(dtype=np.float64)))
