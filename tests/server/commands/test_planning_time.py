"""What is told of the time that planning takes, before it begins."""

import re
from pathlib import Path

import pytest

from slimoe.converter.budget.compress import plan_compression
from slimoe.converter.recipe.recipe import ExpertRecipe, Recipe, StorageRecipe
from slimoe.converter.source.model_source import ModelSource
from slimoe.converter.source.open_source import open_source
from slimoe.converter.stats.statistics import Statistics
from slimoe.converter.stats.statistics_file import save_statistics
from slimoe.server.cli import run
from slimoe.server.jobs.planning_time import planning_seconds
from tests.models.compress_plans import learnt

RECIPES = {
    "a size": Recipe(target_bpw=9.0),
    "a stock size": Recipe(format="stock", target_bpw=9.0),
    "types without a price": Recipe(types=StorageRecipe(candidates=("Q4_1", "Q8_0")), target_bpw=9.0),
    "types by name": Recipe(types=StorageRecipe(expert="Q8_0", attention="Q8_0")),
    "a width": Recipe(experts=ExpertRecipe(width=64), types=StorageRecipe(expert="Q8_0")),
    "main experts": Recipe(experts=ExpertRecipe(main=2), types=StorageRecipe(expert="Q8_0")),
}


@pytest.fixture(scope="module")
def source(moe_checkpoint: Path) -> ModelSource:
    return open_source(moe_checkpoint)


@pytest.fixture(scope="module")
def statistics(source: ModelSource, tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    return learnt(source, tmp_path_factory.mktemp("time"), n_sequences=12)


@pytest.mark.parametrize("name", RECIPES)
def test_every_step_that_is_made_is_told(source: ModelSource, statistics: Statistics, name: str) -> None:
    """By the name that its progress has; a size may turn out to need no narrower experts."""
    made = set[str]()
    plan_compression(source, statistics, RECIPES[name], on_progress=lambda what, *_: made.add(what))
    told = planning_seconds(source, statistics, RECIPES[name], 1, little_work=0)
    assert made <= told.keys()
    assert told.keys() - made <= ({"trimming experts"} if "size" in name or "price" in name else set())
    assert min(told.values()) > 0


def test_it_is_told_before_anything_else_and_not_of_what_takes_moments(
    source: ModelSource,
    statistics: Statistics,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save_statistics(statistics, tmp_path / "a.stats")
    plan = ["plan", str(source.path), "--stats", str(tmp_path / "a.stats"), "--target-bpw", "9"]
    assert run(plan) == 0
    assert "Planning takes" not in capsys.readouterr().err
    monkeypatch.setattr("slimoe.server.jobs.planning_time.LITTLE_WORK", 0)
    assert run(plan) == 0
    first = capsys.readouterr().err.splitlines()[0]
    assert re.fullmatch(
        r"Planning takes up to about \d+ s: trimming experts \d+ s, trying what it loses \d+ s\.", first
    )
