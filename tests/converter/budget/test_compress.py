"""Plans of compressed models: what a recipe leaves, what a budget buys, and files that hold what was planned."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type

from slimoe.converter.budget.compress import expected_loss, plan_compression
from slimoe.converter.budget.planned_source import FittedMatrices, PlannedSource
from slimoe.converter.budget.refinement import refine
from slimoe.converter.budget.structure import build_structure
from slimoe.converter.budget.types import TypeAllocator
from slimoe.converter.forward.windows import cut_windows
from slimoe.converter.layout.layer import native_layer
from slimoe.converter.layout.offsets import lay_out, plan_bytes
from slimoe.converter.layout.plan import CompressPlan
from slimoe.converter.recipe.fields import SourceSizes
from slimoe.converter.recipe.recipe import ExpertRecipe, FitRecipe, Recipe, StorageRecipe
from slimoe.converter.recipe.toml_file import parse_recipe
from slimoe.converter.report.alignment import likely_layer_map, planned_layer_map
from slimoe.converter.report.evaluation import Reference
from slimoe.converter.report.quality import summarise
from slimoe.converter.source.model_source import ModelSource
from slimoe.converter.source.open_source import open_source
from slimoe.converter.stats.statistics import Statistics
from slimoe.converter.stats.type_costs import CANDIDATES, packed_costs, statistics_costs, stored_costs
from slimoe.converter.write.quantiser import PlainQuantiser
from slimoe.converter.write.writer import chosen_quantiser, write_planned
from slimoe.offload.errors import DoesNotFitError, UsageError
from tests.models.compress_plans import learnt, random_sequences
from tests.models.held_model import hold, random_mixtral
from tests.models.tiny_checkpoint import TinyConfig

SIZES = {"stock": (205_000, 240_000, 300_000, 420_000), "native": (290_000, 320_000, 380_000, 500_000)}


@pytest.fixture(scope="module")
def statistics(source: ModelSource, tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    return learnt(source, tmp_path_factory.mktemp("compressing"))


@pytest.fixture(scope="module")
def reference(source: ModelSource) -> Reference:
    tokens = sum(random_sequences(4, 48, source.spec.n_vocab, seed=9), ())
    return Reference(source, cut_windows({"random": tokens}, length=48))


def divergence(reference: Reference, model: ModelSource) -> float:
    return summarise(reference.compare(model)).total.divergence.mean


def expert_types(plan: CompressPlan) -> set[str]:
    return {kind.name for layer in plan.layers for expert in layer.experts for kind in expert.types}


@pytest.mark.parametrize("kind", ["stock", "native"])
def test_a_budget_is_kept_to_the_byte_and_more_of_it_buys_quality(
    source: ModelSource, statistics: Statistics, reference: Reference, tmp_path: Path, kind: str
) -> None:
    found = []
    for size in SIZES[kind]:
        recipe = Recipe(format=kind, target_size=size)  # type: ignore[arg-type]
        plan = plan_compression(source, statistics, recipe)
        path = tmp_path / f"{size}.gguf"
        report = write_planned(source, plan, path, statistics)
        assert path.stat().st_size == report.n_bytes == plan_bytes(plan, source, statistics) <= size
        assert report.n_bytes > 0.9 * size
        found.append((plan.expected_kl, divergence(reference, open_source(path))))
    expected, measured = zip(*found, strict=True)
    assert sorted(expected, reverse=True) == list(expected)
    assert sorted(measured, reverse=True) == list(measured)


def test_the_least_size_is_named_and_can_be_had(source: ModelSource, statistics: Statistics) -> None:
    with pytest.raises(DoesNotFitError, match="smallest file") as error:
        plan_compression(source, statistics, Recipe(target_size=20_000, hints=False))
    least = error.value.required_bytes
    assert least is not None
    assert (
        plan_bytes(plan_compression(source, statistics, Recipe(target_size=least, hints=False)), source, statistics)
        <= least
    )


def test_bits_per_weight_are_those_of_the_source(source: ModelSource, statistics: Statistics) -> None:
    n_weights = sum(int(np.prod(shape)) for shape in source.shapes.values())
    plan = plan_compression(source, statistics, Recipe(target_bpw=9.0))
    assert 0.9 * 9.0 < 8 * plan_bytes(plan, source, statistics) / n_weights <= 9.0


def test_named_types_need_no_statistics(source: ModelSource) -> None:
    plan = plan_compression(source, None, Recipe(types=StorageRecipe(expert="Q8_0", low="Q4_0", attention="F16")))
    assert expert_types(plan) == {"Q8_0"}
    assert {kind.name for layer in plan.layers for kind in layer.types.values()} == {"F16"}
    assert all(expert.low_types is not None for layer in plan.layers for expert in layer.experts)


@pytest.mark.parametrize(
    "recipe", [Recipe(target_size=320_000), Recipe(drop_ffn=1), Recipe(experts=ExpertRecipe(keep=4))]
)
def test_what_needs_statistics_says_so(source: ModelSource, recipe: Recipe) -> None:
    with pytest.raises(UsageError, match="slimoe calibrate"):
        plan_compression(source, None, recipe)


DROPS = {
    "subset": ExpertRecipe(keep=4),
    "frequency": ExpertRecipe(keep=4, score="frequency"),
    "overall": ExpertRecipe(keep=4, score="reap", overall=True),
    "overall subset": ExpertRecipe(keep=4, overall=True),
    "overall loss": ExpertRecipe(keep=4, score="loss", overall=True),
    "constants": ExpertRecipe(keep=4, replacement="constant"),
    "hc-smoe": ExpertRecipe(keep=4, merge="hc-smoe"),
    "m-smoe": ExpertRecipe(keep=4, merge="m-smoe"),
    "narrow": ExpertRecipe(width=64),
}


@pytest.mark.parametrize("name", DROPS)
def test_methods_leave_what_they_say_and_the_result_is_the_plan(
    source: ModelSource, statistics: Statistics, tmp_path: Path, name: str
) -> None:
    recipe = Recipe(experts=DROPS[name], types=StorageRecipe(expert="F32", attention="F32", token="F32", output="F32"))
    plan = plan_compression(source, statistics, recipe)
    n_expert = sum(len(layer.experts) for layer in plan.layers)
    assert n_expert == (6 if name == "narrow" else 4) * len(plan.layers)
    if name == "narrow":
        assert {len(expert.kept) for layer in plan.layers for expert in layer.experts if expert.kept is not None} == {
            64
        }
    if name in ("constants", "hc-smoe", "m-smoe"):
        assert all(layer.rows == tuple(range(6)) for layer in plan.layers), "the router keeps its rows"
    path = tmp_path / "result.gguf"
    write_planned(source, plan, path, statistics)
    written, planned = open_source(path), PlannedSource(source, plan, FittedMatrices(source, PlainQuantiser(), 1 << 30))
    assert written.shapes.keys() == planned.shapes.keys()
    assert [layer.target for layer in written.layers] == [layer.target for layer in planned.layers]
    for key in planned.shapes:
        np.testing.assert_array_equal(written.read(key), planned.read(key), str(key))


def test_layers_attentions_and_blocks_go(source: ModelSource, statistics: Statistics) -> None:
    types = StorageRecipe(expert="Q8_0")
    plan = plan_compression(source, statistics, Recipe(drop_ffn=1, drop_attention=1, types=types))
    assert sorted(bool(layer.experts) for layer in plan.layers) == [False, True]
    assert sorted(layer.has_attention for layer in plan.layers) == [False, True]
    assert (
        len(plan_compression(source, statistics, Recipe(drop_blocks=1, types=types)).layers) == source.spec.n_layer - 1
    )


def test_a_file_says_which_blocks_it_was_made_of(source: ModelSource, statistics: Statistics, tmp_path: Path) -> None:
    plan = plan_compression(source, statistics, Recipe(drop_blocks=1, types=StorageRecipe(expert="Q8_0")))
    write_planned(source, plan, tmp_path / "a.gguf", statistics)
    found = likely_layer_map(open_source(tmp_path / "a.gguf"), source)
    assert found is not None
    assert found.blocks == planned_layer_map(plan).blocks != (0, 1)


def test_hints_are_in_the_budget(source: ModelSource, statistics: Statistics) -> None:
    plan = plan_compression(source, statistics, Recipe(target_size=320_000))
    assert {"use", "error", "skip_error", "sensitivity"} <= plan.layers[0].hints.keys()
    bare = replace(plan, layers=tuple(replace(layer, hints={}) for layer in plan.layers))
    assert plan_bytes(bare, source, statistics) <= plan_bytes(plan, source, statistics) <= 320_000


def test_low_copies_serve_a_third_of_the_bytes_where_they_lose_least(
    source: ModelSource, statistics: Statistics
) -> None:
    """Thresholds are at one price of a byte, and on the calibration's own tokens a third of the bytes is saved."""
    types = StorageRecipe(expert="Q8_0", low="Q4_0", attention="Q8_0", token="Q8_0", output="Q8_0")
    plan, prices, n_low, n_all = plan_compression(source, statistics, Recipe(types=types)), [], 0, 0
    for layer in plan.layers:
        hints, trace = native_layer(source, layer).hints, statistics.layers[layer.block].trace
        assert trace is not None
        assert hints.low_weight
        assert hints.low_error
        limits = np.array(hints.low_weight)
        squares = np.array(hints.use) * np.array(hints.share_square)
        prices += (limits**2 * np.array(hints.low_error) / squares).tolist()
        n_low += int((trace.shares < limits[trace.picks]).sum())
        n_all += trace.picks.size
    assert n_low / n_all == pytest.approx(0.33, abs=0.02)
    np.testing.assert_allclose(prices, prices[0], rtol=1e-4)
    single = plan_compression(source, statistics, Recipe(types=replace(types, low=None)))
    assert "low_weight" not in single.layers[0].hints
    unknown = replace(statistics, layers=tuple(replace(layer, trace=None) for layer in statistics.layers))
    assert "low_weight" not in plan_compression(source, unknown, Recipe(types=types)).layers[0].hints


def test_constants_take_the_place_of_what_is_worth_less(source: ModelSource, statistics: Statistics) -> None:
    """So small that even the smallest types of all experts do not fit."""
    whole = ExpertRecipe(width=source.spec.n_ff)
    recipe = Recipe(target_size=145_000, hints=False, experts=whole, free_constants=True)
    plan = plan_compression(source, statistics, recipe)
    assert plan_bytes(plan, source, statistics) <= 145_000
    assert any(layer.constants is not None for layer in plan.layers)
    assert all(len(layer.experts) >= source.spec.n_expert_used for layer in plan.layers)


@pytest.mark.parametrize(("kind", "size"), [("stock", 130_000), ("native", 145_000)])
def test_a_size_that_no_types_meet_leaves_out_what_costs_least(
    source: ModelSource, statistics: Statistics, reference: Reference, tmp_path: Path, kind: str, size: int
) -> None:
    whole = ExpertRecipe(width=source.spec.n_ff)
    recipe = Recipe(format=kind, target_size=size, hints=False, experts=whole)  # type: ignore[arg-type]
    plan = plan_compression(source, statistics, recipe)
    assert sum(len(layer.experts) for layer in plan.layers) < source.spec.n_layer * source.spec.n_expert
    path = tmp_path / "a.gguf"
    assert write_planned(source, plan, path, statistics).n_bytes <= size
    asked = parse_recipe(plan.recipe, SourceSizes(source.spec.n_layer, source.spec.n_expert, source.spec.n_ff))
    assert asked != recipe, "the file says what was left out"
    again = plan_compression(source, statistics, asked)
    assert again.expected_kl == pytest.approx(plan.expected_kl)
    pruned = replace(recipe, experts=replace(whole, keep=source.spec.n_expert_used))
    fewest = plan_compression(source, statistics, pruned)
    assert plan.expected_kl is not None
    assert fewest.expected_kl is not None
    assert plan.expected_kl <= fewest.expected_kl
    assert plan.expected_kl == pytest.approx(divergence(reference, open_source(path)), rel=0.5)


def test_one_layer_keeps_its_experts(source: ModelSource, statistics: Statistics) -> None:
    free = Recipe(target_size=20_000, hints=False, free_constants=True, free_layers=True)
    with pytest.raises(DoesNotFitError, match="smallest file") as error:
        plan_compression(source, statistics, free)
    assert error.value.required_bytes is not None
    plan = plan_compression(source, statistics, replace(free, target_size=error.value.required_bytes))
    assert [bool(layer.experts) for layer in plan.layers].count(True) == 1


def test_feedback_lowers_the_divergence(
    source: ModelSource, statistics: Statistics, reference: Reference, tmp_path: Path
) -> None:
    found = []
    for feedback in (False, True):
        fit = FitRecipe(feedback=feedback, refit=feedback)
        named = StorageRecipe(expert="Q4_0", attention="Q8_0", token="Q8_0", output="Q8_0")
        plan = plan_compression(source, statistics, Recipe(types=named, fit=fit))
        path = tmp_path / f"{feedback}.gguf"
        write_planned(source, plan, path, statistics, quantiser=chosen_quantiser(source, plan, statistics, 1))
        found.append((path.stat().st_size, divergence(reference, open_source(path))))
    (n_plain, plain), (n_fed, fed) = found
    assert n_plain == n_fed
    assert fed < plain


def test_refinement_keeps_the_budget_and_never_gets_worse(source: ModelSource, statistics: Statistics) -> None:
    recipe = Recipe(target_size=320_000, hints=False)
    structure = build_structure(source, statistics, recipe)
    costs = statistics_costs(source, statistics, None, 1, lambda _what, _done, _total: None)
    allocator = TypeAllocator(source, statistics, costs, recipe, structure)
    bare = plan_compression(source, statistics, recipe)
    plan, allocation = allocator.fit(bare, 320_000)
    found, how = refine(
        source, statistics, allocator, plan, allocation, budget=320_000, seconds=1.0, cache_bytes=1 << 28
    )
    assert plan_bytes(found, source, statistics) <= 320_000
    assert how.n_generations >= 1
    assert how.after <= how.before


def test_refinement_spends_what_the_allocator_left(source: ModelSource, statistics: Statistics) -> None:
    recipe = Recipe(target_size=300_000, hints=False)
    structure = build_structure(source, statistics, recipe)
    costs = statistics_costs(source, statistics, None, 1, lambda _what, _done, _total: None)
    allocator = TypeAllocator(source, statistics, costs, recipe, structure)
    plan, allocation = allocator.fit(plan_compression(source, statistics, recipe), 300_000)
    found, how = refine(
        source, statistics, allocator, plan, allocation, budget=400_000, seconds=0.0, cache_bytes=1 << 28
    )
    assert how.after < how.before
    assert 390_000 < plan_bytes(found, source, statistics) <= 400_000


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is too large to be tried is planned by what statistics foretell."""
    monkeypatch.setattr("slimoe.converter.budget.compress.make_trial", lambda _source, _statistics: None)


def dispensable(statistics: Statistics, **costs: float) -> Statistics:
    """The statistics as if these parts of all layers cost so little."""
    layers = []
    for layer in statistics.layers:
        assert layer.removals is not None
        layers.append(replace(layer, removals=replace(layer.removals, **costs)))  # type: ignore[arg-type]
    return replace(statistics, layers=tuple(layers))


@pytest.mark.usefixtures("large")
def test_a_budget_may_cost_whole_attentions_but_the_last(source: ModelSource, statistics: Statistics) -> None:
    recipe = Recipe(target_size=320_000, free_layers=True)
    plan = plan_compression(source, dispensable(statistics, attention=1e-12), recipe)
    assert [layer.has_attention for layer in plan.layers].count(True) == 1
    assert plan_bytes(plan, source, statistics) <= 320_000
    kept = plan_compression(source, dispensable(statistics, attention=1e6), recipe)
    assert all(layer.has_attention for layer in kept.layers)
    never = plan_compression(source, dispensable(statistics, attention=1e-12), replace(recipe, free_layers=False))
    assert all(layer.has_attention for layer in never.layers)


@pytest.mark.usefixtures("large")
def test_a_layer_without_anything_left_disappears(source: ModelSource, statistics: Statistics) -> None:
    """One of both layers keeps its attention, and one its experts; if these are one, the other goes."""
    layers = list(dispensable(statistics, attention=1e-12, ffn=1e6).layers)
    assert layers[0].removals is not None
    layers[0] = replace(layers[0], removals=replace(layers[0].removals, ffn=1e-12))
    layers[1] = replace(layers[1], removals=replace(layers[0].removals, ffn=1e6, attention=1e6))
    recipe = Recipe(target_size=320_000, free_layers=True)
    plan = plan_compression(source, replace(statistics, layers=tuple(layers)), recipe)
    assert 0 not in [layer.block for layer in plan.layers]
    assert lay_out(source, plan, statistics).n_bytes <= 320_000


def test_freedoms_that_lose_more_in_a_trial_are_not_used(source: ModelSource, statistics: Statistics) -> None:
    """The statistics say that attention costs nothing, which is not so."""
    recipe = Recipe(target_size=320_000, free_layers=True)
    plan = plan_compression(source, dispensable(statistics, attention=1e-12), recipe)
    assert all(layer.has_attention for layer in plan.layers)


def test_moved_tokens_are_most_of_a_small_loss_and_little_of_a_large_one(source: ModelSource) -> None:
    assert expected_loss(source, 1e-8) > 100 * 1e-8
    assert 0.01 < expected_loss(source, 0.01) < 1.5 * 0.01
    every = hold(random_mixtral(TinyConfig(n_expert=3, n_expert_used=3)))
    assert expected_loss(every, 0.01) == 0.01, "where all experts are selected, no token moves"


@pytest.mark.usefixtures("large")
def test_named_types_have_the_cost_that_was_measured(source: ModelSource, statistics: Statistics) -> None:
    named = StorageRecipe(expert="Q8_0", attention="Q8_0", token="Q8_0", output="Q8_0")
    plan = plan_compression(source, statistics, Recipe(types=named))
    assert plan.uncounted == ()
    costs = stored_costs(statistics, ("Q8_0",))
    assert costs is not None
    second_order = sum(float(one[0]) for one in costs.costs.values())
    assert plan.expected_kl == pytest.approx(expected_loss(source, second_order))
    again = plan_compression(source, replace(statistics, matrix_costs=None), Recipe(types=named))
    assert again.expected_kl == pytest.approx(plan.expected_kl), "what was not kept is measured"
    bare = tuple(replace(layer, sensitivity=None, removals=None) for layer in statistics.layers)
    unknown = plan_compression(source, replace(statistics, matrix_costs=None, layers=bare), Recipe(types=named))
    assert unknown.uncounted == ("types",)


def test_only_what_was_not_measured_is_measured(source: ModelSource, statistics: Statistics) -> None:
    whole = stored_costs(statistics, CANDIDATES)
    assert whole is not None
    eight = stored_costs(statistics, ("Q8_0",))
    assert eight is not None
    some = replace(statistics, matrix_costs=packed_costs(eight))
    said: list[str] = []
    found = statistics_costs(source, some, ("Q8_0", "Q4_0"), 1, lambda what, _done, _total: said.append(what))
    assert set(said) == {"measuring what types cost"}
    for key, ours in found.costs.items():
        np.testing.assert_allclose(ours, [whole.of(key, Type.Q8_0), whole.of(key, Type.Q4_0)])


def test_a_width_that_blocks_do_not_divide_is_refused_at_once(source: ModelSource, statistics: Statistics) -> None:
    width = ExpertRecipe(width=40)
    with pytest.raises(UsageError, match=r"into blocks of 32, .* Keep 32 or 64\.$"):
        plan_compression(source, statistics, Recipe(experts=width, types=StorageRecipe(expert="Q8_0")))


def test_bytes_of_types_are_those_of_ggml(source: ModelSource, statistics: Statistics) -> None:
    plan = plan_compression(source, statistics, Recipe(format="stock", target_size=320_000))
    for tensor in lay_out(source, plan, statistics).tensors:
        n_weights, n_bytes = GGML_QUANT_SIZES[tensor.type]
        assert tensor.n_bytes == int(np.prod(tensor.ne)) // n_weights * n_bytes
