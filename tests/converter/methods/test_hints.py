"""Constants in place of experts, thresholds of skipping, and hints, against naive sums and forward passes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from slimoe.converter.methods.constant_experts import constant_costs, constant_errors, constant_vectors, variances
from slimoe.converter.methods.expert_drop import keep_overall, redirect, substitute
from slimoe.converter.methods.gram_policy import LayerGram, layer_gram
from slimoe.converter.methods.layer_hints import SkipRules, hints_for, price_of_bytes, skip_ratio
from slimoe.converter.methods.layer_weight import layer_weight
from slimoe.converter.source.model_source import expert_key
from slimoe.converter.stats.statistics import LayerStatistics, Statistics
from slimoe.offload.model.architectures import LLAMA, OLMOE
from slimoe.offload.model.native_format import layout_metadata
from slimoe.offload.model.native_layout import LayerHints, NativeLayer, NativeLayout
from tests.models.held_model import HeldModel, hold, random_mixtral
from tests.models.naive_layer import (
    SIZES,
    TEXTS,
    NaiveLayer,
    biased_model,
    learn,
    logits,
    naive_layer,
    without_experts,
)

LAYER = 1
EVERY = range(SIZES.n_expert)
LENGTHS = tuple(map(len, TEXTS.tokens))


@pytest.fixture(scope="module", params=[LLAMA, OLMOE], ids=lambda row: row.name)
def model(request: pytest.FixtureRequest) -> HeldModel:
    """One of whose experts, number 3 of layer 1, answers the same to every token.

    The second router does not scale the weights of the selected experts to a sum of 1.
    """
    model = biased_model().of(request.param)
    changed = {}
    for name in ("gate", "up"):
        key = expert_key(LAYER, name, 3)
        changed[key] = model.matrices[key].copy()
        changed[key][:, 1:] = 0
    changed[expert_key(LAYER, "down", 3)] = 3 * model.matrices[expert_key(LAYER, "down", 3)]
    return model.changed(changed)


@pytest.fixture(scope="module")
def statistics(model: HeldModel, tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    return learn(model, tmp_path_factory.mktemp("pass"), n_sensitivity=10**6)


@pytest.fixture(scope="module")
def layer(statistics: Statistics) -> LayerStatistics:
    return statistics.layers[LAYER]


@pytest.fixture(scope="module")
def gram(model: HeldModel, layer: LayerStatistics) -> LayerGram:
    return layer_gram(layer, EVERY, model.spec)


@pytest.fixture(scope="module")
def naive(model: HeldModel) -> NaiveLayer:
    return naive_layer(model, LAYER)


def test_constants_and_their_errors_are_those_of_a_double_loop(layer: LayerStatistics, naive: NaiveLayer) -> None:
    vectors, errors = constant_vectors(layer), constant_errors(layer)
    assert layer.outputs is not None
    absence = layer.outputs.share_square_norm_square / TEXTS.n_rows
    spread = variances(layer.outputs)
    for expert in EVERY:
        weights = naive.by_expert()[:, expert]
        outputs = naive.outputs[:, expert]
        c = sum(g**2 * f for g, f in zip(weights, outputs, strict=True)) / (weights**2).sum()
        np.testing.assert_allclose(vectors[expert], c, rtol=1e-4, atol=1e-6)
        loss = sum(g**2 * ((f - c) ** 2).sum() for g, f in zip(weights, outputs, strict=True)) / TEXTS.n_rows
        missing = sum(g**2 * (f**2).sum() for g, f in zip(weights, outputs, strict=True)) / TEXTS.n_rows
        assert errors[expert] == pytest.approx(loss, rel=1e-4, abs=1e-5 * missing)
        assert absence[expert] == pytest.approx(missing, rel=1e-5)
        own = outputs[weights > 0]
        np.testing.assert_allclose(spread[expert], own.var(0), rtol=1e-3, atol=1e-5 * (own**2).mean())


def test_an_expert_that_never_changes_is_a_constant(model: HeldModel, statistics: Statistics) -> None:
    layer = statistics.layers[LAYER]
    assert layer.outputs is not None
    scores = constant_errors(layer)
    assert scores[3] < 0.01 * scores.mean()
    kept = keep_overall([scores], SIZES.n_expert - 1, 1)
    assert kept == ((0, 1, 2, 4),)
    assert scores[3] < 1e-6 * layer.outputs.share_square_norm_square[3] / TEXTS.n_rows
    survivors = substitute(EVERY, kept[0])
    smaller = without_experts(model, LAYER, survivors, constant_vectors(layer)[list(survivors.replaced)])
    torch.testing.assert_close(logits(smaller), logits(model), rtol=1e-4, atol=1e-4)
    skipped = without_experts(model, LAYER, survivors, np.zeros((1, SIZES.n_embd), np.float32))
    assert (logits(skipped) - logits(model)).abs().max() > 1e-2


def test_an_expert_that_nobody_picked_is_the_mean_of_the_others(layer: LayerStatistics) -> None:
    assert layer.outputs is not None
    outputs = replace(layer.outputs, share_square=layer.outputs.share_square.copy())
    outputs.share_square[2] = 0
    outputs = replace(outputs, share_square_output=layer.outputs.share_square_output.copy())
    outputs.share_square_output[2] = 0
    found = constant_vectors(replace(layer, outputs=outputs))
    weights = outputs.share_square[[0, 1, 3, 4]]
    np.testing.assert_allclose(found[2], np.average(found[[0, 1, 3, 4]], axis=0, weights=weights), rtol=1e-4, atol=1e-6)


def test_gram_matrices_say_the_same_of_one_constant(layer: LayerStatistics, gram: LayerGram) -> None:
    for expert in (0, 1, 2, 4):
        found = gram.error(gram.with_constants({expert})).mean()
        assert found == pytest.approx(constant_errors(layer)[expert], rel=1e-3)


def test_skip_ratio_is_the_median_of_second_over_first(layer: LayerStatistics, naive: NaiveLayer) -> None:
    ratios = naive.weights[:, 1] / naive.weights[:, 0]
    assert layer.router is not None
    assert skip_ratio(layer.router) == pytest.approx(np.quantile(ratios, 0.5, method="hazen"), abs=0.02)
    below = [(ratios < skip_ratio(layer.router, part)).mean() for part in (0.0, 0.25, 0.5, 0.9, 1.0)]
    assert below == pytest.approx([0.0, 0.25, 0.5, 0.9, 1.0], abs=0.02)
    empty = replace(layer.router, ratio_bins=np.zeros_like(layer.router.ratio_bins))
    assert skip_ratio(empty) == 0.0, "models of one expert per token have nothing to skip"


def test_importance_is_that_of_a_naive_loop_over_attention(tmp_path: Path) -> None:
    """Attention weights are transformers' own. Summed over the wrong axis, they would be 1 for every token."""
    reference = random_mixtral(SIZES)
    statistics = learn(hold(reference), tmp_path)
    trace = statistics.layers[0].trace
    assert trace is not None
    seers = np.concatenate([np.arange(length, 0, -1) for length in LENGTHS])
    found, begin = trace.norm.astype(float) * trace.received / seers, 0
    x = naive_layer(hold(reference), 0).x
    for tokens in TEXTS.tokens:
        with torch.no_grad():
            weights = reference(torch.tensor([tokens]), output_attentions=True).attentions[0][0].double().numpy()
        n = len(tokens)
        for key in range(n):
            received = sum(weights[head, query, key] for head in range(SIZES.n_head) for query in range(key, n))
            expected = np.abs(x[begin + key]).sum() * received / (n - key)
            assert found[begin + key] == pytest.approx(expected, rel=2e-3)
        begin += n


def test_the_price_of_bytes_saves_a_part_where_it_loses_least() -> None:
    """No other choice of as many bytes loses less: against all subsets."""
    rng = np.random.default_rng(2)
    losses, saved = rng.uniform(0, 1, 10), rng.integers(1, 5, 10).astype(np.float64)
    masks = (np.arange(1 << 10)[:, None] >> np.arange(10)) & 1
    all_losses, all_saved = masks @ losses, masks @ saved
    for part in (0.1, 0.33, 0.8):
        is_low = losses <= price_of_bytes(losses, saved, part) * saved
        assert saved[is_low].sum() >= part * saved.sum() > saved[is_low].sum() - saved.max()
        assert losses[is_low].sum() == pytest.approx(all_losses[all_saved >= saved[is_low].sum()].min())
    assert price_of_bytes(losses, np.zeros(10)) == price_of_bytes(np.zeros(0), np.zeros(0)) == 0


def test_uses_are_those_of_the_text(layer: LayerStatistics, gram: LayerGram, naive: NaiveLayer) -> None:
    hints = hints_for(layer, redirect(EVERY, EVERY), gram)
    weights = naive.by_expert()
    np.testing.assert_allclose(hints.use or (), (weights > 0).mean(0))
    squares = [np.square(one[one > 0]).mean() for one in weights.T]
    np.testing.assert_allclose(hints.share_square or (), squares, rtol=1e-5)


def test_uses_after_dropping_are_those_of_the_smaller_model(
    model: HeldModel, layer: LayerStatistics, gram: LayerGram
) -> None:
    survivors = redirect(EVERY, (0, 2, 4))
    hints = hints_for(layer, survivors, gram)
    weights = naive_layer(without_experts(model, LAYER, survivors), LAYER).by_expert()
    np.testing.assert_allclose(hints.use or (), (weights > 0).mean(0))
    np.testing.assert_allclose(
        hints.share_square or (), [np.square(one[one > 0]).mean() for one in weights.T], rtol=1e-4
    )
    kept = hints_for(layer, substitute(EVERY, (0, 2, 4)), gram)
    assert kept.use == tuple(np.array(hints_for(layer, redirect(EVERY, EVERY)).use)[[0, 2, 4]])


def test_without_sensitivities_there_are_no_nats(layer: LayerStatistics, gram: LayerGram) -> None:
    rules = SkipRules(skip_ratio=0.3, fallback=(0, 1, 2, 3, 4))
    hints = hints_for(replace(layer, sensitivity=None), redirect(EVERY, EVERY), gram, rules)
    assert (hints.skip_ratio, hints.fallback) == (0.3, (0, 1, 2, 3, 4))
    assert hints.use
    assert (hints.skip_error, hints.fallback_error, hints.sensitivity) == (None, None, None)


def test_errors_are_weights_times_squared_errors_of_the_layer(
    layer: LayerStatistics, gram: LayerGram, naive: NaiveLayer
) -> None:
    """Where a removal itself was not measured."""
    layer = replace(layer, removals=None)
    hints = hints_for(layer, redirect(EVERY, EVERY), gram, SkipRules(fallback=tuple(EVERY)))
    assert hints.skip_error
    assert hints.fallback_error
    assert layer.outputs is not None
    as_measured = np.zeros(len(EVERY))
    for expert in EVERY:
        weights = naive.by_expert()
        own, whole = weights[:, expert, None].copy(), weights.sum(1, keepdims=True)
        weights[:, expert] = 0
        change = naive.mixed(weights * whole / weights.sum(1, keepdims=True)) - naive.y
        weight = layer_weight(layer, layer.outputs.output_square[expert])
        assert hints.skip_error[expert] == pytest.approx(weight.cost((change**2).sum(1).mean()), rel=1e-3)
        change = own * (constant_vectors(layer)[expert] - naive.outputs[:, expert])
        weight = layer_weight(layer, variances(layer.outputs)[expert])
        as_measured[expert] = weight.cost((change**2).sum(1).mean())
    n = (naive.by_expert() > 0).sum(0)
    variance = (as_measured + 4 * as_measured.sum() / (n - 1).sum()) / (n - 1 + 4)
    np.testing.assert_allclose(hints.fallback_error, variance * (n + 1), rtol=2e-3)
    squares = np.array(hints.use) * np.array(hints.share_square)
    assert hints.sensitivity == pytest.approx(sum(hints.skip_error) / squares.sum())


def test_errors_are_those_that_were_measured(layer: LayerStatistics, gram: LayerGram) -> None:
    """Of all experts; when some are dropped, others are selected where they were not."""
    assert layer.removals is not None
    hints = hints_for(layer, redirect(EVERY, EVERY), gram, SkipRules(fallback=tuple(EVERY)))
    np.testing.assert_allclose(hints.skip_error or (), layer.removals.skipped, rtol=1e-6)
    assert layer.outputs is not None
    often = layer.outputs.n_pick > 40
    assert often.any()
    ratios = np.array(hints.fallback_error)[often] / layer.removals.novice[often]
    assert ratios.min() > 0.8
    assert ratios.max() < 1.5
    unseen = replace(layer, removals=replace(layer.removals, skipped=np.zeros(5), novice=np.zeros(5)))
    found = hints_for(unseen, redirect(EVERY, EVERY), gram, SkipRules(fallback=tuple(EVERY)))
    assert min(found.skip_error or ()) > 0, "selected, but not by the tokens whose gradients were taken"
    assert np.array(found.fallback_error)[[0, 1, 2, 4]].min() > 0, "expert 3 is a constant"
    fewer = hints_for(layer, redirect(EVERY, (0, 2, 4)), gram)
    unmeasured = hints_for(replace(layer, removals=None), redirect(EVERY, (0, 2, 4)), gram)
    assert fewer.skip_error == unmeasured.skip_error


def test_a_constant_of_one_token_costs_what_the_others_of_its_layer_cost_for_one(layer: LayerStatistics) -> None:
    """It answers as that token wants it, which tells nothing of others."""
    assert layer.outputs is not None
    assert layer.removals is not None
    n_pick, novice = layer.outputs.n_pick.copy(), layer.removals.novice.copy()
    square, one_square = layer.outputs.share_square.copy(), layer.outputs.share_square_norm_square.copy()
    output = layer.outputs.share_square_output.copy()
    n_pick[2], novice[2], square[2] = 1, 0.0, 1.0
    one_square[2] = np.square(output[2].astype(np.float64)).sum()
    outputs = replace(
        layer.outputs,
        n_pick=n_pick,
        share_square=square,
        share_square_norm_square=one_square,
    )
    once = replace(layer, outputs=outputs, removals=replace(layer.removals, novice=novice))
    assert constant_errors(once)[2] < 1e-6 * constant_errors(layer)[2]
    others = np.array([0, 1, 4])
    of_a_token = constant_costs(once)[others].sum() / n_pick[others].sum()
    assert 0.5 * of_a_token < constant_costs(once)[2] < 5 * of_a_token


def test_closed_forms_without_gram_matrices_are_near(layer: LayerStatistics, gram: LayerGram) -> None:
    layer = replace(layer, removals=None)
    with_gram = hints_for(layer, redirect(EVERY, EVERY), gram).skip_error
    without = hints_for(layer, redirect(EVERY, EVERY)).skip_error
    np.testing.assert_allclose(without or (), with_gram or (), rtol=0.6)


def test_files_take_the_hints(layer: LayerStatistics, gram: LayerGram) -> None:
    rules = SkipRules(0.3, (0, -1, 1))
    hints = hints_for(layer, redirect(EVERY, (0, 2, 4)), gram, rules)
    assert hints.fallback_error
    assert hints.fallback_error[1] == 0.0
    written = layout_metadata(NativeLayout((NativeLayer((0, 1, 2), ((0,),) * 3, hints),)))
    assert all(np.min(value) >= 0 for key, value in written.items() if "fallback" not in key)
    assert isinstance(hints, LayerHints)
