"""What a trial says of a plan, against the file that is made of it."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from slimoe.converter.budget.compress import plan_compression
from slimoe.converter.budget.planned_source import FittedMatrices, PlannedSource
from slimoe.converter.budget.trial import NoisyMatrices, Trial, make_trial, trial_tokens
from slimoe.converter.forward.windows import cut_windows
from slimoe.converter.layout.layer import source_matrix
from slimoe.converter.recipe.recipe import ExpertRecipe, Recipe, StorageRecipe
from slimoe.converter.report.evaluation import Reference
from slimoe.converter.report.quality import summarise
from slimoe.converter.source.model_source import ModelSource, block_key
from slimoe.converter.stats.statistics import Statistics
from slimoe.converter.stats.type_costs import CANDIDATES, matrix_weights, stored_costs
from slimoe.converter.write.quantiser import PlainQuantiser, statistics_importance
from tests.models.compress_plans import learnt

F32 = StorageRecipe(expert="F32", attention="F32", token="F32", output="F32")
PLANS = {
    "types": Recipe(types=StorageRecipe(expert="Q4_0", attention="Q5_0", token="Q8_0", output="Q8_0")),
    "few bits": Recipe(types=StorageRecipe(expert="IQ4_NL", attention="Q4_0", token="Q4_0", output="Q4_0")),
    "a part": Recipe(drop_ffn=1, types=F32),
    "experts": Recipe(experts=ExpertRecipe(keep=4), types=F32),
    "constants": Recipe(experts=ExpertRecipe(keep=4, replacement="constant"), types=F32),
    "merged": Recipe(experts=ExpertRecipe(keep=3, merge="neurons"), types=F32),
    "narrow": Recipe(experts=ExpertRecipe(width=32), types=F32),
    "main experts": Recipe(experts=ExpertRecipe(main=2), types=F32),
    "both": Recipe(experts=ExpertRecipe(width=64), types=StorageRecipe(expert="Q4_0", attention="Q4_0")),
}


@pytest.fixture(scope="module")
def statistics(source: ModelSource, tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    return learnt(source, tmp_path_factory.mktemp("trying"), n_sequences=12)


@pytest.mark.parametrize("name", PLANS)
def test_what_is_expected_is_what_is_measured(source: ModelSource, statistics: Statistics, name: str) -> None:
    plan = plan_compression(source, statistics, PLANS[name])
    assert not plan.uncounted
    texts = {str(n): tokens for n, tokens in enumerate(statistics.tokens)}
    reference = Reference(source, cut_windows(texts, length=48))
    fitted = FittedMatrices(source, PlainQuantiser(statistics_importance(statistics, is_tied=False)), 1 << 28)
    measured = summarise(reference.compare(PlannedSource(source, plan, fitted))).total.divergence.mean
    assert plan.expected_kl == pytest.approx(measured, rel=0.25)


def test_a_model_as_it_is_loses_nothing(source: ModelSource, statistics: Statistics) -> None:
    plan = plan_compression(source, statistics, Recipe(types=F32))
    assert plan.expected_kl == pytest.approx(0.0, abs=1e-6)


def test_noise_costs_what_the_type_is_priced_at_and_is_the_same_each_time(
    source: ModelSource, statistics: Statistics
) -> None:
    costs = stored_costs(statistics, CANDIDATES)
    assert costs is not None
    noisy = NoisyMatrices(source, statistics, costs)
    for kind in (Type.Q4_0, Type.Q8_0):
        found, wanted = 0.0, 0.0
        for layer in range(source.spec.n_layer):
            for role in ("attn_q", "attn_k", "attn_v", "attn_output"):
                key = block_key(layer, role)
                values, weights = (
                    noisy.read(source_matrix(source, key, key.name, kind)),
                    matrix_weights(source, statistics, key),
                )
                error = np.square(values.astype(np.float64) - source.read(key))
                found += 0.5 * float(weights.rows @ error @ weights.columns)
                wanted += costs.of(key, kind)
        assert found == pytest.approx(wanted, rel=0.1)
    key = block_key(0, "attn_q")
    matrix = source_matrix(source, key, key.name, Type.Q4_0)
    np.testing.assert_array_equal(noisy.read(matrix), noisy.read(matrix))
    exact = source_matrix(source, key, key.name, Type.F16)
    np.testing.assert_array_equal(noisy.read(exact), source.read(key))


def test_large_models_are_not_tried(
    source: ModelSource, statistics: Statistics, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(make_trial(source, statistics), Trial)
    assert make_trial(source, None) is None
    assert trial_tokens(source) > 0
    large = {key: (1 << 22, *shape[1:]) for key, shape in source.shapes.items()}
    monkeypatch.setattr(type(source), "shapes", property(lambda _self: large), raising=False)
    assert trial_tokens(source) == 0
