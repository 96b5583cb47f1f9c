"""What a slimmed model lost: figures from two models' scores of the same tokens."""

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
    """A model's prediction of each scored token [n_scored]: the natural logarithm of its probability, how many tokens
    were thought likelier, and the likeliest one.
    """

    log_probability: Floats
    rank: Ints
    top: Ints


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two models side by side. `divergence` [n_scored] is KL(reference, model) in nats.

    By block of the reference, None where there is nothing to compare: `flips`, the share of its picks of router rows
    that the model did not pick too, over all tokens; `stream_error`, the root of the mean over traced tokens of the
    squared difference of the streams behind the block over the squared norm.
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
    """KL divergence in nats per token.

    `error` is the mean's standard error, windows taken as independent, and None with only one of them.
    """

    mean: float
    median: float
    percentile_99: float
    percentile_999: float
    largest: float
    error: float | None


@dataclass(frozen=True, slots=True)
class DomainQuality:
    """One domain. `same_top` is the share of tokens for which both models find the same one likeliest."""

    n_tokens: int
    divergence: Divergence
    perplexity: float
    reference_perplexity: float
    same_top: float

    @property
    def perplexity_rise(self) -> float:
        """How much larger the perplexity is than the reference's, as a share of that."""
        return self.perplexity / self.reference_perplexity - 1.0


@dataclass(frozen=True, slots=True)
class Quality:
    """Each domain, each block as in `Comparison`, and in `total` the tokens of all domains but those `unread`.

    Those are domains that the reference cannot read: what it predicts without understanding says nothing of what a
    model lost. If it can read none, `total` is of all.
    """

    total: DomainQuality
    domains: Mapping[str, DomainQuality]
    unread: tuple[str, ...]
    flips: tuple[float | None, ...]
    stream_error: tuple[float | None, ...]


def summarise(compared: Comparison) -> Quality:
    """The figures of a comparison."""
    rows, unread = compared.windows.domain_rows(), unread_domains(compared)
    counted = [name for name in rows if name not in unread] or list(rows)
    total = _of(compared, np.any([rows[name] for name in counted], axis=0))
    domains = {name: _of(compared, found) for name, found in rows.items()}
    return Quality(total, domains, unread, compared.flips, compared.stream_error)


def unread_domains(compared: Comparison) -> tuple[str, ...]:
    """Domains whose tokens the reference predicts no better than by how often they occur in the texts, context unseen.

    How often is counted over all the texts, whole windows of them, every token of the vocabulary once more.
    """
    tokens = np.concatenate([np.array(one, np.int64) for one in compared.windows.sequences.tokens])
    counts = np.bincount(tokens, minlength=compared.n_vocab) + 1.0
    by_frequency = np.log(counts / counts.sum())[compared.windows.targets]
    gain = compared.reference.log_probability - by_frequency
    rows = compared.windows.domain_rows()
    return tuple(name for name, found in rows.items() if float(gain[found].mean(dtype=np.float64)) <= 0)


def _of(compared: Comparison, rows: Mask) -> DomainQuality:
    reference, model = compared.reference, compared.model
    return DomainQuality(
        n_tokens=int(rows.sum()),
        divergence=_divergence(compared.divergence[rows].astype(np.float64), compared.windows.owners[rows]),
        perplexity=_perplexity(model.log_probability[rows]),
        reference_perplexity=_perplexity(reference.log_probability[rows]),
        same_top=float((model.top[rows] == reference.top[rows]).mean()),
    )


def _perplexity(log_probability: Floats) -> float:
    return float(np.exp(-log_probability.mean(dtype=np.float64)))


def _divergence(values: NDArray[np.float64], owners: NDArray[np.int64]) -> Divergence:
    mean = float(values.mean())
    _, window = np.unique(owners, return_inverse=True)
    excess = np.bincount(window, values - mean)
    n_windows = len(excess)
    # Windows of unequal length weigh by their tokens.
    error = None
    if n_windows > 1:
        error = float(np.sqrt((excess**2).sum() * n_windows / (n_windows - 1)) / len(values))
    median, *high = (float(value) for value in np.quantile(values, (0.5, 0.99, 0.999)))
    return Divergence(mean, median, high[0], high[1], float(values.max()), error)
