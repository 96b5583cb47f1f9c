"""Draws tokens from logits and computes log-probabilities."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from slimoe.offload.errors import BadLogitsError, UsageError
from slimoe.offload.text.generation import SamplingParams, TokenLogprob

Logits = NDArray[np.float32]

_BLOCK = 64
_FORBIDDEN = np.float32(1e30)
"""Stands for infinity in biased logits, so that differences of them stay numbers."""


def check_params(params: SamplingParams, n_vocab: int) -> None:
    """Raises UsageError for a parameter out of range, and for a bias of what is no token of `n_vocab`."""
    ranges = (
        ("temperature", params.temperature, params.temperature >= 0, "0 or more"),
        ("top_k", params.top_k, params.top_k >= 0, "0 (off) or more"),
        ("top_p", params.top_p, 0 <= params.top_p <= 1, "between 0 and 1"),
        ("min_p", params.min_p, 0 <= params.min_p <= 1, "between 0 and 1"),
        ("repeat_penalty", params.repeat_penalty, 0.01 <= params.repeat_penalty < math.inf, "0.01 or more"),
        ("presence_penalty", params.presence_penalty, math.isfinite(params.presence_penalty), "a number"),
        ("frequency_penalty", params.frequency_penalty, math.isfinite(params.frequency_penalty), "a number"),
        ("repeat_last_n", params.repeat_last_n, params.repeat_last_n >= -1, "-1 (all) or more"),
    )
    for name, value, is_sound, expected in ranges:
        if not is_sound:
            raise UsageError(f"{name} is {value}, but must be {expected}.")
    for token, bias in params.logit_bias.items():
        if not 0 <= token < n_vocab:
            raise UsageError(f"logit_bias names token {token}, but the vocabulary has {n_vocab} tokens.")
        if math.isnan(bias):
            raise UsageError(f"The logit_bias of token {token} is no number.")
    if params.forbids_all(n_vocab):
        raise UsageError(f"logit_bias forbids all {n_vocab} tokens of the vocabulary. Leave some of them out.")


class Sampler:
    """Samples the tokens of one request, and remembers the prompt and what was drawn for the penalties.

    The filters come in llama.cpp's order: bias, penalties, top_k, top_p, min_p, temperature.
    """

    def __init__(self, params: SamplingParams, prompt: Sequence[int]) -> None:
        self.params = params
        # numpy takes no negative seeds, clients send them.
        self._random = np.random.default_rng(None if params.seed is None else params.seed % 2**64)
        self._tokens = list(prompt)
        self._biased = np.fromiter(params.logit_bias.keys(), np.int64)
        self._biases = np.fromiter(params.logit_bias.values(), np.float32)

    @property
    def _penalises(self) -> bool:
        p = self.params
        changes = (p.repeat_penalty != 1.0, p.presence_penalty != 0.0, p.frequency_penalty != 0.0)
        return p.repeat_last_n != 0 and any(changes)

    def sample(self, logits: Logits, allowed: NDArray[np.bool_] | None = None) -> int:
        """The next token for logits [n_vocab], which are left as they are, of those `allowed` if that is given.

        Raises BadLogitsError for NaN, and UsageError when `logit_bias` forbids all that are allowed.
        """
        if not math.isfinite(logits.max()):
            raise BadLogitsError
        if self._biased.size or self._penalises:
            logits = self._adjusted(logits)
        if allowed is None:
            token = self._draw(logits)
        else:
            # What is not allowed need not be sorted.
            tokens = allowed.nonzero()[0]
            kept = logits[tokens]
            if kept.max() <= -_FORBIDDEN:
                raise UsageError("logit_bias forbids all tokens that the form of the answer allows. Leave some out.")
            token = int(tokens[self._draw(kept)])
        self._tokens.append(token)
        return token

    def _adjusted(self, logits: Logits) -> Logits:
        logits = logits.copy()
        logits[self._biased] += self._biases
        np.clip(logits, -_FORBIDDEN, _FORBIDDEN, out=logits)
        if not self._penalises:
            return logits
        p = self.params
        recent = self._tokens if p.repeat_last_n < 0 else self._tokens[-p.repeat_last_n :]
        counts = Counter(recent)
        tokens = np.fromiter(counts.keys(), np.int64, len(counts))
        seen = logits[tokens]
        seen = np.where(seen > 0, seen / np.float32(p.repeat_penalty), seen * np.float32(p.repeat_penalty))
        times = np.fromiter(counts.values(), np.float32, len(counts))
        logits[tokens] = seen - times * np.float32(p.frequency_penalty) - np.float32(p.presence_penalty)
        return logits

    def _draw(self, logits: Logits) -> int:
        p = self.params
        if p.temperature <= 0:
            return int(logits.argmax())
        order = _likeliest(logits, p.top_k or len(logits))
        kept = logits[order].astype(np.float64)
        probabilities = _softmax(kept)
        n_kept = len(order)
        if p.top_p < 1:
            n_kept = int(np.searchsorted(np.cumsum(probabilities), p.top_p)) + 1
        if p.min_p > 0:
            n_kept = min(n_kept, int(np.count_nonzero(probabilities >= p.min_p * probabilities[0])))
        # The difference first: the quotient of a logit and a tiny temperature may be infinite.
        with np.errstate(over="ignore"):
            probabilities = _softmax((kept[: max(1, n_kept)] - kept[0]) / p.temperature)
        return int(order[self._random.choice(len(probabilities), p=probabilities)])


def token_logprob(logits: Logits, token: int, n_top: int) -> TokenLogprob:
    """Log-probability of `token`, and of the `n_top` likeliest, from logits [n_vocab] as the model gave them."""
    top = logits.max()
    normaliser = float(top) + float(np.log(np.exp(logits - top, dtype=np.float64).sum()))
    best = _likeliest(logits, n_top) if n_top else np.empty(0, np.int64)
    return TokenLogprob(
        token,
        float(logits[token]) - normaliser,
        tuple((int(t), float(logits[t]) - normaliser) for t in best),
    )


def _likeliest(logits: Logits, n: int) -> NDArray[np.int64]:
    """Tokens of the `n` greatest logits, greatest first; of equals the lower token comes first."""
    candidates = np.arange(len(logits))
    if n < len(logits):
        # The n-th greatest of blocks' maxima is at most the n-th greatest logit, and is found several times faster.
        n_blocks = len(logits) // _BLOCK
        few = logits if n_blocks < n else logits[: n_blocks * _BLOCK].reshape(n_blocks, _BLOCK).max(axis=1)
        candidates = np.flatnonzero(logits >= np.partition(few, -n)[-n])
    order: NDArray[np.int64] = candidates[np.argsort(-logits[candidates], kind="stable")[:n]]
    return order


def _softmax(values: NDArray[np.float64]) -> NDArray[np.float64]:
    exponents = np.exp(values - values.max())
    probabilities: NDArray[np.float64] = exponents / exponents.sum()
    return probabilities
