"""Compressed experts as a plan and a file: torch and the written file say the same, and what cannot be is refused."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from slimoe.converter.budget.compress import plan_compression
from slimoe.converter.budget.compressed_experts import CompressedSource, fit_compressed_experts
from slimoe.converter.forward.expert import AuxVectors
from slimoe.converter.forward.stream import Observer, Sequences, final_logits, run
from slimoe.converter.layout.offsets import plan_bytes
from slimoe.converter.recipe.recipe import ExpertRecipe, Recipe, StorageRecipe
from slimoe.converter.source.gguf_source import gguf_source
from slimoe.converter.source.model_source import ModelSource
from slimoe.converter.stats.statistics import Statistics
from slimoe.converter.write.writer import write_planned
from slimoe.offload.errors import UnsupportedModelError, UsageError
from tests.models.compress_plans import learnt, random_sequences
from tests.models.held_model import HeldModel
from tests.models.naive_layer import SIZES, TEXTS, biased_model, divergence, logits, naive_layer, random_texts

WHOLE = StorageRecipe("F32", attention="F32", token="F32", output="F32")


class Watch(Observer):
    """Keeps what the first layer's experts add."""

    def __init__(self) -> None:
        self.found: list[torch.Tensor] = []

    def block(self, layer: int, first_row: int, h: torch.Tensor, middle: torch.Tensor, after: torch.Tensor) -> None:
        if layer == 0:
            self.found.append(after.double() - middle.double())


@pytest.fixture(scope="module")
def statistics(source: ModelSource, tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    return learnt(source, tmp_path_factory.mktemp("compressed"))


def of_fewer(model: HeldModel, n_used: int) -> HeldModel:
    """The model whose tokens select fewer experts."""
    return replace(model, spec=replace(model.spec, experts=replace(model.spec.experts, n_expert_used=n_used)))


def random_vectors(n_row: int, n_embd: int, blocks: Sequence[int]) -> dict[int, AuxVectors]:
    torch.manual_seed(3)
    return {block: AuxVectors(*(0.3 * torch.randn(n_row, n_embd) for _ in range(2))) for block in blocks}


def test_zeros_are_plain_routing_to_fewer_experts_to_the_last_bit() -> None:
    model = biased_model()
    found = run(CompressedSource(model, 1), TEXTS)
    torch.testing.assert_close(found, run(of_fewer(model, 1), TEXTS), atol=0, rtol=0)


def test_a_layer_computes_the_formulas_token_by_token() -> None:
    model = biased_model(replace(SIZES, n_expert_used=3))
    vectors = random_vectors(5, SIZES.n_embd, [0])
    whole = naive_layer(model, 0)
    watch = Watch()
    run(CompressedSource(model, 1, vectors), TEXTS, watch)
    found = torch.cat(watch.found).numpy()
    for n, (rows, weights) in enumerate(zip(whole.selected, whole.weights, strict=True)):
        gain, shift = (part.double().numpy() for part in (vectors[0].gain, vectors[0].shift))
        theirs = weights[1:] / weights[0]  # The main expert's weight is 1, as this model scales weights to that sum.
        theta = 1 + (theirs / theirs.sum()) @ gain[rows[1:]]
        expected = whole.outputs[n, rows[0]] * theta + theirs @ shift[rows[1:]]
        np.testing.assert_allclose(found[n], expected, atol=1e-4)


def test_fitted_vectors_bring_a_model_nearer_to_its_source() -> None:
    model, others = biased_model(), random_texts(SIZES.n_vocab, 60, 50)
    texts = random_texts(SIZES.n_vocab, *[64] * 8)
    fitted = fit_compressed_experts(model, texts.tokens, 1)
    assert all(one.after < one.before for one in fitted.layers.values())
    expected = logits(model, others)
    plain, ours = (
        final_logits(model, run(CompressedSource(model, 1, vectors), others)) for vectors in ({}, fitted.vectors)
    )
    assert divergence(expected, ours) < 0.8 * divergence(expected, plain)


def test_a_written_file_is_the_plan_and_runs_alike_in_torch(
    source: ModelSource, statistics: Statistics, tmp_path: Path
) -> None:
    recipe = Recipe(experts=ExpertRecipe(main=1), types=WHOLE)
    plan = plan_compression(source, statistics, recipe)
    path = tmp_path / "m.gguf"
    report = write_planned(source, plan, path, statistics)
    assert report.n_bytes == path.stat().st_size == plan_bytes(plan, source, statistics)
    written = gguf_source(path)
    assert (written.spec.n_expert_used, written.spec.n_expert_selected) == (1, source.spec.n_expert_used)
    texts = Sequences(random_sequences(2, 24, source.spec.n_vocab, seed=5))
    vectors = {
        n: AuxVectors(torch.from_numpy(layer.aux.gain), torch.from_numpy(layer.aux.shift))
        for n, layer in enumerate(plan.layers)
        if layer.aux is not None
    }
    assert len(vectors) == source.spec.n_layer
    torch.testing.assert_close(run(written, texts), run(CompressedSource(source, 1, vectors), texts))
    uses = [sum(layer.hints["use"]) for layer in plan.layers]  # type: ignore[call-overload]
    np.testing.assert_allclose(uses, 1.0)
    with pytest.raises(UnsupportedModelError, match="has compressed experts, fitted to the weights that it has"):
        plan_bytes(plan_compression(written, None, Recipe(types=WHOLE)), written)


def test_a_size_is_met(source: ModelSource, statistics: Statistics, tmp_path: Path) -> None:
    plan = plan_compression(source, statistics, Recipe(experts=ExpertRecipe(main=2), target_size=400_000))
    assert write_planned(source, plan, tmp_path / "m.gguf", statistics).n_bytes <= 400_000
    assert plan.uncounted == ()
    assert (plan.expected_kl or 0.0) > 0


def test_what_cannot_be_compressed_is_refused(source: ModelSource, statistics: Statistics) -> None:
    recipe = Recipe(experts=ExpertRecipe(main=3), types=WHOLE)
    with pytest.raises(UsageError, match=r"selects 3 experts, of which 3 main experts leave none.* Choose 1 to 2"):
        plan_compression(source, statistics, recipe)
    with pytest.raises(UsageError, match="Run slimoe calibrate"):
        plan_compression(source, None, replace(recipe, experts=ExpertRecipe(main=1)))
    one = of_fewer(biased_model(), 1)
    with pytest.raises(UnsupportedModelError, match="a token selects 1 expert, which leaves none to compress"):
        plan_compression(one, None, replace(recipe, experts=ExpertRecipe(main=1)))
