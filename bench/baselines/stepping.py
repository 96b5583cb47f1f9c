"""Drives a candidate step by step and times it: prefill and decode at a depth, warm-up excluded."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

WARM_STEPS = 2


class Candidate(Protocol):
    """What is measured: a model with one sequence in its KV cache. Both the engine and llama.cpp have this."""

    @property
    def n_past(self) -> int:
        """Tokens in the KV cache."""

    def prefill(self, tokens: Sequence[int]) -> np.ndarray:
        """Appends tokens; returns the last one's logits, float32 of shape (n_vocab,), good until the next call."""

    def decode(self, token: int) -> np.ndarray:
        """Appends one token; returns its logits."""

    def truncate(self, n_past: int) -> None:
        """Forgets everything after the first `n_past` tokens, and with recurrent layers perhaps more of them."""

    def close(self) -> None:
        """Gives everything back."""


@dataclass(frozen=True, slots=True)
class Timing:
    """One round of one candidate, in seconds: of the whole prefill, and of the median decode step."""

    prefill: float
    decode: float


def random_tokens(n_tokens: int, n_vocab: int, seed: int = 1) -> list[int]:
    """Fixed tokens, uniform over the vocabulary, as llama-bench draws them: the adversarial case for routing."""
    return [int(token) for token in np.random.default_rng(seed).integers(0, n_vocab, n_tokens)]


def go_to_depth(candidate: Candidate, tokens: Sequence[int], depth: int) -> None:
    """Leaves exactly the first `depth` of `tokens` in the KV cache."""
    candidate.truncate(min(candidate.n_past, depth))
    if candidate.n_past < depth:
        candidate.prefill(tokens[candidate.n_past : depth])


def time_prefill(candidate: Candidate, tokens: Sequence[int], cached: Sequence[int] = ()) -> float:
    """Seconds that appending `tokens` takes; the KV cache is then as before.

    What a model with recurrent layers had to forget is read again, of the tokens that were `cached`.
    """
    depth = candidate.n_past
    begin = time.perf_counter()
    candidate.prefill(tokens)
    seconds = time.perf_counter() - begin
    go_to_depth(candidate, cached, depth)
    return seconds


def time_decode(candidate: Candidate, tokens: Sequence[int], cached: Sequence[int] = ()) -> list[float]:
    """Seconds of each step that appends one of `tokens`; the KV cache is then as before, as with `time_prefill`."""
    depth = candidate.n_past
    seconds = []
    for token in tokens:
        begin = time.perf_counter()
        candidate.decode(token)
        seconds.append(time.perf_counter() - begin)
    go_to_depth(candidate, cached, depth)
    return seconds


def measure(candidate: Candidate, prefill: Sequence[int], decode: Sequence[int], cached: Sequence[int] = ()) -> Timing:
    """One round at the current depth. The first decode steps, in which caches and threads wake, do not count."""
    seconds = time_prefill(candidate, prefill, cached)
    time_decode(candidate, decode[:WARM_STEPS], cached)
    return Timing(seconds, statistics.median(time_decode(candidate, decode, cached)))


def kl_divergence(logits: np.ndarray, reference: np.ndarray) -> float:
    """KL(reference || logits) in nats, both of shape (n_vocab,)."""
    p, q = _log_softmax(reference), _log_softmax(logits)
    return float(np.sum(np.exp(p) * (p - q)))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted: np.ndarray = logits.astype(np.float64) - logits.max()
    return shifted - float(np.log(np.exp(shifted).sum()))
