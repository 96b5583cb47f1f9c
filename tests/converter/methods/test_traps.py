"""Mistakes that published implementations of these methods made, each looked for in what a recipe makes of a model."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from slimoe.converter.budget.compress import plan_compression
from slimoe.converter.budget.structure import build_structure
from slimoe.converter.forward.block import read_expert
from slimoe.converter.forward.expert import Expert, Linear
from slimoe.converter.forward.stream import Observer, run
from slimoe.converter.forward.texts import default_texts, read_texts
from slimoe.converter.methods.removal import Removal, attention_removals, block_removals, layer_removals, margin
from slimoe.converter.methods.scores import SCORES
from slimoe.converter.recipe.recipe import ExpertRecipe, Recipe, StorageRecipe
from slimoe.converter.source.model_source import expert_key
from slimoe.converter.stats.statistics import Removals, Statistics
from tests.converter.stats.test_calibrate import Letters
from tests.models.held_model import HeldModel, hold, random_mixtral
from tests.models.naive_layer import SIZES, TEXTS, learn, naive_layer

EVERY = range(SIZES.n_expert)
WIDTH = 24
F32 = StorageRecipe(expert="F32", attention="F32", token="F32", output="F32")


@pytest.fixture(scope="module")
def model() -> HeldModel:
    """Each layer's experts do hardly anything, the last one's least: their streams turn by a thousandth or so."""
    held = hold(random_mixtral(SIZES, spread=0.2))
    keys = {expert_key(layer, "down", e): 2e-3 / (1 + layer) for layer in range(SIZES.n_layer) for e in EVERY}
    norms = {key: held.matrices[key] / np.linalg.norm(held.matrices[key]) for key in keys}
    return held.changed({key: (size * norms[key]).astype(np.float32) for key, size in keys.items()})


@pytest.fixture(scope="module")
def statistics(model: HeldModel, tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    return learn(model, tmp_path_factory.mktemp("pass"))


class _Streams(Observer):
    """Every layer's stream: what comes in, what stands between its two parts, and what goes out."""

    def __init__(self) -> None:
        self.seen: dict[int, list[torch.Tensor]] = {}

    def block(self, layer: int, first_row: int, h: torch.Tensor, middle: torch.Tensor, after: torch.Tensor) -> None:
        self.seen.setdefault(layer, []).append(torch.stack((h, middle, after)).double())


def cosines(one: torch.Tensor, other: torch.Tensor) -> float:
    """The mean over tokens, in double precision."""
    products = [float(a @ b / (a.norm() * b.norm())) for a, b in zip(one, other, strict=True)]
    return float(np.mean(products))


def found(removals: tuple[Removal, ...]) -> dict[int, float]:
    return {one.layer: one.similarity for one in removals}


def test_every_parts_cosine_is_between_the_streams_on_its_own_two_sides(
    model: HeldModel, statistics: Statistics
) -> None:
    """Not those one layer off, nor those of the part's own input and output."""
    streams = _Streams()
    end = run(model, TEXTS, streams)
    h, middle, after = zip(*(torch.cat(streams.seen[n], 1) for n in range(SIZES.n_layer)), strict=True)
    for n, following in enumerate((*h[1:], end.double())):
        assert torch.equal(after[n], following)
        assert found(block_removals(statistics, model.layers))[n] == pytest.approx(cosines(h[n], following), abs=1e-10)
        attention = found(attention_removals(statistics, model.layers))[n]
        assert attention == pytest.approx(cosines(h[n], middle[n]), abs=1e-10)
        ffn = found(layer_removals(statistics, model.layers))[n]
        assert ffn == pytest.approx(cosines(middle[n], following), abs=1e-10)


def test_cosines_that_are_nearly_the_same_are_told_apart(model: HeldModel, statistics: Statistics) -> None:
    """In half precision all of them would be 1."""
    removals = layer_removals(statistics, model.layers)
    assert [one.layer for one in removals] == [2, 1, 0]
    assert all(1 - 1e-5 < one.similarity < 1 for one in removals)
    assert all(0 < margin(removals, n) < 1e-5 for n in (1, 2))


@pytest.mark.parametrize("name", SCORES)
def test_what_is_kept_is_worth_more_than_what_goes(model: HeldModel, statistics: Statistics, name: str) -> None:
    """With the backward pass's losses, which one score needs, put in by hand."""
    losses = Removals(0.1, 0.2, 0.3, skipped=np.array([0.5, 0.1, 0.4, 0.2, 0.3]), novice=np.zeros(5))
    statistics = replace(statistics, layers=tuple(replace(layer, removals=losses) for layer in statistics.layers))
    structure = build_structure(model, statistics, Recipe(experts=ExpertRecipe(keep=3, score=name)))
    for layer in structure.layers:
        scores = SCORES[name](statistics.layers[layer.block], EVERY)
        kept = [member for expert in layer.experts for member in expert.members]
        assert len(kept) == 3
        assert min(scores[kept]) > max(np.delete(scores, kept))


def test_a_narrower_experts_down_matrix_is_fitted_to_what_it_reads(model: HeldModel, statistics: Statistics) -> None:
    """The products of its own inputs, not of the other matrices'; and the fit is what the plan holds."""
    plan = plan_compression(model, statistics, Recipe(experts=ExpertRecipe(width=WIDTH), types=F32))
    for layer in plan.layers:
        naive = naive_layer(model, layer.block)
        x = torch.from_numpy(naive.x).float()
        for expert, planned in enumerate(layer.experts):
            assert planned.kept is not None
            assert planned.down is not None
            whole = read_expert(model, layer.block, expert)
            kept = torch.from_numpy(planned.kept)
            columns = whole.down.weight[:, kept]
            fitted = torch.from_numpy(planned.down)
            assert not torch.equal(fitted, columns)
            own = x[torch.from_numpy(naive.by_expert()[:, expert] > 0)]
            errors = []
            for down in (columns, fitted):
                narrow = Expert.of([*(Linear(one.weight[kept]) for one in whole.inner), Linear(down)])
                errors.append(float((narrow(own) - whole(own)).square().sum()))
            assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("keep", [2, 3, 4, 5])
def test_attention_keeps_its_types_however_many_experts_stay(
    model: HeldModel, statistics: Statistics, keep: int
) -> None:
    types = StorageRecipe(expert="Q4_0", attention="Q8_0", token="Q8_0", output="Q8_0")
    plan = plan_compression(model, statistics, Recipe(format="stock", experts=ExpertRecipe(keep=keep), types=types))
    assert {len(layer.experts) for layer in plan.layers} == {keep}
    assert {kind.name for layer in plan.layers for kind in layer.types.values()} == {"Q8_0"}


def test_statistics_are_not_of_web_pages_alone(tmp_path: Path) -> None:
    text = read_texts(default_texts(), Letters(), 10**6, 512)
    domains = set(text.domains)
    assert {"chat", "python", "maths"} <= domains
    assert max(map(text.domains.count, domains)) < 0.5 * len(text.domains)
    conversations = [domain for tokens, domain in zip(text.tokens, text.domains, strict=True) if tokens[0] == 2]
    assert set(conversations) == {"chat"}
