"""The same model in plain types at as many bytes: which are taken, what they lose, and what lies between them."""

from dataclasses import replace
from pathlib import Path

import pytest

from slimoe.converter.report.evaluation import evaluate
from slimoe.converter.report.yardstick import PlainModel, kl_at, make_yardstick, plain_neighbours, planned_source
from slimoe.converter.source.model_source import ModelSource
from slimoe.converter.source.open_source import open_source
from slimoe.converter.stats.statistics import Statistics
from slimoe.server.cli import run


@pytest.fixture(scope="module")
def converted(moe_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What `slimoe convert --type` makes of it."""
    directory = tmp_path_factory.mktemp("plain")
    made = {name: directory / f"{name}.gguf" for name in ("Q8_0", "F16")}
    for name, path in made.items():
        assert run(["convert", str(moe_checkpoint), str(path), "--type", name, "--threads", "1"]) == 0
    return made


def test_the_nearest_types_stand_on_both_sides(source: ModelSource, converted: dict[str, Path]) -> None:
    small, large = (converted[name].stat().st_size for name in ("Q8_0", "F16"))
    found = plain_neighbours(source, None, (small + large) // 2)
    assert found[0].type == "Q8_0"
    assert found[1].type in ("F16", "BF16")
    for one, n_bytes in zip(found, (small, large), strict=True):
        assert one.n_bytes == pytest.approx(n_bytes, rel=0.02), "but for what the headers tell"
    below, above = (plain_neighbours(source, None, n_bytes) for n_bytes in (1000, 100 * large))
    assert [one.type for one in below] == ["Q4_0"], "the smallest whose blocks divide these rows"
    assert [one.type for one in above] == ["F32"]


def test_what_is_measured_is_what_a_converted_file_loses(source: ModelSource, converted: dict[str, Path]) -> None:
    texts = {"a": list(range(3, 131))}
    plan = plain_neighbours(source, None, converted["Q8_0"].stat().st_size + 20_000)[0]
    assert plan.type == "Q8_0"
    made = evaluate(open_source(converted["Q8_0"]), source, texts, length=64)
    planned = evaluate(planned_source(source, None, plan.plan, 1), source, texts, length=64)
    assert planned.total.divergence.mean == pytest.approx(made.total.divergence.mean, rel=1e-4)


def test_statistics_foretell_it(source: ModelSource, statistics: Statistics, converted: dict[str, Path]) -> None:
    n_bytes = (converted["Q8_0"].stat().st_size + converted["F16"].stat().st_size) // 2
    plans = plain_neighbours(source, statistics, n_bytes)
    found = make_yardstick(plans, n_bytes, None)
    assert found is not None
    first, second = found.models
    assert first.expected_kl is not None
    assert found.kl is not None
    assert (second.expected_kl, found.is_measured, first.measured_kl) == (0.0, False, None)
    assert 0 < found.kl < first.expected_kl
    unknown = make_yardstick(plain_neighbours(source, None, n_bytes), n_bytes, None)
    assert unknown is not None
    assert unknown.kl is None


def test_between_two_models_the_logarithm_is_a_line() -> None:
    models = PlainModel("Q2_K", 100, 9.0, 1.0), PlainModel("Q4_K", 200, 9.0, 0.01)
    assert kl_at(models, 150) == pytest.approx(0.1)
    assert kl_at(models, 100) == pytest.approx(1.0)
    assert kl_at(models[:1], 150) == 1.0, "at as many bytes or fewer"
    assert kl_at(models[1:], 150) is None, "no plain type is so small"
    assert kl_at((models[0], replace(models[1], expected_kl=None, measured_kl=None)), 150) == 1.0
