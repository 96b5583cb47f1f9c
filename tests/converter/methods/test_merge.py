"""Merging of experts: neurons found again, equal experts merged without a change, groups as the papers form them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from slimoe.converter.forward.expert import Expert, Linear
from slimoe.converter.forward.stream import Sequences, run
from slimoe.converter.layout.plan import ExpertPlan
from slimoe.converter.methods.expert_groups import (
    ExpertGroups,
    Metric,
    dominant_experts,
    groups_by_number,
    logit_similarity,
    merge_by_output,
    merge_by_router,
    msmoe,
    msmoe_alike,
    plan_groups,
    weighted_groups,
)
from slimoe.converter.methods.expert_matrices import ExpertMatrices, align, merged_matrix, merged_vectors, read_matrices
from slimoe.converter.methods.merged_routes import ROW_MERGES, MergedRoutes, RouterRows, keep_rows, merge_rows
from slimoe.converter.source.model_source import (
    PROJECTIONS,
    ModelSource,
    SourceLayer,
    block_key,
    expert_key,
    vectors_key,
)
from slimoe.converter.stats.statistics import InputSums, LayerStatistics, OutputSums, RouterSums, SimilaritySums
from slimoe.offload.errors import UsageError
from tests.models.held_model import HeldModel, hold, random_mixtral
from tests.models.tiny_checkpoint import TinyConfig

F32 = GGMLQuantizationType.F32
TYPES = (F32, F32, F32)
SIZES = TinyConfig(n_layer=2, n_embd=32, n_ff=48, n_expert=5, n_expert_used=2)
TEXTS = Sequences((tuple(range(3, 43)), tuple(range(100, 160))))
LAYER = 1


def random_expert(seed: int, n_ff: int = 40, n_embd: int = 24) -> ExpertMatrices:
    random = np.random.default_rng(seed)
    shapes = ((n_ff, n_embd), (n_ff, n_embd), (n_embd, n_ff))
    return ExpertMatrices(*(random.standard_normal(shape).astype(np.float32) for shape in shapes))


def merged_expert(source: ModelSource, layer: int, plan: ExpertPlan) -> ExpertMatrices:
    """All matrices of the result's expert."""
    return ExpertMatrices(*(merged_matrix(source, layer, plan, projection) for projection in PROJECTIONS))


def answer(expert: ExpertMatrices, x: torch.Tensor) -> torch.Tensor:
    parts = (Linear(torch.from_numpy(matrix)) for matrix in (expert.gate, expert.up, expert.down))
    return Expert(*parts)(x)


def put(model: HeldModel, layer: int, expert: int, weights: ExpertMatrices) -> HeldModel:
    matrices = (weights.gate, weights.up, weights.down)
    return model.changed({expert_key(layer, p, expert): m for p, m in zip(PROJECTIONS, matrices, strict=True)})


def merge(model: HeldModel, layer: int, plans: tuple[ExpertPlan, ...], routes: MergedRoutes) -> HeldModel:
    """The model with a layer's plan carried out."""
    result = model
    for number, plan in enumerate(plans):
        result = put(result, layer, number, merged_expert(model, layer, plan))
    router = model.read(block_key(layer, "ffn_gate_inp"))[list(routes.rows)]
    result = result.changed({block_key(layer, "ffn_gate_inp"): router if routes.router is None else routes.router})
    return result.with_layer(layer, SourceLayer(len(plans), routes.target))


def reordered(expert: ExpertMatrices, neurons: NDArray[np.int64]) -> ExpertMatrices:
    """The expert of only these neurons, in this order; with all neurons it computes the same as before."""
    return ExpertMatrices(expert.gate[neurons], expert.up[neurons], expert.down[:, neurons])


@pytest.fixture(scope="module")
def model() -> HeldModel:
    return hold(random_mixtral(SIZES))


@pytest.fixture(scope="module")
def with_copy(model: HeldModel) -> tuple[HeldModel, NDArray[np.int64]]:
    """Expert 3 of a layer is expert 1 with its neurons shuffled; and the shuffle."""
    order = np.random.default_rng(5).permutation(SIZES.n_ff)
    return put(model, LAYER, 3, reordered(read_matrices(model, LAYER, 1), order)), order


@pytest.mark.parametrize("n_exact", [2048, 7, 0])
def test_a_shuffled_copy_is_found_neuron_by_neuron(n_exact: int) -> None:
    expert, order = random_expert(1), np.random.default_rng(2).permutation(40)
    copy = reordered(expert, order)
    assert copy.distance(expert) > 0.5
    found = align(expert, copy, n_exact)
    assert (order[found] == np.arange(40)).all()
    assert reordered(copy, found).distance(expert) == 0


@pytest.mark.parametrize("n_exact", [2048, 9])
def test_neurons_are_matched_as_a_naive_assignment_matches_them(n_exact: int) -> None:
    first, other = random_expert(3, 30), random_expert(4, 30)
    products = np.array(
        [
            [
                first.gate[i] @ other.gate[j] + first.up[i] @ other.up[j] + first.down[:, i] @ other.down[:, j]
                for j in range(30)
            ]
            for i in range(30)
        ]
    )
    order = align(first, other, n_exact)
    assert sorted(order) == list(range(30))
    best = products[linear_sum_assignment(products, maximize=True)].sum()
    got = products[np.arange(30), order].sum()
    if n_exact > 30:
        assert got == pytest.approx(best)
    else:
        assert 0.8 * best < got <= best + 1e-3


def test_many_equal_wishes_still_give_every_neuron_one_partner() -> None:
    other = random_expert(6, 100)
    first = ExpertMatrices(*(np.ones_like(matrix) for matrix in (other.gate, other.up, other.down)))
    assert sorted(align(first, other, 10)) == list(range(100))


def test_the_order_of_neurons_changes_no_answer() -> None:
    expert, x = random_expert(7), torch.randn(20, 24, generator=torch.Generator().manual_seed(1))
    shuffled = reordered(expert, np.random.default_rng(8).permutation(40))
    torch.testing.assert_close(answer(shuffled, x), answer(expert, x), rtol=1e-5, atol=1e-4)


def test_weights_are_shares_of_use_and_the_most_used_comes_first() -> None:
    groups = weighted_groups([[0, 4], [2, 1, 3]], np.array([1.0, 6, 2, 0, 3]))
    assert groups.members == ((1, 2, 3), (4, 0))
    assert groups.weights == ((0.75, 0.25, 0.0), (0.75, 0.25))
    assert [groups.group_of(expert) for expert in range(5)] == [1, 0, 0, 0, 1]
    unused = weighted_groups([[0, 1, 2]], np.zeros(3))
    assert sum(unused.weights[0]) == pytest.approx(1)


def test_a_merge_is_the_weighted_mean_of_matching_neurons(model: HeldModel) -> None:
    groups = ExpertGroups(((2, 0, 4),), ((0.5, 0.3, 0.2),))
    plan = plan_groups(model, LAYER, groups, [TYPES])[0]
    experts = [read_matrices(model, LAYER, expert) for expert in (2, 0, 4)]
    merged = merged_expert(model, LAYER, plan)
    for neuron in range(SIZES.n_ff):
        places = (neuron, plan.neurons[0][neuron], plan.neurons[1][neuron])
        ups = sum(w * e.up[place] for w, e, place in zip(groups.weights[0], experts, places, strict=True))
        downs = sum(w * e.down[:, place] for w, e, place in zip(groups.weights[0], experts, places, strict=True))
        np.testing.assert_allclose(merged.up[neuron], ups, atol=1e-6)
        np.testing.assert_allclose(merged.down[:, neuron], downs, atol=1e-6)
    plain = plan_groups(model, LAYER, groups, [TYPES], aligned=False)[0]
    assert all((order == np.arange(SIZES.n_ff)).all() for order in plain.neurons)
    aligned = reordered(experts[1], plan.neurons[0]).distance(experts[0])
    assert aligned < experts[1].distance(experts[0])


def test_scales_are_averaged_with_the_matrices_that_they_belong_to(model: HeldModel) -> None:
    """The same experts with factors taken out of their matrices become the same experts, whatever the factors."""
    scales = np.random.default_rng(4).uniform(-2, 2, (len(PROJECTIONS), SIZES.n_expert)).astype(np.float32)
    scales[2, 4] = 0
    plain, taken_out = model, model
    for one, projection in zip(scales, PROJECTIONS, strict=True):
        taken_out = taken_out.changed({vectors_key(LAYER, projection, "scale"): one})
        for expert, scale in enumerate(one):
            key = expert_key(LAYER, projection, expert)
            product = {key: scale * (model.read(key) / scale if scale else model.read(key))}
            plain = plain.changed(product)
            taken_out = taken_out.changed({key: model.read(key) / scale if scale else model.read(key)})
    groups = ExpertGroups(((2, 0, 4), (3,), (1,)), ((0.5, 0.3, 0.2), (1.0,), (1.0,)))
    found, expected = (plan_groups(one, LAYER, groups, [TYPES] * 3) for one in (taken_out, plain))
    np.testing.assert_array_equal(found[0].neurons, expected[0].neurons)
    for projection, one in zip(PROJECTIONS, scales, strict=True):
        merged = merged_vectors(taken_out, vectors_key(LAYER, projection, "scale"), found, 1)
        np.testing.assert_array_equal(merged[1:], one[[3, 1]])
        matrix, wanted = merged_matrix(taken_out, LAYER, found[0], projection), expected[0]
        np.testing.assert_allclose(merged[0] * matrix, merged_matrix(plain, LAYER, wanted, projection), atol=1e-5)
        stored = [taken_out.read(expert_key(LAYER, projection, expert)) for expert in (2, 0, 4)]
        assert np.abs(matrix).max() <= max(np.abs(some).max() for some in stored) * (1 + 1e-6)


def test_an_expert_by_itself_stays_bit_for_bit_and_can_be_trimmed(model: HeldModel) -> None:
    whole = read_matrices(model, LAYER, 2)
    same = merged_expert(model, LAYER, ExpertPlan((2,), TYPES))
    assert all(np.array_equal(getattr(same, p), getattr(whole, p)) for p in PROJECTIONS)
    kept, down = np.array([1, 5, 6]), np.ones((SIZES.n_embd, 3), np.float32)
    narrow = merged_expert(model, LAYER, ExpertPlan((2,), TYPES, kept=kept, down=down))
    assert np.array_equal(narrow.gate, whole.gate[kept])
    assert np.array_equal(narrow.up, whole.up[kept])
    assert np.array_equal(narrow.down, down)


def test_equal_experts_merge_without_a_change_when_their_rows_stay(
    with_copy: tuple[HeldModel, NDArray[np.int64]],
) -> None:
    source, _ = with_copy
    groups = weighted_groups([[0], [1, 3], [2], [4]], np.array([1.0, 3, 1, 2, 1]))
    plans = plan_groups(source, LAYER, groups, [TYPES] * 4)
    assert merged_expert(source, LAYER, plans[1]).distance(read_matrices(source, LAYER, 1)) < 1e-12
    routes = keep_rows(source.layers[LAYER].target, groups)
    assert routes.rows == (0, 1, 2, 3, 4)
    assert routes.target == (0, 1, 2, 1, 3)
    merged = merge(source, LAYER, plans, routes)
    torch.testing.assert_close(run(merged, TEXTS), run(source, TEXTS), rtol=1e-4, atol=1e-4)
    unaligned = merge(source, LAYER, plan_groups(source, LAYER, groups, [TYPES] * 4, aligned=False), routes)
    assert (run(unaligned, TEXTS) - run(source, TEXTS)).abs().max() > 1e-2


def router_rows(n: int = 400, target: tuple[int, ...] = (0, 1, 2, 3, 4)) -> RouterRows:
    random = np.random.default_rng(9)
    weight = random.standard_normal((len(target), 16)).astype(np.float32)
    x = random.standard_normal((n, 16)).astype(np.float32)
    return RouterRows(weight, target, np.array([5.0, 1, 4, 3, 2])[: len(target)], x)


def log_sum_error(router: RouterRows, routes: MergedRoutes, groups: ExpertGroups) -> float:
    """How far the log of a group's wanted probability is from its row's, naively, over all tokens."""
    assert routes.router is not None
    error = 0.0
    for x in router.x:
        logits = router.weight @ x
        for row, members in enumerate(groups.members):
            own = [logits[r] for r, expert in enumerate(router.target) if expert in members]
            error += float(np.log(np.exp(own).sum()) - routes.router[row] @ x) ** 2
    return error


def test_rows_fitted_to_the_sum_of_exponentials_beat_the_mean_row() -> None:
    router = router_rows()
    groups = weighted_groups([[0, 4], [1, 3], [2]], router.use)
    routes = {how: merge_rows(router, groups, how) for how in ROW_MERGES}
    errors = {how: log_sum_error(router, one, groups) for how, one in routes.items()}
    assert errors["log_sum"] < 0.95 * errors["mean"]
    assert errors["log_sum"] < 0.95 * errors["dominant"]
    for one in routes.values():
        assert one.rows == (0, 2, 3)
        assert one.target == (0, 1, 2)
        assert one.router is not None
        assert np.array_equal(one.router[1], router.weight[2])
    assert np.array_equal(routes["dominant"].router, router.weight[[0, 2, 3]])  # type: ignore[arg-type]
    mean = (5 * router.weight[0] + 2 * router.weight[4]) / 7
    np.testing.assert_allclose(routes["mean"].router[0], mean, rtol=1e-5, atol=1e-6)  # type: ignore[index]


def test_equal_rows_are_fitted_by_themselves_but_for_their_number() -> None:
    router = router_rows()
    equal = replace(router, weight=np.repeat(router.weight[:1], 5, 0))
    routes = merge_rows(equal, weighted_groups([[0, 1], [2, 3, 4]], equal.use), "log_sum")
    assert routes.router is not None
    assert np.abs(routes.router - router.weight[:1]).max() < 0.2


def test_aliases_of_one_expert_are_merged_like_experts() -> None:
    router = router_rows(target=(0, 0, 1, 1, 2))
    routes = merge_rows(router, weighted_groups([[0], [1], [2]], np.array([6.0, 7, 2])), "mean")
    assert routes.rows == (0, 2, 4)
    assert routes.target == (0, 1, 2)


def test_rows_are_refused_that_cannot_be_merged() -> None:
    groups = weighted_groups([[0, 1]], np.ones(2))
    with pytest.raises(UsageError, match="dominant, mean, log_sum"):
        merge_rows(router_rows(target=(0, 1)), groups, "sum")
    with pytest.raises(UsageError, match="constant experts"):
        merge_rows(router_rows(target=(0, 1, -1)), groups, "mean")
    assert keep_rows((0, -1, 1), groups).target == (0, -1, 0)


def output_sums(means: NDArray[np.float64], counts: NDArray[np.int64]) -> OutputSums:
    sums = (means * counts[:, None]).astype(np.float32)
    blank = np.zeros(len(counts))
    return OutputSums(counts, blank, blank, blank, blank, blank, blank, sums, sums, sums, sums)


def router_sums(logits: NDArray[np.float64]) -> RouterSums:
    n_row = logits.shape[1]
    ints, blank, bins = np.zeros((n_row, n_row), np.int64), np.zeros(n_row), np.zeros(1024, np.int64)
    ahead, product = np.zeros((3, 2, 2), np.int64), logits.T @ logits
    return RouterSums(ints, blank, blank, blank, blank, bins, bins, ints, logits.sum(0), product, ahead, ints, ints)


def layer_statistics(logits: NDArray[np.float64], counts: NDArray[np.int64]) -> LayerStatistics:
    inputs = InputSums(*(np.zeros(0, np.float32) for _ in range(5)))
    outputs = output_sums(np.zeros((len(counts), 4)), counts)
    return LayerStatistics(SimilaritySums(0, 0, 0, 0, 0), inputs, router_sums(logits), outputs)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_clusters_of_outputs_join_equal_experts_first(metric: str) -> None:
    random = np.random.default_rng(10)
    means = random.standard_normal((6, 20))
    means[4] = means[1]
    means[5] = means[2] * (1 if metric == "euclidean" else 3)
    outputs = output_sums(means, np.array([3, 1, 4, 1, 5, 9]))
    groups = merge_by_output(outputs, 4, metric)  # type: ignore[arg-type]
    assert groups.members == ((0,), (3,), (4, 1), (5, 2))
    assert groups.weights[2] == pytest.approx((5 / 6, 1 / 6))
    assert merge_by_output(outputs, 6).members == tuple((expert,) for expert in range(6))
    assert len(merge_by_output(outputs, 1).members[0]) == 6


def test_clusters_are_those_of_a_naive_average_linkage() -> None:
    means = np.random.default_rng(11).standard_normal((9, 5))
    clusters = [[expert] for expert in range(9)]
    while len(clusters) > 4:
        pairs = [(a, b) for a in range(len(clusters)) for b in range(a)]

        def apart(pair: tuple[int, int]) -> float:
            between = [np.linalg.norm(means[i] - means[j]) for i in clusters[pair[0]] for j in clusters[pair[1]]]
            return float(np.mean(between))

        a, b = min(pairs, key=apart)
        clusters[b] += clusters.pop(a)
    groups = merge_by_output(output_sums(means, np.ones(9, np.int64)), 4)
    assert {frozenset(group) for group in groups.members} == {frozenset(group) for group in clusters}


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_clusters_of_outputs_within_a_routers_groups_are_those_of_each_alone(metric: Metric) -> None:
    random = np.random.default_rng(15)
    means, use = random.standard_normal((9, 5)), random.permutation(9) + 1
    means[7] = means[1]
    groups = merge_by_output(output_sums(means, use), 6, metric, n_router_group=3)
    wanted = []
    for begin in (0, 3, 6):
        own = slice(begin, begin + 3)
        alone = merge_by_output(output_sums(means[own], use[own]), 2, metric)
        wanted += [tuple(begin + expert for expert in members) for members in alone.members]
    assert list(groups.members) == wanted, "in the order of the router's groups"
    with pytest.raises(
        UsageError, match=r"4 experts do not divide into the 3 groups .* Keep a multiple of 3, or write"
    ):
        merge_by_output(output_sums(means, use), 4, metric, n_router_group=3)


def test_an_expert_that_no_token_picked_joins_with_no_weight() -> None:
    means = np.random.default_rng(12).standard_normal((4, 6))
    groups = merge_by_output(output_sums(means, np.array([5, 0, 3, 2])), 2)
    (group,) = [number for number, members in enumerate(groups.members) if 1 in members]
    assert len(groups.members[group]) > 1
    assert groups.weights[group][groups.members[group].index(1)] == 0
    with pytest.raises(UsageError, match="5 experts cannot be left of 4"):
        merge_by_output(output_sums(means, np.ones(4, np.int64)), 5)


def test_similarity_is_the_cosine_of_logits_over_tokens() -> None:
    logits = np.random.default_rng(13).standard_normal((50, 4))
    found = logit_similarity(router_sums(logits), (0, 1, 1, -1), 2)
    first, second = logits[:, 0], (logits[:, 1] + logits[:, 2]) / 2
    assert found[0, 1] == pytest.approx(first @ second / np.linalg.norm(first) / np.linalg.norm(second))
    assert np.diag(found) == pytest.approx(np.ones(2))


def test_dominant_experts_are_the_most_used_of_the_model_and_some_in_each_layer() -> None:
    use = [np.array([100.0, 90, 80]), np.array([10.0, 1, 2]), np.zeros(0), np.array([0.0, 0])]
    assert dominant_experts(use, 5) == ((0, 1, 2), (0,), (), (0,))
    assert dominant_experts(use, 6) == ((0, 1, 2), (0, 2), (), (0,))
    assert dominant_experts(use, 6, 2) == ((0, 1), (0, 2), (), (0, 1))
    assert dominant_experts(use, 8) == ((0, 1, 2), (0, 1, 2), (), (0, 1))
    with pytest.raises(UsageError, match="Choose 6 to 8"):
        dominant_experts(use, 5, 2)


def test_experts_join_the_dominant_that_is_wanted_for_the_same_tokens() -> None:
    similarity = np.eye(5)
    similarity[1, [0, 3]] = (0.2, 0.6)
    similarity[2, [0, 3]] = (-0.1, -0.5)
    similarity[4, [0, 3]] = (0.3, 0.3)
    groups = merge_by_router(similarity, (0, 3), np.array([8.0, 2, 0, 6, 4]))
    assert groups.members == ((0, 4, 2), (3, 1))
    assert groups.weights[0] == pytest.approx((2 / 3, 1 / 3, 0))
    assert groups.weights[1] == (0.75, 0.25)


def test_msmoe_merges_an_expert_with_the_one_of_equal_rows() -> None:
    logits = np.random.default_rng(14).standard_normal((60, 5))
    logits[:, 3] = 2 * logits[:, 1]
    layers = [
        layer_statistics(logits, np.array([9, 8, 7, 1, 6])),
        LayerStatistics(SimilaritySums(0, 0, 0, 0, 0), InputSums(*(np.zeros(0, np.float32) for _ in range(5)))),
        layer_statistics(logits, np.array([1, 1, 1, 1, 1])),
    ]
    groups = msmoe(layers, [range(5), (), range(5)], 9)
    assert groups[0].members == ((0,), (1, 3), (2,), (4,))
    assert groups[1].members == ()
    assert len(groups[2].members) == 5
    with pytest.raises(UsageError, match="Calibrate again"):
        msmoe(layers, [range(5), range(5), range(5)], 9)


def test_msmoe_within_a_routers_groups_is_that_of_each_alone() -> None:
    random = np.random.default_rng(16)
    logits, use = random.standard_normal((60, 8)), np.array([9, 8, 7, 6, 1, 0, 3, 2])
    logits[:, 5] = 2 * logits[:, 1]
    (groups,) = msmoe_alike([layer_statistics(logits, use)], [range(8)], 4, n_router_group=2)
    wanted = []
    for begin in (0, 4):
        own = slice(begin, begin + 4)
        (alone,) = msmoe([layer_statistics(logits[:, own], use[own])], [range(4)], 2)
        wanted += [tuple(begin + expert for expert in members) for members in alone.members]
    assert list(groups.members) == wanted
    with pytest.raises(UsageError, match=r"5 experts do not divide into the 2 groups .* or write a native file"):
        msmoe_alike([layer_statistics(logits, use)], [range(8)], 5, n_router_group=2)


def test_a_planted_copy_is_found_by_its_answers_and_merged_without_a_change(
    with_copy: tuple[HeldModel, NDArray[np.int64]],
) -> None:
    source, _ = with_copy
    x = torch.randn(64, SIZES.n_embd, generator=torch.Generator().manual_seed(3))
    means = [answer(read_matrices(source, LAYER, expert), x).mean(0).double().numpy() for expert in range(5)]
    groups = merge_by_output(output_sums(np.stack(means), np.full(5, 64)), 4)
    assert groups.members == ((0,), (1, 3), (2,), (4,))
    routes = keep_rows(source.layers[LAYER].target, groups)
    merged = merge(source, LAYER, plan_groups(source, LAYER, groups, [TYPES] * 4), routes)
    torch.testing.assert_close(run(merged, TEXTS), run(source, TEXTS), rtol=1e-4, atol=1e-4)


def test_groups_by_number_have_the_sizes_of_others() -> None:
    found = groups_by_number(8, 4, 2)
    assert found.members == ((0,), (1, 2, 3), (4,), (5, 6, 7))
    assert [sum(weights) for weights in found.weights] == pytest.approx([1.0] * 4)
    with pytest.raises(UsageError, match="3 experts do not divide into the 2 groups of which the router selects"):
        groups_by_number(8, 3, 2)
