"""The exact error of any policy about a layer's experts, from the Gram matrices of what they add to the stream.

A policy gives a coefficient to each vector that could be added to the residual stream of a token: outputs of experts,
constants, and the stream itself. Its squared error is a quadratic form of the coefficients, without any work in n_embd.
Dropping experts, replacing them with constants, skipping, and leaving out the whole part are policies. Shapes: S
tokens, R rows of the router, E stored experts, n = 2 E + 1 vectors.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slimoe.converter.methods.layer_weight import gram_of
from slimoe.converter.stats.statistics import Double, LayerStatistics, Single
from slimoe.offload.errors import UsageError
from slimoe.offload.model.spec import ModelSpec

_TOKENS_AT_ONCE = 4096


def policy_error(products: Single, change: Double) -> Double:
    """Squared errors [S] of policies whose coefficients differ by `change` [S, n] from the model's.

    `products` [S, n, n] are the Gram matrices of the tokens.
    """
    used = np.flatnonzero(change.any(0))
    errors = np.zeros(change.shape[0])
    for begin in range(0, change.shape[0], _TOKENS_AT_ONCE):
        part = slice(begin, begin + _TOKENS_AT_ONCE)
        u = change[part][:, used]
        inner = products[part][:, used[:, None], used].astype(np.float64)
        errors[part] = np.einsum("si,sij,sj->s", u, inner, u, optimize=True)
    return np.maximum(errors, 0.0)


def row_weights(logits: Single, kept: NDArray[np.bool_], spec: ModelSpec) -> Double:
    """Expert weights [S, R] of a router that has only the rows `kept` [R]; zero for rows that are not selected.

    `logits` [S, R] are those of all rows.
    """
    n_used = spec.n_expert_used
    assert kept.sum() >= n_used, "fewer rows than a token selects"
    values = np.where(kept, logits.astype(np.float64), -np.inf)
    selected = np.argsort(-values, axis=1, kind="stable")[:, :n_used]
    top = np.take_along_axis(values, selected, 1)
    powers = np.exp(top - top[:, :1])
    # Renormalised weights are a softmax over the selected rows alone.
    whole = powers if spec.architecture.router.renormalise else np.exp(values - top[:, :1])
    weights = np.zeros_like(values)
    np.put_along_axis(weights, selected, powers / whole.sum(1, keepdims=True) * spec.expert_weights_scale, 1)
    return weights


def renormalised(kept: Double, weights: Double) -> Double:
    """Scales the expert weights `kept` [S, R] to the sum that a token's `weights` [S, R] have, as the engine does."""
    whole, left = weights.sum(1, keepdims=True), kept.sum(1, keepdims=True)
    return np.asarray(kept * np.divide(whole, left, out=np.zeros_like(left), where=left > 0))


@dataclass(frozen=True, slots=True, eq=False)
class LayerGram:
    """One layer's Gram matrices `products` [S, n, n] and router logits [S, R], ready for policies.

    `target` [R] are the experts that the router's rows mean, `weights` [S, R] the model's own expert weights. All
    coefficients are [S, n], in the order of the vectors of `GramSample`.
    """

    products: Single
    logits: Single
    target: NDArray[np.int64]
    spec: ModelSpec
    weights: Double

    @property
    def n_expert(self) -> int:
        """The number of stored experts."""
        return int(self.products.shape[1]) // 2

    def coefficients(self, weights: Double, constants: Collection[int] = ()) -> Double:
        """The coefficients of expert weights [S, R]; the experts `constants` are replaced with their mean outputs."""
        result = np.zeros((weights.shape[0], self.products.shape[1]))
        for row, expert in enumerate(self.target):
            result[:, expert + self.n_expert * (expert in constants)] += weights[:, row]
        return result

    def unchanged(self) -> Double:
        """The coefficients of the model itself."""
        return self.coefficients(self.weights)

    def rows_of(self, experts: Collection[int]) -> NDArray[np.bool_]:
        """Which rows [R] of the router mean one of these experts."""
        return np.isin(self.target, np.array(sorted(experts), np.int64))

    def redirected(self, dropped: Collection[int]) -> Double:
        """The coefficients without some experts and their rows: tokens select among the others."""
        return self.coefficients(row_weights(self.logits, ~self.rows_of(dropped), self.spec))

    def with_constants(self, dropped: Collection[int]) -> Double:
        """The coefficients with the mean outputs of some experts in their place."""
        return self.coefficients(self.weights, dropped)

    def nothing(self) -> Double:
        """The coefficients without the layer's feed-forward part."""
        return np.zeros((self.weights.shape[0], self.products.shape[1]))

    def error(self, coefficients: Double) -> Double:
        """The squared errors [S] of the layer's output."""
        return policy_error(self.products, coefficients - self.unchanged())

    def cosine(self, coefficients: Double) -> Double:
        """The cosines [S] between the residual stream m before the part and m + y after it."""
        after = coefficients.copy()
        after[:, -1] += 1
        stream = self.products[:, -1, -1].astype(np.float64)
        norms = np.sqrt(stream * policy_error(self.products, after))
        inner = np.einsum("sn,sn->s", self.products[:, -1].astype(np.float64), after)
        return np.asarray(np.divide(inner, norms, out=np.zeros_like(norms), where=norms > 0))


def layer_gram(layer: LayerStatistics, target: Sequence[int], spec: ModelSpec) -> LayerGram:
    """The Gram matrices of a layer's statistics; `target` is the source's, `spec` says how the model routes.

    Raises UsageError for a layer without Gram matrices, and for one that has constant experts already, which the Gram
    matrices do not contain.
    """
    sample = gram_of(layer)
    means = np.array(target, np.int64)
    if (means < 0).any():
        raise UsageError(
            "The model already has constants in place of experts. Compress the model that it was made from."
        )
    assert sample.gram.shape[1] > 2 * means.max(initial=0) + 2, "statistics of another model"
    weights = row_weights(sample.logits, np.ones(means.size, np.bool_), spec)
    return LayerGram(sample.gram, sample.logits, means, spec, weights)
