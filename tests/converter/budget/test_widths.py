"""Narrower experts in a budget: where neurons say the same, they go before bits do."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from slimoe.converter.budget.compress import plan_compression
from slimoe.converter.budget.planned_source import FittedMatrices, PlannedSource
from slimoe.converter.budget.trial import Trial
from slimoe.converter.forward.windows import cut_windows
from slimoe.converter.layout.offsets import lay_out, plan_bytes
from slimoe.converter.layout.plan import CompressPlan
from slimoe.converter.recipe.recipe import ExpertRecipe, Recipe, StorageRecipe
from slimoe.converter.report.evaluation import Reference
from slimoe.converter.report.quality import summarise
from slimoe.converter.source.model_source import MatrixKey, expert_key
from slimoe.converter.stats.statistics import Statistics
from slimoe.converter.write.quantiser import PlainQuantiser, statistics_importance
from slimoe.offload.errors import UnsupportedModelError, UsageError
from tests.models.compress_plans import learnt
from tests.models.held_model import HeldModel, hold, random_mixtral
from tests.models.tiny_checkpoint import TinyConfig

SIZES = TinyConfig(n_ff=128, n_expert=4, n_expert_used=2)
TYPES = StorageRecipe(candidates=("Q4_0", "Q5_0", "Q8_0"))


@pytest.fixture(scope="module")
def redundant() -> HeldModel:
    """A model whose experts have every neuron twice."""
    model = hold(random_mixtral(SIZES))
    changed: dict[MatrixKey, np.ndarray] = {}
    for layer in range(SIZES.n_layer):
        for expert in range(SIZES.n_expert):
            for name in ("gate", "up"):
                key = expert_key(layer, name, expert)
                half = model.matrices[key][: SIZES.n_ff // 2]
                changed[key] = np.concatenate([half, half])
    return model.changed(changed)


@pytest.fixture(scope="module")
def statistics(redundant: HeldModel, tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    return learnt(redundant, tmp_path_factory.mktemp("narrowing"))


def widths(plan: CompressPlan) -> list[int]:
    return [SIZES.n_ff if one.kept is None else len(one.kept) for layer in plan.layers for one in layer.experts]


def measured(model: HeldModel, statistics: Statistics, plans: Sequence[CompressPlan]) -> list[float]:
    texts = {str(n): tokens for n, tokens in enumerate(statistics.tokens)}
    reference = Reference(model, cut_windows(texts, length=48))
    fitted = FittedMatrices(model, PlainQuantiser(statistics_importance(statistics, is_tied=False)), 1 << 28)
    made = [PlannedSource(model, plan, fitted) for plan in plans]
    return [summarise(reference.compare(one)).total.divergence.mean for one in made]


@pytest.mark.parametrize("kind", ["stock", "native"])
def test_what_is_said_twice_goes_before_bits_do(redundant: HeldModel, statistics: Statistics, kind: str) -> None:
    size = plan_bytes(plan_compression(redundant, statistics, Recipe(types=StorageRecipe(expert="Q4_0"))), redundant)
    recipe = Recipe(format=kind, target_size=size, types=TYPES, hints=False)  # type: ignore[arg-type]
    whole = replace(recipe, experts=ExpertRecipe(width=SIZES.n_ff))
    narrow, wide = (plan_compression(redundant, statistics, one) for one in (recipe, whole))
    assert set(widths(wide)) == {SIZES.n_ff}, "a width that is named is kept"
    assert max(widths(narrow)) == 64
    assert all(one.down is not None and one.down.shape[1] == 64 for layer in narrow.layers for one in layer.experts)
    assert plan_bytes(narrow, redundant, statistics) <= size
    ours, theirs = measured(redundant, statistics, [narrow, wide])
    assert ours < 0.5 * theirs
    assert narrow.expected_kl == pytest.approx(ours, rel=0.25)


def test_neurons_that_all_matter_stay(tmp_path: Path) -> None:
    model = hold(random_mixtral(SIZES))
    found = learnt(model, tmp_path)
    plan = plan_compression(model, found, Recipe(target_bpw=9.0, types=TYPES, hints=False))
    assert set(widths(plan)) == {SIZES.n_ff}


def test_a_choice_that_loses_more_in_a_trial_is_not_made(
    redundant: HeldModel, statistics: Statistics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where statistics foretell too little of what narrower experts cost."""
    tried: list[int] = []

    def divergence(_self: Trial, plan: CompressPlan, _costs: object) -> float:
        tried.append(min(widths(plan)))
        return 1.0 if min(widths(plan)) < SIZES.n_ff else 0.5

    monkeypatch.setattr(Trial, "divergence", divergence)
    plan = plan_compression(redundant, statistics, Recipe(target_bpw=6.0, types=TYPES, hints=False))
    assert set(widths(plan)) == {SIZES.n_ff}
    assert 64 in tried
    assert plan.expected_kl == 0.5


def test_statistics_of_an_earlier_version_narrow_nothing(redundant: HeldModel, statistics: Statistics) -> None:
    before = replace(statistics, layers=tuple(replace(layer, widths=None) for layer in statistics.layers))
    plan = plan_compression(redundant, before, Recipe(target_bpw=6.0, types=TYPES, hints=False))
    assert set(widths(plan)) == {SIZES.n_ff}


def test_a_width_that_some_experts_do_not_have_is_refused_with_the_layer(
    redundant: HeldModel, statistics: Statistics
) -> None:
    gate, up, down = (expert_key(1, name, 0) for name in ("gate", "up", "down"))
    found = redundant.matrices
    narrow = redundant.changed({gate: found[gate][:16], up: found[up][:16], down: found[down][:, :16]})
    with pytest.raises(UsageError, match="--width is 32, but experts of layer 1 have 16 neurons"):
        plan_compression(narrow, statistics, Recipe(experts=ExpertRecipe(width=32)))


def test_experts_of_several_widths_become_stock_by_the_advice_of_the_refusal(
    redundant: HeldModel, tmp_path: Path
) -> None:
    gate, up, down = (expert_key(1, name, 0) for name in ("gate", "up", "down"))
    found, types = redundant.matrices, StorageRecipe(expert="Q8_0", attention="Q8_0")
    narrow = redundant.changed({gate: found[gate][:64], up: found[up][:64], down: found[down][:, :64]})
    statistics = learnt(narrow, tmp_path)
    with pytest.raises(
        UnsupportedModelError, match=r"layer 1 would .* 64 neurons, .* layer 0 have 128, .* --width 64 "
    ):
        plan_bytes(plan_compression(narrow, statistics, Recipe(format="stock", types=types)), narrow, statistics)
    advised = Recipe(format="stock", types=types, experts=ExpertRecipe(width=64))
    plan = plan_compression(narrow, statistics, advised)
    assert lay_out(narrow, plan, statistics).spec.n_ff == 64
