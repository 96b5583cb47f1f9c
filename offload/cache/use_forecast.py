"""How often experts will be used in the tokens to come, by what is learnt of all experts while running."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

HALF_LIVES = 0.5, 8.0, 64.0
"""Of the windows, in tokens: the last token, the last sentence, the text."""
LASTING_TOKENS = 128.0
"""Tokens after which on average what a text uses more or less than usual ends with it; too seldom to be learnt."""
PERIOD_TOKENS = 32
"""Every so many tokens what is usual is told anew; only then all experts are looked at."""
USUAL_PERIODS = 64
"""Periods that what is usual is the mean of at most; the file's priors count as many."""
_UNKNOWN_PERIODS = 4
"""So many periods an even use counts, where the file tells nothing."""
_AT_FIRST = 0.0, 0.0, 0.25
"""How much of what each window shows is expected of the next token before anything has been learnt."""
_DOUBT_TOKENS = 64
"""So many tokens without any preference what is assumed at first counts."""
_KEPT = 1 - 1 / 1024
"""Of what has been learnt, in a token."""


class UseForecast:
    """Expects of each expert what is usual, and learnt shares of what it was lately used more or less than that.

    Windows of several half-lives see how often an expert was used of late. How much of each is found again in the next
    token is a least-squares fit over all experts and tokens so far. As windows change by uses alone, the uses in all
    further tokens follow from it: an expert that is used next is seen by the windows again. Caches for single texts
    thereby learn whether to keep what was just used, what the text likes, or what is usual.

    The sums of the fit are carried on from token to token by the experts that were used, so that a token does not take
    longer for many experts.
    """

    def __init__(self, usual: Values, n_used: int, *, is_known: bool) -> None:
        self._shape, n_expert = usual.shape, usual.shape[1]
        self._usual = usual.ravel().copy()
        self._n_periods = USUAL_PERIODS if is_known else _UNKNOWN_PERIODS
        self._keep = 0.5 ** (1 / np.array(HALF_LIVES))
        self._fade, self._see = np.append(self._keep, 1.0), np.append(1 - self._keep, 0.0)
        self._scale = np.ones_like(self._keep)
        self._windows = np.tile(self._usual, (len(self._keep), 1))
        self._n_uses, self._n_tokens = np.zeros_like(self._usual), 0
        self._used: list[NDArray[np.integer[Any]]] = []
        self._has_prompt = False
        share = n_used / n_expert
        by_chance = len(self._usual) * max(1e-3, share * (1 - share)) * (1 - self._keep) / (1 + self._keep)
        self._squares = _DOUBT_TOKENS * np.diag(by_chance)
        self._least_squares = 1e-9 * self._squares  # solvable even if nothing is ever unusual
        self._products = self._squares @ np.array(_AT_FIRST)
        self._sums = self._summed()
        self._weights: dict[float, Values] = {}

    def decode(self, layer: int, experts: NDArray[np.integer[Any]]) -> None:
        """The token at hand uses these experts of a layer."""
        self._used.append(layer * self._shape[1] + experts)

    def prompt(self, layer: int, means: Values, n_tokens: float) -> None:
        """Lets the windows of a layer see `n_tokens` tokens at once, each of which uses its experts `means` times."""
        own = slice(layer * self._shape[1], layer * self._shape[1] + len(means))
        kept = (self._keep**n_tokens)[:, None]
        self._windows[:, own] = kept * self._windows[:, own] + (1 - kept) / self._scale[:, None] * means
        self._has_prompt = True

    def end_token(self) -> None:
        """Learns from the uses of the token at hand, and shows them to the windows."""
        used = np.unique(np.concatenate(self._used)) if self._used else np.empty(0, np.int64)
        if not self._has_prompt:
            self._learn(used)
        self._scale *= self._keep
        self._windows[:, used] += ((1 - self._keep) / self._scale)[:, None]
        self._n_uses[used] += 1
        self._n_tokens += 1
        if self._n_tokens % PERIOD_TOKENS == 0:
            self._n_periods = min(USUAL_PERIODS, self._n_periods + 1)
            self._usual += (self._n_uses / PERIOD_TOKENS - self._usual) / self._n_periods
            self._n_uses[:] = 0
        if self._n_tokens % PERIOD_TOKENS == 0 or self._has_prompt:
            self._sums = self._summed()
        self._used.clear()
        self._weights.clear()
        self._has_prompt = False

    def _learn(self, used: NDArray[np.int64]) -> None:
        """Enters one token's uses in the fit, and carries the sums on to the next token."""
        seen = np.vstack((self._windows[:, used] * self._scale[:, None], self._usual[used])).sum(axis=1)
        sums, n_window = self._sums, len(self._keep)
        unusual = sums[:n_window] - sums[n_window]
        self._squares = _KEPT * self._squares + unusual[:, :n_window] - unusual[:, n_window:]
        self._products = _KEPT * self._products + seen[:n_window] - seen[n_window] - unusual[:, n_window]
        added = np.outer(self._fade * seen, self._see)
        self._sums = np.outer(self._fade, self._fade) * sums + added + added.T
        self._sums += len(used) * np.outer(self._see, self._see)

    def _summed(self) -> Values:
        """The sums over all experts of products of what windows see and what is usual; takes it out of the scale."""
        self._windows *= self._scale[:, None]
        self._scale[:] = 1
        every = np.vstack((self._windows, self._usual))
        sums: Values = every @ every.T
        return sums

    def _weights_of(self, n_tokens: float) -> Values:
        """Uses in `n_tokens` tokens for each that a window shows more than usual."""
        if n_tokens not in self._weights:
            shares = np.linalg.solve(self._squares + self._least_squares, self._products)
            shares /= max(1.0, shares.sum())  # what is unusual does not grow by itself
            lasting = 1 - 1 / min(n_tokens, LASTING_TOKENS)
            following = np.diag(self._keep) + np.outer(1 - self._keep, shares)
            every = np.linalg.solve((np.eye(len(shares)) - lasting * following).T, shares)
            self._weights[n_tokens] = every.astype(np.float64, copy=False)
        return self._weights[n_tokens]

    def uses_within(self, n_tokens: float) -> Values:
        """Expected uses of every expert in the next tokens, those of later ones counting less, [n_layer, n_expert]."""
        weights = self._weights_of(n_tokens)
        uses = (weights * self._scale) @ self._windows
        uses += (n_tokens - weights.sum()) * self._usual
        return uses.reshape(self._shape)

    def uses_after_use(self, layer: int, experts: NDArray[np.integer[Any]], n_tokens: float) -> Values:
        """The same of some of a layer's experts, which the token at hand uses, for the tokens after it."""
        weights, at = self._weights_of(n_tokens), layer * self._shape[1] + experts
        uses: Values = (weights * self._keep * self._scale) @ self._windows[:, at]
        uses += (n_tokens - weights.sum()) * self._usual[at] + weights @ (1 - self._keep)
        return uses

    def mean_use(self, key: tuple[int, int], n_tokens: float) -> float:
        """Expected uses of one expert per token, on average over the next tokens."""
        weights, at = self._weights_of(n_tokens), key[0] * self._shape[1] + key[1]
        more = float((weights * self._scale) @ self._windows[:, at]) - float(weights.sum() * self._usual[at])
        return float(self._usual[at]) + more / n_tokens
