"""Methods that leave something out find what was planted to be dispensable, and leaving it out changes nothing."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from slimoe.converter.methods.constant_experts import constant_vectors
from slimoe.converter.methods.expert_drop import (
    keep_by_layer,
    keep_overall,
    redirect,
    substitute,
)
from slimoe.converter.methods.gram_policy import layer_gram
from slimoe.converter.methods.layer_weight import outputs_of
from slimoe.converter.methods.naee import best_subset
from slimoe.converter.methods.removal import (
    Removal,
    attention_removals,
    block_removals,
    first,
    layer_removals,
    margin,
    ranked,
)
from slimoe.converter.methods.scores import SCORES, shares_of_loss, unseen
from slimoe.converter.source.model_source import MatrixKey, block_key, expert_key
from slimoe.converter.stats.statistics import LayerStatistics, OutputSums, Removals, RouterSums
from slimoe.offload.errors import UsageError
from tests.models.held_model import HeldModel
from tests.models.naive_layer import SIZES, biased_model, learn, logits, naive_layer, without_experts

EVERY = range(SIZES.n_expert)
BY_NORM = ("reap", "ean", "man", "msan")
BY_ROUTING = ("frequency", "probability", "share")
BY_SUMS = {name: score for name, score in SCORES.items() if name != "loss"}


@pytest.fixture(scope="module")
def model() -> HeldModel:
    return biased_model()


def zeroed(model: HeldModel, *keys: MatrixKey) -> HeldModel:
    return model.changed({key: np.zeros_like(model.matrices[key]) for key in keys})


def downs(layer: int) -> list[MatrixKey]:
    return [expert_key(layer, "down", expert) for expert in EVERY]


Selected = tuple[int, float, Sequence[float]]


def output_sums(n_expert: int, tokens: Sequence[Sequence[Selected]]) -> OutputSums:
    """A double loop over tokens and their selected experts (number, expert weight, f)."""
    n_pick, sums, vectors = np.zeros(n_expert, np.int64), np.zeros((5, n_expert)), np.zeros((4, n_expert, 2))
    largest = np.zeros(n_expert)
    for selected in tokens:
        for expert, weight, values in selected:
            f = np.array(values)
            norm = float(np.linalg.norm(f))
            n_pick[expert] += 1
            sums[:, expert] += (norm, norm**2, weight * norm, weight**2 * norm**2, weight**2)
            vectors[:, expert] += [f, f**2, weight * f, weight**2 * f]
            largest[expert] = max(largest[expert], np.abs(f).max())
    norm_sum, norm_square, share_norm, share_square_norm_square, share_square = sums
    output, output_square, share_output, share_square_output = vectors.astype(np.float32)
    return OutputSums(
        n_pick=n_pick,
        norm=norm_sum,
        norm_square=norm_square,
        share_norm=share_norm,
        share_square_norm_square=share_square_norm_square,
        largest=largest,
        share_square=share_square,
        output=output,
        output_square=output_square,
        share_output=share_output,
        share_square_output=share_square_output,
    )


def with_outputs(
    layer: LayerStatistics, outputs: OutputSums, weights: Sequence[float], n_tokens: int
) -> LayerStatistics:
    """Statistics of so many tokens; `weights` are sums by row."""
    assert layer.router is not None
    counts = np.zeros((len(weights), 2), np.int64)
    counts[0, 0] = n_tokens
    sums = np.array(weights)
    router: RouterSums = replace(layer.router, rank_count=counts, share=sums, probability=sums / 2)
    return replace(layer, outputs=outputs, router=router)


@pytest.fixture(scope="module")
def some_layer(model: HeldModel, tmp_path_factory: pytest.TempPathFactory) -> LayerStatistics:
    return learn(model, tmp_path_factory.mktemp("pass")).layers[0]


TOY: list[list[Selected]] = [
    [(0, 0.75, (3.0, 4.0)), (1, 0.25, (0.0, 2.0))],
    [(0, 0.5, (0.0, -1.0)), (2, 0.5, (6.0, 8.0))],
    [(1, 0.9, (1.0, 0.0)), (2, 0.1, (0.0, 5.0))],
]


def test_scores_of_three_tokens_by_hand(some_layer: LayerStatistics) -> None:
    layer = with_outputs(some_layer, output_sums(4, TOY), (1.25, 1.15, 0.6, 0.0), 3)
    found = {name: score(layer, range(4)) for name, score in BY_SUMS.items()}
    expected = {
        "frequency": (2 / 3, 2 / 3, 2 / 3, 0),
        "probability": (1.25 / 6, 1.15 / 6, 0.1, 0),
        "share": (1.25 / 3, 1.15 / 3, 0.2, 0),
        "reap": ((0.75 * 5 + 0.5) / 2, (0.5 + 0.9) / 2, (5 + 0.5) / 2, 0),
        "ean": (2, 1, 5, 0),
        "man": (3, 1.5, 7.5, 0),
        "msan": (13, 2.5, 62.5, 0),
    }
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-12, err_msg=name)
    assert unseen(layer) == (3,)
    assert unseen(layer, 3) == (0, 1, 2, 3)


def test_tokens_that_picked_others_do_not_change_means_over_picks(some_layer: LayerStatistics) -> None:
    few, many = (with_outputs(some_layer, output_sums(3, TOY), (1.25, 1.15, 0.6), n) for n in (3, 300))
    for name, score in BY_SUMS.items():
        is_mean = name in ("reap", "man", "msan")
        np.testing.assert_allclose(score(many, range(3)), score(few, range(3)) / (1 if is_mean else 100))


def test_rows_that_mean_one_expert_are_added_up(some_layer: LayerStatistics) -> None:
    layer = with_outputs(some_layer, output_sums(3, TOY), (1.0, 0.25, 1.15, 0.6, 5.0), 3)
    np.testing.assert_allclose(SCORES["share"](layer, (0, 0, 1, 2, -1)), (1.25 / 3, 1.15 / 3, 0.2))


def test_statistics_that_lack_a_part_are_refused(some_layer: LayerStatistics) -> None:
    for name, score in BY_SUMS.items():
        with pytest.raises(UsageError, match="Calibrate again"):
            score(replace(some_layer, outputs=None, router=None), EVERY)
        assert np.isfinite(score(some_layer, EVERY)).all(), name


def test_scores_by_loss_need_the_backward_pass_and_say_so(some_layer: LayerStatistics) -> None:
    with pytest.raises(UsageError, match="backward pass"):
        SCORES["loss"](replace(some_layer, removals=None), EVERY)
    removals = Removals(0.1, 0.2, 0.3, skipped=np.arange(5.0), novice=np.zeros(5))
    assert SCORES["loss"](replace(some_layer, removals=removals), EVERY).tolist() == [0, 1, 2, 3, 4]


def test_shares_of_loss_compare_layers(some_layer: LayerStatistics) -> None:
    """Two layers of the same scores: the one that the model can do without loses its experts first."""
    scores = np.array([0.4, 0.3, 0.2, 0.1])
    lost = [Removals(0.0, ffn, 0.0, skipped=np.zeros(4), novice=np.zeros(4)) for ffn in (1.0, 0.01)]
    shares = [shares_of_loss(scores, replace(some_layer, removals=one)) for one in lost]
    assert [float(one.sum()) for one in shares] == pytest.approx([1.0, 0.01])
    assert keep_overall(shares, 5, 1) == ((0, 1, 2, 3), (0,))
    assert shares_of_loss(scores, replace(some_layer, removals=None)) is scores


def test_an_expert_of_zeros_is_lost_first_and_missed_by_nobody(model: HeldModel, tmp_path: Path) -> None:
    planted = zeroed(model, expert_key(1, "down", 2))
    layer = learn(planted, tmp_path).layers[1]
    for name in BY_NORM:
        scores = SCORES[name](layer, EVERY)
        assert scores.argmin() == 2
        assert scores[2] == 0
    assert outputs_of(layer).share_square_norm_square[2] == 0
    survivors = substitute(EVERY, {0, 1, 3, 4})
    assert survivors.replaced == (2,)
    smaller = without_experts(planted, 1, survivors, constant_vectors(layer)[[2]])
    assert torch.equal(logits(smaller), logits(planted))


def test_an_expert_that_no_token_picks_is_lost_first_without_a_trace(model: HeldModel, tmp_path: Path) -> None:
    router = model.matrices[block_key(1, "ffn_gate_inp")].copy()
    router[4, 0] = -1e4
    planted = model.changed({block_key(1, "ffn_gate_inp"): router})
    layer = learn(planted, tmp_path).layers[1]
    for name, score in BY_SUMS.items():
        scores = score(layer, EVERY)
        assert scores.argmin() == 4, name
        assert scores[4] == 0
    assert unseen(layer) == (4,)
    found = best_subset(layer_gram(layer, EVERY, model.spec), 4)
    assert found.kept == (0, 1, 2, 3)
    assert found.error == 0
    smaller = without_experts(planted, 1, redirect(EVERY, found.kept))
    assert torch.equal(logits(smaller), logits(planted))


def test_dropping_nothing_changes_nothing(model: HeldModel) -> None:
    survivors = redirect(EVERY, EVERY)
    assert survivors.rows == survivors.target == survivors.experts == tuple(EVERY)
    assert torch.equal(logits(without_experts(model, 0, survivors)), logits(model))


def test_survivors_name_experts_by_their_new_places() -> None:
    target = (0, 1, 1, 2, -1, 3)
    moved = redirect(target, (1, 3))
    assert (moved.experts, moved.rows, moved.target) == ((1, 3), (1, 2, 4, 5), (0, 0, -1, 1))
    fixed = substitute(target, (3, 1))
    assert (fixed.experts, fixed.rows, fixed.replaced) == ((1, 3), tuple(range(6)), (0, 2))
    assert fixed.target == (-2, 0, 0, -3, -1, 1)


SCORED = (np.array([0.5, 0.1, 0.4, 0.9]), np.zeros(0), np.array([0.01, 0.02, 0.03, 0.02]))


def test_layer_by_layer_keeps_the_best_of_each() -> None:
    assert keep_by_layer(SCORED, 2, 2) == ((0, 3), (), (1, 2))
    assert keep_by_layer(SCORED, 4, 2) == ((0, 1, 2, 3), (), (0, 1, 2, 3))
    for n_keep in (1, 5):
        with pytest.raises(UsageError, match=r"Keep 2 to 4"):
            keep_by_layer(SCORED, n_keep, 2)


def test_overall_keeps_exactly_so_many_and_enough_for_every_layers_picks() -> None:
    assert keep_overall(SCORED, 4, 2) == ((0, 3), (), (1, 2))
    assert keep_overall(SCORED, 6, 2) == ((0, 1, 2, 3), (), (1, 2))
    assert keep_overall(SCORED, 5, 1) == ((0, 1, 2, 3), (), (2,))
    rng = np.random.default_rng(0)
    for _ in range(50):
        scores = [rng.random(6) ** 4 for _ in range(5)]
        n_keep = int(rng.integers(10, 31))
        kept = keep_overall(scores, n_keep, 2)
        assert sum(map(len, kept)) == n_keep
        assert min(map(len, kept)) >= 2
        worst_extra = min((scores[n][one] for n, own in enumerate(kept) if len(own) > 2 for one in own), default=1.0)
        dropped = [scores[n][one] for n, own in enumerate(kept) for one in range(6) if one not in own]
        assert max(dropped, default=0.0) <= worst_extra
    for n_keep in (3, 9):
        with pytest.raises(UsageError, match=r"Keep 4 to 8"):
            keep_overall(SCORED, n_keep, 2)


def test_a_layer_that_does_nothing_goes_first_and_unnoticed(model: HeldModel, tmp_path: Path) -> None:
    planted = zeroed(model, *downs(1))
    removals = layer_removals(learn(planted, tmp_path), planted.layers)
    assert removals[0].layer == 1
    assert removals[0].similarity == pytest.approx(1.0, abs=1e-12)
    assert sorted(one.layer for one in removals) == [0, 1, 2]
    smaller = planted.with_layer(1, replace(planted.layers[1], n_stored=0, target=(), has_ffn=False))
    assert torch.equal(logits(smaller), logits(planted))


def test_an_attention_that_does_nothing_goes_first_and_unnoticed(model: HeldModel, tmp_path: Path) -> None:
    planted = zeroed(model, block_key(2, "attn_output"))
    removals = attention_removals(learn(planted, tmp_path), planted.layers)
    assert (removals[0].part, removals[0].layer) == ("attention", 2)
    assert removals[0].similarity == pytest.approx(1.0, abs=1e-12)
    smaller = planted.with_layer(2, replace(planted.layers[2], has_attention=False))
    assert torch.equal(logits(smaller), logits(planted))


def test_a_block_that_does_nothing_goes_first_and_unnoticed(model: HeldModel, tmp_path: Path) -> None:
    planted = zeroed(model, *downs(0), block_key(0, "attn_output"))
    statistics = learn(planted, tmp_path)
    removals = block_removals(statistics, planted.layers)
    assert (removals[0].part, removals[0].layer) == ("block", 0)
    assert torch.equal(logits(planted.with_blocks((1, 2))), logits(planted))
    assert [one.similarity for one in removals] == sorted((one.similarity for one in removals), reverse=True)


def test_similarities_are_cosines_of_the_streams_and_parts_that_are_gone_are_not_ranked(
    model: HeldModel, tmp_path: Path
) -> None:
    lacking = model.with_layer(1, replace(model.layers[1], n_stored=0, target=(), has_ffn=False))
    lacking = lacking.with_layer(0, replace(model.layers[0], has_attention=False))
    statistics = learn(lacking, tmp_path)
    found = {one.layer: one.similarity for one in layer_removals(statistics, lacking.layers)}
    assert sorted(found) == [0, 2]
    for layer, similarity in found.items():
        naive = naive_layer(lacking, layer)
        after = naive.middle + naive.y
        cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(naive.middle, after, strict=True)]
        assert similarity == pytest.approx(np.mean(cosines), rel=1e-9)
    assert sorted(one.layer for one in attention_removals(statistics, lacking.layers)) == [1, 2]
    assert len(block_removals(statistics, lacking.layers)) == 3


def test_similarity_of_input_and_output_does_not_rank_layers(model: HeldModel, tmp_path: Path) -> None:
    statistics = learn(model, tmp_path)
    layers = []
    for index, layer in enumerate(statistics.layers):
        n = statistics.n_tokens
        cosines = replace(layer.similarity, ffn_cosine=n * (0.99 + 1e-5 * index), input_output_cosine=n * -0.1 * index)
        layers.append(replace(layer, similarity=cosines))
    removals = layer_removals(replace(statistics, layers=tuple(layers)), model.layers)
    assert [one.layer for one in removals] == [2, 1, 0]
    assert margin(removals, 1) == pytest.approx(1e-5)
    assert margin(removals, 3) == float("inf")


def test_what_a_removal_costs_is_what_was_measured(model: HeldModel, tmp_path: Path) -> None:
    statistics = learn(model, tmp_path)
    rankings = (layer_removals, attention_removals, block_removals)
    assert all(one.nats is None for ranking in rankings for one in ranking(statistics, model.layers))
    nothing = np.zeros(SIZES.n_expert)
    layers = [
        replace(one, removals=Removals(0.1 + n, 0.2 + n, 0.3 + n, nothing, nothing))
        for n, one in enumerate(statistics.layers)
    ]
    measured = replace(statistics, layers=tuple(layers))
    for ranking, part in zip(rankings, (0.2, 0.1, 0.3), strict=True):
        assert all(one.nats == part + one.layer for one in ranking(measured, model.layers))


def test_a_block_takes_the_place_of_its_parts() -> None:
    ranking = ranked(
        [
            Removal("ffn", 3, 0.99),
            Removal("attention", 0, 0.98),
            Removal("block", 3, 0.97),
            Removal("attention", 3, 0.96),
            Removal("ffn", 1, 0.95),
        ]
    )
    names = [[(one.part, one.layer) for one in first(ranking, n)] for n in range(4)]
    assert names[1:3] == [[("ffn", 3)], [("ffn", 3), ("attention", 0)]]
    assert names[3] == [("attention", 0), ("block", 3), ("ffn", 1)]
    with pytest.raises(UsageError, match="Only 3 parts"):
        first(ranking, 4)


def test_of_equal_similarities_the_deeper_layer_goes() -> None:
    assert [one.layer for one in ranked(Removal("ffn", layer, 0.5) for layer in range(3))] == [2, 1, 0]


def test_as_many_experts_of_each_group_are_kept() -> None:
    scores = [np.array([9.0, 8, 7, 6, 1, 2, 3, 4])]
    assert keep_by_layer(scores, 4, 2) == ((0, 1, 2, 3),)
    assert keep_by_layer(scores, 4, 2, n_group=2) == ((0, 1, 6, 7),)
    with pytest.raises(UsageError, match="5 experts do not divide into the 2 groups"):
        keep_by_layer(scores, 5, 2, n_group=2)
