"""Joined experts: planted answers are found, and a model of them is nearer to its source than by means or drops."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from slimoe.converter.budget.compress import plan_compression
from slimoe.converter.budget.merge_checks import check_merge
from slimoe.converter.budget.merging import OutputSums, fit_down, joining_bytes, joining_seconds, with_joined_neurons
from slimoe.converter.budget.planned_source import FittedMatrices, PlannedSource
from slimoe.converter.budget.structure import whole_layer
from slimoe.converter.forward.routing import Routing
from slimoe.converter.forward.stream import Observer, Sequences, Stream
from slimoe.converter.forward.windows import cut_windows
from slimoe.converter.layout.offsets import lay_out
from slimoe.converter.layout.plan import CompressPlan, Format
from slimoe.converter.methods.expert_groups import joined_groups, weighted_groups
from slimoe.converter.methods.expert_matrices import merged_matrix
from slimoe.converter.methods.merged_routes import keep_rows
from slimoe.converter.recipe.recipe import ExpertRecipe, Merge, Recipe, StorageRecipe
from slimoe.converter.report.evaluation import Reference
from slimoe.converter.report.quality import summarise
from slimoe.converter.source.model_source import ModelSource, expert_key
from slimoe.converter.stats.statistics import Statistics
from slimoe.converter.write.quantiser import PlainQuantiser
from slimoe.offload.errors import DoesNotFitError
from tests.models.compress_plans import learnt
from tests.models.held_model import hold, random_mixtral
from tests.models.tiny_checkpoint import TinyConfig

F32 = StorageRecipe("F32", attention="F32", token="F32", output="F32")
N_FF, N_EMBD = 12, 7


@pytest.fixture(scope="module")
def statistics(source: ModelSource, tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    return learnt(source, tmp_path_factory.mktemp("merging"), n_sequences=16)


def sums(activations: torch.Tensor, wanted: torch.Tensor) -> OutputSums:
    found = OutputSums.zeros(N_FF, wanted.shape[1])
    for some, others in zip(activations.split(9), wanted.split(9), strict=True):
        found.add(some, others)
    return found


def test_a_matrix_that_says_what_is_wanted_is_found() -> None:
    random = torch.Generator().manual_seed(1)
    activations, right = torch.randn(80, N_FF, generator=random), torch.randn(N_EMBD, N_FF, generator=random)
    mean, wanted = right + torch.randn(N_EMBD, N_FF, generator=random), activations @ right.T
    found = fit_down(mean, sums(activations[:60], wanted[:60]), sums(activations[60:], wanted[60:]))
    assert (found - right).norm() < 0.01 * (mean - right).norm()
    expected = np.linalg.lstsq(activations.numpy(), wanted.numpy(), rcond=None)[0].T
    np.testing.assert_allclose(found.numpy(), expected, atol=0.02)


def test_the_error_is_that_of_a_loop_over_tokens() -> None:
    random = torch.Generator().manual_seed(2)
    activations, wanted = torch.randn(30, N_FF, generator=random), torch.randn(30, N_EMBD, generator=random)
    down = torch.randn(N_EMBD, N_FF, generator=random)
    expected = sum(
        float((down @ a - y).square().sum() - y.square().sum()) for a, y in zip(activations, wanted, strict=True)
    )
    assert sums(activations, wanted).error(down) == pytest.approx(expected, rel=1e-4)


def test_what_tokens_do_not_tell_stays() -> None:
    random = torch.Generator().manual_seed(3)
    mean, activations = torch.randn(N_EMBD, N_FF, generator=random), torch.randn(8, N_FF, generator=random)
    nothing = sums(activations[:0], activations[:0, :N_EMBD])
    assert fit_down(mean, nothing, nothing) is mean
    # Eight tokens that want noise say nothing of others.
    noise = activations @ mean.T + 3 * torch.randn(8, N_EMBD, generator=random)
    others = torch.randn(50, N_FF, generator=random)
    assert fit_down(mean, sums(activations, noise), sums(others, others @ mean.T)) is mean


@pytest.fixture(scope="module")
def divergence(source: ModelSource, statistics: Statistics) -> Iterator[Callable[[Recipe], float]]:
    """What the model of a recipe loses on the tokens that it was calibrated on."""
    reference = Reference(source, cut_windows({"seen": sum(statistics.tokens, ())}, length=48))

    def measured(recipe: Recipe) -> float:
        plan = plan_compression(source, statistics, recipe)
        model = PlannedSource(source, plan, FittedMatrices(source, PlainQuantiser(), 0))
        return summarise(reference.compare(model)).total.divergence.mean

    yield measured
    reference.close()


def test_joined_experts_lose_less_than_means_and_than_dropping(divergence: Callable[[Recipe], float]) -> None:
    ways = {
        "neurons": ExpertRecipe(4, merge="neurons"),
        "means": ExpertRecipe(4, merge="m-smoe"),
        "drop": ExpertRecipe(4),
    }
    found = {name: divergence(Recipe(experts=one, types=F32, hints=False)) for name, one in ways.items()}
    # The weights are random, so that no neuron matters less than others.
    assert found["neurons"] < 0.95 * min(found["means"], found["drop"])


def test_a_copy_with_its_neurons_in_another_order_is_joined_without_loss(tmp_path: Path) -> None:
    model = hold(random_mixtral(TinyConfig(n_layer=1, n_embd=32, n_ff=48, n_expert=5, n_expert_used=2)))
    order = np.random.default_rng(4).permutation(48)
    shuffled = {
        expert_key(0, name, 3): np.take(model.read(expert_key(0, name, 1)), order, axis)
        for name, axis in (("gate", 0), ("up", 0), ("down", 1))
    }
    model = model.changed(shuffled)
    known = learnt(model, tmp_path)
    groups = weighted_groups([[0], [1, 3], [2], [4]], np.ones(5))
    routes = keep_rows(model.layers[0].target, groups)
    layer = replace(
        whole_layer(model, 0), experts=joined_groups(groups, (Type.F32,) * 3), rows=routes.rows, target=routes.target
    )
    plan = CompressPlan("native", (layer,), Type.F32, Type.F32, "")
    plan = with_joined_neurons(model, known, plan, lambda _what, _done, _total: None)
    reference = Reference(model, cut_windows({"seen": sum(known.tokens, ())}, length=48))
    result = PlannedSource(model, plan, FittedMatrices(model, PlainQuantiser(), 0))
    assert summarise(reference.compare(result)).total.divergence.mean < 1e-6
    reference.close()
    (joined,) = [expert for expert in plan.layers[0].experts if len(expert.members) > 1]
    ((_, first), (_, other)) = joined.picked(48)
    assert sorted([*first, *order[other]]) == list(range(48)), "of a neuron and its copy one is kept"


def test_joined_experts_have_rows_of_all_members(source: ModelSource, statistics: Statistics) -> None:
    recipe = Recipe(experts=ExpertRecipe(4, merge="neurons"), types=F32, hints=False)
    plan = plan_compression(source, statistics, recipe)
    for layer in plan.layers:
        assert len(layer.experts) == 4
        for expert in layer.experts:
            if len(expert.members) > 1:
                assert expert.kept is not None
                assert expert.down is not None
                assert len(expert.kept) == expert.down.shape[1] == source.spec.n_ff
                picked = expert.picked(source.spec.n_ff)
                assert all(len(own) for _, own in picked)
                for projection in ("gate", "up"):
                    rows = [source.read(expert_key(layer.block, projection, one))[own] for one, own in picked]
                    found = merged_matrix(source, layer.block, expert, projection)
                    np.testing.assert_array_equal(found, np.concatenate(rows))


@pytest.mark.parametrize("form", ["native", "stock"])
@pytest.mark.parametrize("how", ["neurons", "m-smoe", "hc-smoe"])
def test_sizes_are_known_before_it_is_known_who_is_merged(
    source: ModelSource, statistics: Statistics, how: Merge, form: Format
) -> None:
    # Of M-SMoE's native groups, layers have different numbers, as many in all.
    recipe = Recipe(format=form, experts=ExpertRecipe(4, merge=how), types=F32, hints=False)
    foretold = lay_out(source, check_merge(source, recipe))
    is_open = lay_out(source, plan_compression(source, statistics, recipe, is_open=True))
    made = lay_out(source, plan_compression(source, statistics, recipe))
    assert is_open.bytes_by_type == made.bytes_by_type == foretold.bytes_by_type
    assert is_open.n_bytes == made.n_bytes


def test_too_little_memory_is_refused_before_neurons_are_chosen(source: ModelSource) -> None:
    recipe = Recipe(experts=ExpertRecipe(4, merge="neurons"), types=F32)
    needed = joining_bytes(source)
    check_merge(source, recipe, needed)
    with pytest.raises(DoesNotFitError, match="Choosing the neurons of merged experts takes") as refused:
        check_merge(source, recipe, needed - 1)
    assert refused.value.required_bytes == needed
    check_merge(source, replace(recipe, experts=ExpertRecipe(4, merge="m-smoe")), 0)


class Selected(Observer):
    """Keeps the experts that tokens select."""

    def __init__(self) -> None:
        self.experts: set[int] = set()

    def routed(self, layer: int, first_row: int, x: torch.Tensor, read: torch.Tensor, routing: Routing) -> None:
        self.experts |= set(routing.selected.flatten().tolist())


def test_of_experts_that_no_token_selected_the_first_stands_for_all(
    source: ModelSource, statistics: Statistics
) -> None:
    one_token, selected = replace(statistics, tokens=((1,),)), Selected()
    stream = Stream(source, Sequences(one_token.tokens))
    stream.embed()
    stream.pass_layer(0, selected)
    unused = sorted({*range(6)} - selected.experts)
    groups = weighted_groups([unused, *([one] for one in selected.experts)], np.ones(6))
    routes, types = keep_rows(source.layers[0].target, groups), (Type.F32,) * 3
    experts = tuple(replace(one, low_types=(Type.Q8_0,) * 3) for one in joined_groups(groups, types))
    layer = replace(whole_layer(source, 0), experts=experts, rows=routes.rows, target=routes.target)
    plan = CompressPlan("native", (layer,), Type.F32, Type.F32, "")
    assert joining_seconds(source, one_token, plan) > 0
    plan = with_joined_neurons(source, one_token, plan, lambda _what, _done, _total: None)
    members = [one.members for one in plan.layers[0].experts]
    assert (len(unused), members) == (3, [one[:1] for one in groups.members])
    assert all(one.low_types == (Type.Q8_0,) * 3 for one in plan.layers[0].experts)
