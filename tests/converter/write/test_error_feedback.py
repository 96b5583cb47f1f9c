"""What later matrices make up for of what quantising earlier ones did to the stream."""

from pathlib import Path

import pytest
import torch

from slimoe.converter.budget.compress import plan_compression
from slimoe.converter.forward.stream import Sequences, run
from slimoe.converter.layout.plan import CompressPlan
from slimoe.converter.recipe.recipe import FitRecipe, Recipe, StorageRecipe
from slimoe.converter.source.model_source import ModelSource
from slimoe.converter.source.open_source import open_source
from slimoe.converter.stats.statistics import Statistics
from slimoe.converter.write.writer import chosen_quantiser, write_planned
from tests.models.compress_plans import learnt


@pytest.fixture(scope="module")
def source(moe_checkpoint: Path) -> ModelSource:
    """Two layers of 6 experts, top 3, n_embd 64, n_ff 96."""
    return open_source(moe_checkpoint)


@pytest.fixture(scope="module")
def statistics(source: ModelSource, tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    return learnt(source, tmp_path_factory.mktemp("learnt"), n_sequences=32, length=32)


def planned(source: ModelSource, statistics: Statistics, *, feedback: bool, token: str) -> CompressPlan:
    types = StorageRecipe("Q8_0", attention="Q8_0", token=token, output="Q8_0")
    return plan_compression(source, statistics, Recipe(types=types, fit=FitRecipe(feedback=feedback), hints=False))


def drift(source: ModelSource, statistics: Statistics, plan: CompressPlan, path: Path) -> float:
    """How far a file's stream is from the source's behind the last layer, on the calibration's tokens."""
    write_planned(source, plan, path, statistics, quantiser=chosen_quantiser(source, plan, statistics, 1))
    sequences = Sequences(statistics.tokens)
    return float((run(open_source(path), sequences) - run(source, sequences)).square().mean())


def test_later_matrices_make_up_for_a_coarse_token_table(
    source: ModelSource, statistics: Statistics, tmp_path: Path
) -> None:
    """Feedback cannot help the table itself, and eight bits leave no other error to speak of."""
    with_it, without = (
        drift(source, statistics, planned(source, statistics, feedback=one, token="Q4_0"), tmp_path / f"{one}.gguf")
        for one in (True, False)
    )
    assert with_it < 0.9 * without


def test_matrices_stay_where_nothing_has_drifted(source: ModelSource, statistics: Statistics, tmp_path: Path) -> None:
    plan = planned(source, statistics, feedback=True, token="F32")
    path = tmp_path / "m.gguf"
    write_planned(source, plan, path, statistics, quantiser=chosen_quantiser(source, plan, statistics, 1))
    made = open_source(path)
    key = next(key for key in source.shapes if key.name == "blk.0.attn_q.weight")
    weight = torch.from_numpy(source.read(key))
    assert float((torch.from_numpy(made.read(key)) - weight).abs().max()) < 2 * float(weight.abs().max()) / 127
