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

from slimoe.converter.methods.layer_weight import gram_of, layer_weight
from slimoe.converter.source.model_source import ModelSource, choice_bias_key
from slimoe.converter.stats.statistics import Double, Int, LayerStatistics, Single
from slimoe.offload.errors import UsageError
from slimoe.offload.model.expert_spec import ExpertSpec
from slimoe.offload.model.spec import ModelSpec

LEAST_SUM = 2.0**-14
"""llama.cpp's lower bound of what the weights of the selected experts are divided by."""
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


def row_weights(logits: Single, kept: NDArray[np.bool_], spec: ModelSpec, choice_bias: Single | None = None) -> Double:
    """Expert weights [S, R] of a router that has only the rows `kept` [R]; zero for rows that are not selected.

    `logits` [S, R] are those of all rows, and `choice_bias` [R] is added to their scores to select.
    """
    n_used = spec.n_expert_used
    assert kept.sum() >= n_used, "fewer rows than a token selects"
    scores, choice = _scores(logits, kept, spec, choice_bias)
    if spec.experts.n_group > 1:
        choice = _of_best_groups(choice, spec.experts)
    selected = np.argsort(-choice, axis=1, kind="stable")[:, :n_used]
    top = np.take_along_axis(scores, selected, 1)
    if spec.router_score == "softmax_of_selected":
        top = _softmax(top)
    if spec.renormalises:
        top /= np.maximum(top.sum(1, keepdims=True), LEAST_SUM)
    weights = np.zeros_like(scores)
    np.put_along_axis(weights, selected, top * spec.expert_weights_scale, 1)
    return weights


def _scores(
    logits: Single, kept: NDArray[np.bool_], spec: ModelSpec, choice_bias: Single | None
) -> tuple[Double, Double]:
    """The scores [S, R] that expert weights are made of, and those that rows are selected by: -inf where not kept."""
    values = logits.astype(np.float64)
    scores = np.where(kept, values, -np.inf)
    if spec.router_score == "sigmoid":
        scores = 1 / (1 + np.exp(-values))
    elif spec.router_score == "softmax":
        scores = _softmax(scores)
    return scores, np.where(kept, scores if choice_bias is None else scores + choice_bias, -np.inf)


def _softmax(values: Double) -> Double:
    powers = np.exp(values - values.max(1, keepdims=True))
    return np.asarray(powers / powers.sum(1, keepdims=True))


def _of_best_groups(choice: Double, experts: ExpertSpec) -> Double:
    """The scores [S, R] with -inf in the groups that are not selected, whose two best add up to less."""
    groups = _by_group(choice, experts)
    best = np.argsort(-np.sort(groups, 2)[:, :, -2:].sum(2), axis=1, kind="stable")[:, : experts.n_group_used]
    is_best = np.zeros(groups.shape[:2], np.bool_)
    np.put_along_axis(is_best, best, values=True, axis=1)
    return np.where(is_best[:, :, None], groups, -np.inf).reshape(choice.shape)


def _by_group(choice: Double, experts: ExpertSpec) -> Double:
    """Scores [S, R] as [S, n_group, R / n_group]; there may be no tokens."""
    n_token, n_row = choice.shape
    return choice.reshape(n_token, experts.n_group, n_row // experts.n_group)


def renormalised(kept: Double, weights: Double) -> Double:
    """Scales the expert weights `kept` [S, R] to the sum that a token's `weights` [S, R] have, as the engine does."""
    whole, left = weights.sum(1, keepdims=True), kept.sum(1, keepdims=True)
    return np.asarray(kept * np.divide(whole, left, out=np.zeros_like(left), where=left > 0))


@dataclass(frozen=True, slots=True, eq=False)
class LayerGram:
    """One layer's Gram matrices `products` [S, n, n] and router logits [S, R], ready for policies.

    `target` [R] are the experts that the router's rows mean, `weights` [S, R] the model's own expert weights, and
    `choice_bias` [R], if any, is added to the router's scores to select experts. All coefficients are [S, n], in the
    order of the vectors of `GramSample`.
    """

    products: Single
    logits: Single
    target: NDArray[np.int64]
    spec: ModelSpec
    weights: Double
    choice_bias: Single | None = None

    def row_weights(self, kept: NDArray[np.bool_], tokens: slice | Int = slice(None)) -> Double:
        """Expert weights of some of the sampled tokens, of a router that has only the rows `kept` [R]."""
        return row_weights(self.logits[tokens], kept, self.spec, self.choice_bias)

    def deciding_rows(self, kept: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which of the rows `kept` [R] a token's expert weights rest on, [S, R]: without any other they stay the same.

        These are the rows that it selects, and the two best of each group that it selects. Without any row a softmax
        over all of them is greater everywhere, which matters if it is not renormalised, or a bias is added to it.
        """
        spec = self.spec
        if spec.router_score == "softmax" and not (spec.renormalises and self.choice_bias is None):
            return np.broadcast_to(kept, self.logits.shape)
        selected = self.row_weights(kept) > 0
        if spec.experts.n_group < 2:
            return selected
        _, choice = _scores(self.logits, kept, spec, self.choice_bias)
        groups = _by_group(_of_best_groups(choice, spec.experts), spec.experts)
        two_best = (groups >= np.sort(groups, 2)[:, :, -2:-1]) & (groups > -np.inf)
        return selected | two_best.reshape(choice.shape)

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
        return self.coefficients(self.row_weights(~self.rows_of(dropped)))

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


def layer_gram(
    layer: LayerStatistics, target: Sequence[int], spec: ModelSpec, choice_bias: Single | None = None
) -> LayerGram:
    """The Gram matrices of a layer's statistics; `target` is the source's, `spec` says how the model routes.

    `choice_bias` [R] is the router's, if it has one. Raises UsageError for a layer without Gram matrices, and for one
    that has constant experts already, which the Gram matrices do not contain.
    """
    sample = gram_of(layer)
    means = np.array(target, np.int64)
    if (means < 0).any():
        raise UsageError(
            "The model already has constants in place of experts. Compress the model that it was made from."
        )
    assert sample.gram.shape[1] > 2 * means.max(initial=0) + 2, "statistics of another model"
    weights = row_weights(sample.logits, np.ones(means.size, np.bool_), spec, choice_bias)
    return LayerGram(sample.gram, sample.logits, means, spec, weights, choice_bias)


def gram_of_block(layer: LayerStatistics, source: ModelSource, block: int) -> LayerGram:
    """The Gram matrices of the statistics of a source's block; raises as `layer_gram` does, and ModelFileError."""
    key = choice_bias_key(block)
    bias = source.read(key) if key in source.shapes else None
    return layer_gram(layer, source.layers[block].target, source.spec, bias)


def nats_per_square(layer: LayerStatistics, gram: LayerGram) -> float:
    """What a squared error of the layer's output costs in nats, in directions in which its experts answer.

    The model listens more to what the layer says than to noise of the same size: by how much, leaving out the whole
    feed-forward part tells. Raises UsageError for statistics with neither sensitivities nor sums of outputs.
    """
    weight = layer_weight(layer, None if layer.outputs is None else layer.outputs.output_square.sum(0))
    whole = weight.cost(float(gram.error(gram.nothing()).mean()))
    return weight.per_square * (layer.removals.ffn / whole if layer.removals is not None and whole else 1.0)
