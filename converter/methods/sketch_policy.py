"""What any policy about a layer's experts would change, exactly, from inner products of what it could add.

A policy is a coefficient for each vector of the sketch and token; its squared error is a quadratic form, without any
work in n_embd. Dropping and re-routing, constants in place of experts, skipping, and leaving out the whole part are
policies. Shapes: S tokens, R router rows, E stored experts, n = 2 E + 1 vectors.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slimoe.converter.methods.layer_weight import sketch_of
from slimoe.converter.stats.statistics import Double, LayerStatistics, Single
from slimoe.offload.errors import UsageError
from slimoe.offload.model.spec import ExpertSpec

_TOKENS_AT_ONCE = 4096


def policy_error(gram: Single, change: Double) -> Double:
    """Squared errors [S] of policies whose coefficients differ by `change` [S, n] from the model's."""
    used = np.flatnonzero(change.any(0))
    errors = np.zeros(change.shape[0])
    for begin in range(0, change.shape[0], _TOKENS_AT_ONCE):
        part = slice(begin, begin + _TOKENS_AT_ONCE)
        u = change[part][:, used]
        products = gram[part][:, used[:, None], used].astype(np.float64)
        errors[part] = np.einsum("si,sij,sj->s", u, products, u, optimize=True)
    return np.maximum(errors, 0.0)


def row_shares(logits: Single, kept: NDArray[np.bool_], experts: ExpertSpec) -> Double:
    """Shares [S, R] of the rows that tokens pick among those `kept` [R], zero elsewhere."""
    assert kept.sum() >= experts.n_expert_used, "fewer rows than picks"
    values = np.where(kept, logits.astype(np.float64), -np.inf)
    picks = np.argsort(-values, axis=1, kind="stable")[:, : experts.n_expert_used]
    chosen = np.take_along_axis(values, picks, 1)
    powers = np.exp(chosen - chosen[:, :1])
    shares = np.zeros_like(values)
    np.put_along_axis(shares, picks, powers / powers.sum(1, keepdims=True) * experts.weights_scale, 1)
    return shares


def grown(kept: Double, shares: Double) -> Double:
    """The shares `kept` [S, R], each token's grown to the sum that all of them have in `shares`, as the engine does."""
    whole, left = shares.sum(1, keepdims=True), kept.sum(1, keepdims=True)
    return np.asarray(kept * np.divide(whole, left, out=np.zeros_like(left), where=left > 0))


@dataclass(frozen=True, slots=True, eq=False)
class LayerSketch:
    """One layer's sketch, ready for policies: `target` [R] are the experts that rows mean, `shares` [S, R] the model's.

    All coefficients are [S, n], in the order of the sketch's vectors.
    """

    gram: Single
    logits: Single
    target: NDArray[np.int64]
    experts: ExpertSpec
    shares: Double

    @property
    def n_expert(self) -> int:
        """Stored experts."""
        return int(self.gram.shape[1]) // 2

    def coefficients(self, shares: Double, constants: Collection[int] = ()) -> Double:
        """Coefficients of rows' shares [S, R], with the mean outputs of the experts `constants` in their place."""
        result = np.zeros((shares.shape[0], self.gram.shape[1]))
        for row, expert in enumerate(self.target):
            result[:, expert + self.n_expert * (expert in constants)] += shares[:, row]
        return result

    def unchanged(self) -> Double:
        """The model's own."""
        return self.coefficients(self.shares)

    def rows_of(self, experts: Collection[int]) -> NDArray[np.bool_]:
        """Which rows [R] mean one of these experts."""
        return np.isin(self.target, np.array(sorted(experts), np.int64))

    def redirected(self, dropped: Collection[int]) -> Double:
        """Without some experts and their rows: tokens pick among the others."""
        return self.coefficients(row_shares(self.logits, ~self.rows_of(dropped), self.experts))

    def with_constants(self, dropped: Collection[int]) -> Double:
        """With the mean outputs of some experts in their place."""
        return self.coefficients(self.shares, dropped)

    def giving_up(self, given_up: NDArray[np.bool_]) -> Double:
        """Without the picks `given_up` [S, R]; what they had goes to the other picks, as the engine does it."""
        return self.coefficients(grown(np.where(given_up, 0.0, self.shares), self.shares))

    def skipping(self, ratio: float) -> Double:
        """Without picks whose share is below `ratio` of the token's largest (NAEE, arXiv 2402.14800)."""
        return self.giving_up((self.shares > 0) & (self.shares < ratio * self.shares.max(1, keepdims=True)))

    def nothing(self) -> Double:
        """Without the layer's feed-forward part."""
        return np.zeros((self.shares.shape[0], self.gram.shape[1]))

    def error(self, coefficients: Double) -> Double:
        """Squared errors [S] of the layer's output."""
        return policy_error(self.gram, coefficients - self.unchanged())

    def cosine(self, coefficients: Double) -> Double:
        """Cosines [S] between the stream m before the part and m + y after it."""
        after = coefficients.copy()
        after[:, -1] += 1
        stream = self.gram[:, -1, -1].astype(np.float64)
        norms = np.sqrt(stream * policy_error(self.gram, after))
        products = np.einsum("sn,sn->s", self.gram[:, -1].astype(np.float64), after)
        return np.asarray(np.divide(products, norms, out=np.zeros_like(norms), where=norms > 0))


def layer_sketch(layer: LayerStatistics, target: Sequence[int], experts: ExpertSpec) -> LayerSketch:
    """A layer's sketch; `target` is the source's, `experts` says how the model routes.

    Raises UsageError for a layer without a sketch, and for one that has constant experts already, of which a
    sketch knows nothing.
    """
    sketch = sketch_of(layer)
    means = np.array(target, np.int64)
    if (means < 0).any():
        raise UsageError("The model has constants in place of experts already. Slim the model that it was made from.")
    assert sketch.gram.shape[1] > 2 * means.max(initial=0) + 2, "statistics of another model"
    shares = row_shares(sketch.logits, np.ones(means.size, np.bool_), experts)
    return LayerSketch(sketch.gram, sketch.logits, means, experts, shares)
