"""Gram matrices against forward passes: any policy's error, the best subsets, and the layer's weight."""

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from slimoe.converter.forward.stream import Observer, Stream, final_logits
from slimoe.converter.methods.constant_experts import constant_vectors
from slimoe.converter.methods.expert_drop import redirect
from slimoe.converter.methods.gram_policy import LayerGram, gram_of_block, layer_gram, policy_error
from slimoe.converter.methods.layer_weight import layer_weight
from slimoe.converter.methods.naee import best_subset, best_subsets, removals
from slimoe.converter.source.model_source import choice_bias_key
from slimoe.converter.stats.sensitivity import measure_sensitivity
from slimoe.converter.stats.statistics import LayerStatistics, Sensitivity, Single, Statistics
from slimoe.offload.errors import UsageError
from slimoe.offload.model.architectures import LLAMA, OLMOE
from slimoe.offload.model.expert_spec import ExpertSpec
from tests.models.held_model import HeldModel, hold, random_mixtral
from tests.models.naive_layer import (
    SIZES,
    TEXTS,
    Array,
    NaiveLayer,
    biased_model,
    divergence,
    learn,
    logits,
    naive_layer,
    with_aliases,
    without_experts,
)

LAYER = 1


@pytest.fixture(scope="module", params=[LLAMA, OLMOE], ids=lambda row: row.name)
def model(request: pytest.FixtureRequest) -> HeldModel:
    """One whose router scales the weights of the selected experts to a sum of 1, and one whose does not."""
    return biased_model().of(request.param)


@pytest.fixture(scope="module")
def statistics(model: HeldModel, tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    return learn(model, tmp_path_factory.mktemp("pass"))


@pytest.fixture(scope="module")
def layer(statistics: Statistics) -> LayerStatistics:
    return statistics.layers[LAYER]


@pytest.fixture(scope="module")
def gram(model: HeldModel, layer: LayerStatistics) -> LayerGram:
    return layer_gram(layer, model.layers[LAYER].target, model.spec)


@pytest.fixture(scope="module")
def naive(model: HeldModel) -> NaiveLayer:
    return naive_layer(model, LAYER)


def squares(change: Array) -> Array:
    return np.asarray((change**2).sum(-1))


def test_200_random_policies_have_the_error_that_vectors_give(
    layer: LayerStatistics, gram: LayerGram, naive: NaiveLayer
) -> None:
    rng = np.random.default_rng(3)
    constants = np.broadcast_to(constant_vectors(layer), naive.outputs.shape)
    vectors = np.concatenate([naive.outputs, constants, naive.middle[:, None]], 1)
    for _ in range(200):
        change = rng.normal(size=vectors.shape[:2]) * (rng.random(vectors.shape[:2]) < 0.4)
        expected = squares(np.einsum("tn,tnd->td", change, vectors))
        np.testing.assert_allclose(
            policy_error(gram.products, change), expected, rtol=1e-4, atol=1e-4 * expected.mean()
        )


def test_expert_weights_from_logits_are_the_models(gram: LayerGram, naive: NaiveLayer) -> None:
    np.testing.assert_allclose(gram.weights, naive.by_expert(), atol=1e-6)
    np.testing.assert_allclose(naive.mixed(gram.weights), naive.y, atol=1e-4)


@pytest.mark.parametrize("dropped", [(0,), (3,), (1, 4), (0, 2, 3)])
def test_dropping_is_what_a_model_with_fewer_experts_computes(
    model: HeldModel, gram: LayerGram, naive: NaiveLayer, dropped: tuple[int, ...]
) -> None:
    kept = set(range(gram.n_expert)) - set(dropped)
    smaller = without_experts(model, LAYER, redirect(model.layers[LAYER].target, kept))
    expected = squares(naive_layer(smaller, LAYER).y - naive.y)
    np.testing.assert_allclose(gram.error(gram.redirected(dropped)), expected, rtol=1e-4, atol=1e-6 * expected.mean())


def test_constants_and_nothing_are_what_vectors_give(
    layer: LayerStatistics, gram: LayerGram, naive: NaiveLayer
) -> None:
    replaced = naive.outputs.copy()
    replaced[:, [1, 3]] = constant_vectors(layer)[[1, 3]]
    with_constants = np.einsum("te,ted->td", naive.by_expert(), replaced)
    for policy, y in (
        (gram.with_constants({1, 3}), with_constants),
        (gram.nothing(), np.zeros_like(naive.y)),
    ):
        expected = squares(y - naive.y)
        np.testing.assert_allclose(gram.error(policy), expected, rtol=1e-4, atol=1e-6 * expected.mean())
    assert not gram.error(gram.with_constants(())).any()


def test_cosine_of_the_unchanged_layer_is_that_of_the_pass(gram: LayerGram, statistics: Statistics) -> None:
    found = gram.cosine(gram.unchanged())
    assert found.mean() == pytest.approx(statistics.layers[LAYER].similarity.ffn_cosine / TEXTS.n_rows, rel=1e-6)
    assert gram.cosine(gram.nothing()) == pytest.approx(1.0)


def test_rows_that_mean_the_same_expert(model: HeldModel, tmp_path: Path) -> None:
    target = (0, 1, 1, 2, 0)
    aliased = with_aliases(model, LAYER, target)
    gram = layer_gram(learn(aliased, tmp_path).layers[LAYER], target, model.spec)
    y = naive_layer(aliased, LAYER).y
    smaller = without_experts(aliased, LAYER, redirect(target, (0, 2)))
    expected = squares(naive_layer(smaller, LAYER).y - y)
    np.testing.assert_allclose(gram.error(gram.redirected((1,))), expected, rtol=1e-4, atol=1e-6 * expected.mean())
    assert best_subset(gram, 1).kept in {(0,), (1,)}, "expert 2 has one row, but tokens select two"


def test_a_model_with_constants_is_refused(model: HeldModel, layer: LayerStatistics) -> None:
    with pytest.raises(UsageError, match="constants"):
        layer_gram(layer, (0, 1, 2, 3, -1), model.spec)


@pytest.mark.parametrize("n_keep", [2, 3, 4])
def test_best_subset_is_that_of_forward_passes(
    model: HeldModel, gram: LayerGram, naive: NaiveLayer, n_keep: int
) -> None:
    target, errors = model.layers[LAYER].target, {}
    for kept in combinations(range(gram.n_expert), n_keep):
        smaller = without_experts(model, LAYER, redirect(target, kept))
        errors[kept] = float(squares(naive_layer(smaller, LAYER).y - naive.y).mean())
    best = best_subset(gram, n_keep)
    assert best.kept == min(errors, key=errors.__getitem__)
    assert best.error == pytest.approx(errors[best.kept], rel=1e-4)


def test_one_by_one_where_subsets_are_too_many(gram: LayerGram) -> None:
    path = list(removals(gram))
    assert [len(one.kept) for one in path] == [5, 4, 3, 2]
    assert path[0].error == 0.0
    for one in path[1:]:
        dropped = set(range(gram.n_expert)) - set(one.kept)
        assert one.error == pytest.approx(float(gram.error(gram.redirected(dropped)).mean()), rel=1e-9)
    assert best_subset(gram, 3, most_subsets=0) == path[2]
    assert path[1] == best_subset(gram, 4), "the first to go is the best one to remove"


def test_of_all_layers_those_lose_experts_that_cost_least(gram: LayerGram) -> None:
    """Two equal layers, of which the model listens to one a thousand times as much; then both alike."""
    path = [one.kept for one in removals(gram)]
    assert best_subsets([(gram, 1.0), (gram, 1e-3)], 7) == (path[0], path[3])
    assert best_subsets([(gram, 1.0), (gram, 1.0)], 8) == (path[1], path[1])
    assert best_subsets([(gram, 1.0), (gram, 1.0)], 10) == (path[0], path[0])
    for n_keep in (3, 11):
        with pytest.raises(UsageError, match=r"Keep 4 to 10"):
            best_subsets([(gram, 1.0), (gram, 1.0)], n_keep)


GROUPS = ExpertSpec(8, 2, score="sigmoid", renormalise=True, n_group=2, n_group_used=1)
IDLE = 5
"""An expert that no token selects."""


def with_choice_bias(experts: ExpertSpec, bias: Single) -> HeldModel:
    """A model that routes like this, and whose routers have a bias [R] of the choice."""
    model = biased_model(replace(SIZES, n_expert=len(bias)))
    biases = {choice_bias_key(layer): bias for layer in range(SIZES.n_layer)}
    return replace(model.changed(biases), spec=replace(model.spec, experts=experts))


def in_groups() -> HeldModel:
    """One of two groups of four experts, of which a token selects one, and in it two experts, never the idle one."""
    bias = np.random.default_rng(4).normal(0, 0.1, GROUPS.n_expert).astype(np.float32)
    bias[IDLE] = -9.0
    return with_choice_bias(GROUPS, bias)


@pytest.mark.parametrize(("n_keep", "n_subset"), [(4, 36), (6, 16)])
def test_best_subset_has_as_many_of_each_group(tmp_path: Path, n_keep: int, n_subset: int) -> None:
    model = in_groups()
    gram = gram_of_block(learn(model, tmp_path).layers[LAYER], model, LAYER)
    y, key, errors = naive_layer(model, LAYER).y, choice_bias_key(LAYER), {}
    for kept in combinations(range(GROUPS.n_expert), n_keep):
        if sum(expert < GROUPS.n_expert // 2 for expert in kept) == n_keep // 2:
            smaller = without_experts(model, LAYER, redirect(range(GROUPS.n_expert), kept))
            smaller = smaller.changed({key: model.matrices[key][list(kept)]})
            errors[kept] = float(squares(naive_layer(smaller, LAYER).y - y).mean())
    best = best_subset(gram, n_keep, n_group=2)
    assert len(errors) == n_subset
    assert best.kept == min(errors, key=errors.__getitem__)
    assert best.error == pytest.approx(errors[best.kept], rel=1e-4)
    by_one = best_subset(gram, n_keep, most_subsets=0, n_group=2)
    assert by_one.error == pytest.approx(errors[by_one.kept], rel=1e-4), "it keeps as many of each group, too"
    with pytest.raises(UsageError, match="5 experts do not divide into the 2 groups"):
        best_subset(gram, 5, n_group=2)


def test_an_expert_that_no_sampled_token_selects_goes_first(tmp_path: Path) -> None:
    model = in_groups()
    layer = learn(model, tmp_path).layers[LAYER]
    assert layer.outputs is not None
    assert layer.outputs.n_pick[IDLE] == 0
    whole, one_fewer, *_ = removals(gram_of_block(layer, model, LAYER))
    assert one_fewer.error == 0.0
    assert layer.outputs.n_pick[list({*whole.kept} - {*one_fewer.kept})] == 0


@pytest.mark.parametrize(
    "experts",
    [GROUPS, replace(GROUPS, n_group=4, n_group_used=2), replace(GROUPS, n_group=1, score="softmax")],
    ids=["groups", "small groups", "softmax with a bias"],
)
def test_one_by_one_sees_all_that_a_removal_moves(tmp_path: Path, experts: ExpertSpec) -> None:
    """An expert that a token does not select can decide which group it selects, or what is added to a bias."""
    model = with_choice_bias(experts, np.random.default_rng(5).normal(0, 0.3, experts.n_expert).astype(np.float32))
    gram = gram_of_block(learn(model, tmp_path).layers[LAYER], model, LAYER)
    for one in removals(gram):
        dropped = set(range(experts.n_expert)) - set(one.kept)
        assert one.error == pytest.approx(float(gram.error(gram.redirected(dropped)).mean()), rel=1e-9)


def test_all_experts_are_no_error_and_too_few_are_refused(gram: LayerGram) -> None:
    assert best_subset(gram, gram.n_expert).error == 0.0
    for most_subsets in (0, 1000):
        with pytest.raises(UsageError, match=r"a token selects 2\. Keep 2 to 5"):
            best_subset(gram, 1, most_subsets)


def test_a_layers_weight_times_a_squared_error_is_the_divergence(tmp_path: Path) -> None:
    """Noise is added to a layer's output; what comes of it is measured. Tokens select all experts, so that none of them
    moves to another one, which no gradient sees.
    """
    model = hold(random_mixtral(replace(SIZES, n_expert_used=SIZES.n_expert)))
    layers = measure_sensitivity(model, TEXTS, n_draws=12).layers
    learnt, before = learn(model, tmp_path), logits(model)
    for index in range(model.spec.n_layer):
        found = []
        for seed in range(4):
            noise = 0.002 * torch.randn(TEXTS.n_rows, model.spec.n_embd, generator=torch.Generator().manual_seed(seed))
            found.append(divergence(before, noisy_logits(model, index, noise)) / float(noise.square().sum(-1).mean()))
        weight = layer_weight(replace(learnt.layers[index], sensitivity=layers[index]))
        assert weight.is_measured
        assert weight.per_square == pytest.approx(float(np.mean(found)), rel=0.2)


def noisy_logits(model: HeldModel, layer: int, noise: torch.Tensor) -> torch.Tensor:
    stream = Stream(model, TEXTS)
    stream.embed()
    for number in range(model.spec.n_layer):
        stream.pass_layer(number, Observer())
        if number == layer:
            stream.h += noise
    return final_logits(model, stream.h)


def test_a_weight_follows_the_profile_of_the_error(layer: LayerStatistics) -> None:
    update = np.arange(32, dtype=np.float32)
    empty = np.zeros(0, np.float32)
    sensitive = replace(layer, sensitivity=Sensitivity(update, *[empty] * 7))
    assert layer_weight(sensitive).per_square == pytest.approx(0.5 * 15.5)
    assert layer_weight(sensitive).cost(2.0) == pytest.approx(15.5)
    assert layer_weight(sensitive, np.eye(32)[7]).per_square == pytest.approx(3.5)
    assert layer_weight(sensitive, np.zeros(32)).per_square == pytest.approx(0.5 * 15.5)


def test_without_sensitivities_errors_are_compared_with_the_stream(layer: LayerStatistics, naive: NaiveLayer) -> None:
    found = layer_weight(layer)
    assert not found.is_measured
    assert found.per_square == pytest.approx(1 / squares(naive.middle).mean(), rel=1e-5)
    assert 0 < layer_weight(replace(layer, sketch=None)).per_square < 100 * found.per_square
    with pytest.raises(UsageError, match="neither sensitivities"):
        layer_weight(replace(layer, sketch=None, outputs=None))
