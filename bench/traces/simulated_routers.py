"""Routers of random weights over hidden states that drift, to try caches with any number of experts without a model.

`linear` is the usual router, a matrix with a row for each expert. `product-keys` is that of PEER, whose retrieval of a
few among a million experts looks at two sets of a thousand sub-keys.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import isqrt
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
ExpertIds = NDArray[np.int64]

N_EMBD = 64
N_KEY = 32
"""Numbers in a sub-key, and in half a query."""
DRIFT = 0.3
"""The part of a hidden state that is new with each token."""
SKEW = 1.0
"""Standard deviation of the experts' biases, which let some be selected far more often than others."""


@dataclass(frozen=True, slots=True, eq=False)
class Routed:
    """What a token selects: `experts` [n_used], each once; and `candidates` [n] with their `logits`, for prediction."""

    experts: ExpertIds
    candidates: ExpertIds
    logits: Floats


class Router(Protocol):
    """The router of one layer."""

    def route(self, hidden: Floats) -> Routed:
        """Selects experts for a hidden state [N_EMBD]."""


class LinearRouter:
    """A logit for each expert; the `n_used` largest are selected."""

    def __init__(self, n_expert: int, n_used: int, rng: np.random.Generator) -> None:
        self._weights = rng.normal(0, N_EMBD**-0.5, (n_expert, N_EMBD)).astype(np.float32)
        self._bias = rng.normal(0, SKEW, n_expert).astype(np.float32)
        self._n_used, self._all = n_used, np.arange(n_expert)

    def route(self, hidden: Floats) -> Routed:
        """Selects experts for a hidden state."""
        logits = self._weights @ hidden + self._bias
        return Routed(best(logits, self._n_used), self._all, logits)


class ProductKeys:
    """PEER's retrieval: an expert is a pair of sub-keys, and its logit the sum of theirs, in each of several heads.

    The `n_best` experts of a head are among the pairs of its `n_best` best first and best second sub-keys. Experts that
    several heads retrieve are selected once.

    Source: Mixture of a Million Experts (arXiv 2407.04153), section 2.
    """

    def __init__(self, n_expert: int, n_heads: int, n_best: int, rng: np.random.Generator) -> None:
        self.n_side, self._n_best = isqrt(n_expert), n_best
        assert self.n_side**2 == n_expert, "the number of experts is no square"
        self._queries = rng.normal(0, N_EMBD**-0.5, (n_heads, 2, N_KEY, N_EMBD)).astype(np.float32)
        self._keys = rng.normal(0, N_KEY**-0.5, (2, self.n_side, N_KEY)).astype(np.float32)
        self._bias = rng.normal(0, SKEW, (2, self.n_side)).astype(np.float32)

    def sub_logits(self, hidden: Floats) -> Floats:
        """The logits of the sub-keys, [n_heads, 2, n_side]."""
        queries = self._queries @ hidden
        logits: Floats = np.einsum("hsk,snk->hsn", queries, self._keys) + self._bias
        return logits

    def retrieve(self, hidden: Floats) -> tuple[ExpertIds, Floats]:
        """The best experts of each head and their logits, both [n_heads, n_best], best first."""
        ids, logits = [], []
        for first, second in self.sub_logits(hidden):
            rows, columns = best(first, self._n_best), best(second, self._n_best)
            sums = (first[rows][:, None] + second[columns][None, :]).ravel()
            chosen = best(sums, self._n_best)
            ids.append(rows[chosen // len(columns)] * self.n_side + columns[chosen % len(columns)])
            logits.append(sums[chosen])
        return np.array(ids), np.array(logits)

    def route(self, hidden: Floats) -> Routed:
        """Selects experts for a hidden state."""
        ids, logits = self.retrieve(hidden)
        experts, places = np.unique(ids, return_index=True)
        return Routed(experts, experts, logits.ravel()[places])


MakeRouter = Callable[[int, np.random.Generator], Router]
ROUTERS: dict[str, MakeRouter] = {
    "linear": lambda n_expert, rng: LinearRouter(n_expert, 8, rng),
    "product-keys": lambda n_expert, rng: ProductKeys(n_expert, 2, min(4, isqrt(n_expert)), rng),
}


def best(logits: Floats, n: int) -> ExpertIds:
    """The places of the `n` largest, largest first."""
    places = np.argpartition(logits, len(logits) - n)[len(logits) - n :]
    ordered: ExpertIds = places[np.argsort(-logits[places], kind="stable")].astype(np.int64)
    return ordered


def hidden_states(n_tokens: int, rng: np.random.Generator) -> Iterator[Floats]:
    """Hidden states [N_EMBD] of length sqrt(N_EMBD), each a bit like the one before."""
    state = rng.normal(0, 1, N_EMBD)
    for _ in range(n_tokens):
        state = np.sqrt(1 - DRIFT) * state + np.sqrt(DRIFT) * rng.normal(0, 1, N_EMBD)
        yield state.astype(np.float32)
