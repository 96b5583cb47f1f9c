"""Compressing a model of which some matrices have rows that the blocks of K-types do not divide."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader

from slimoe.converter.budget import compress as slimming
from slimoe.converter.budget.compress import plan_compression
from slimoe.converter.budget.named_types import NamedTypes
from slimoe.converter.layout.offsets import lay_out, plan_bytes
from slimoe.converter.layout.plan import CompressPlan, Format
from slimoe.converter.quant.unfit_types import check_fits, typed, unfit_counts
from slimoe.converter.recipe.recipe import ExpertRecipe, Recipe, StorageRecipe
from slimoe.converter.report.yardstick import plain_neighbours
from slimoe.converter.source.model_source import ModelSource
from slimoe.converter.source.open_source import open_source
from slimoe.converter.stats import type_costs
from slimoe.converter.stats.statistics import Statistics
from slimoe.converter.write.writer import write_planned
from slimoe.offload.errors import UnsupportedModelError, UsageError
from slimoe.server.cli import run
from tests.models.compress_plans import learnt
from tests.models.tiny_checkpoint import TinyConfig, save_checkpoint

SMALL = {Type.IQ4_NL, Type.Q4_0, Type.Q5_0, Type.Q8_0, Type.F16}
"""What rows of 384 can have of all that the allocator chooses from."""


@pytest.fixture(scope="module", autouse=True)
def quick_types() -> Iterator[None]:
    """The codebooks of 1 and 2 bits, whose blocks are those of the other types of 256, take seconds to start."""
    with pytest.MonkeyPatch.context() as patch:
        quick = tuple(name for name in type_costs.CANDIDATES if not name.startswith(("IQ1", "IQ2")))
        for module in (slimming, type_costs):
            patch.setattr(module, "CANDIDATES", quick)
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, sentencepiece_path: Path) -> Path:
    """Rows of 256, but for those of the experts' down: they are of 384."""
    sizes = TinyConfig(n_layer=2, n_embd=256, n_ff=384, n_expert=4, n_expert_used=2)
    return save_checkpoint(tmp_path_factory.mktemp("odd") / "c", sentencepiece_path, sizes)


@pytest.fixture(scope="module")
def source(checkpoint: Path) -> ModelSource:
    return open_source(checkpoint)


@pytest.fixture(scope="module")
def statistics(source: ModelSource, tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    return learnt(source, tmp_path_factory.mktemp("learnt"))


def types_of(path: Path, part: str) -> set[Type]:
    return {Type(tensor.tensor_type) for tensor in GGUFReader(path).tensors if f"{part}_exps" in tensor.name}


def counts(
    source: ModelSource, recipe: Recipe, plan: CompressPlan, statistics: Statistics | None = None
) -> dict[str, int]:
    layout = lay_out(source, plan, statistics)
    return unfit_counts(NamedTypes(source, recipe, len(plan.layers)).typed(layout))


def test_a_named_type_falls_back_and_is_told(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, target, plain = tmp_path / "r.toml", tmp_path / "m.gguf", tmp_path / "plain.gguf"
    recipe.write_text('format = "stock"\n[types]\nexpert = "Q4_K"\n')
    assert run(["convert", str(checkpoint), str(target), "--recipe", str(recipe), "--no-report", "--json"]) == 0
    captured = capsys.readouterr()
    assert types_of(target, "down") == {Type.Q5_0}
    assert types_of(target, "gate") == types_of(target, "up") == {Type.Q4_K}
    assert json.loads(captured.out)["unfit_types"] == {"Q4_K to Q5_0": 2}
    told = "2 of 23 tensors, such as blk.0.ffn_down_exps.weight, have rows of 384, which Q4_K does not divide"
    assert f"{told}: Q5_0 in its place" in captured.err
    assert run(["convert", str(checkpoint), str(plain), "--type", "Q4_K"]) == 0
    assert {t.name: t.tensor_type for t in GGUFReader(plain).tensors} == {
        t.name: t.tensor_type for t in GGUFReader(target).tensors
    }


def test_second_copies_fall_back_too(source: ModelSource, statistics: Statistics, tmp_path: Path) -> None:
    recipe = Recipe(types=StorageRecipe(expert="Q4_K", low="Q2_K"))
    plan = plan_compression(source, statistics, recipe)
    write_planned(source, plan, tmp_path / "m.gguf", statistics)
    assert types_of(tmp_path / "m.gguf", "down") == {Type.Q5_0, Type.IQ4_NL}
    assert types_of(tmp_path / "m.gguf", "gate") == {Type.Q4_K, Type.Q2_K}
    assert counts(source, recipe, plan, statistics) == {"Q4_K to Q5_0": 2, "Q2_K to IQ4_NL": 2}
    errors = plan.layers[0].hints["error"]
    assert isinstance(errors, tuple)
    assert all(0 < best < low for best, low in errors)


@pytest.mark.parametrize("form", ["stock", "native"])
def test_a_size_chooses_from_what_fits_each_matrix(
    source: ModelSource, statistics: Statistics, tmp_path: Path, form: Format
) -> None:
    recipe = Recipe(format=form, target_bpw=4.6)
    plan = plan_compression(source, statistics, recipe)
    report = write_planned(source, plan, tmp_path / "m.gguf", statistics)
    n_weights = sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in source.shapes.values())
    assert 8 * report.n_bytes <= 4.6 * n_weights
    assert types_of(tmp_path / "m.gguf", "down") <= SMALL
    assert not types_of(tmp_path / "m.gguf", "gate") & SMALL
    assert counts(source, recipe, plan, statistics) == {}


@pytest.mark.parametrize("form", ["stock", "native"])
def test_types_to_choose_from_fall_back(source: ModelSource, statistics: Statistics, form: Format) -> None:
    recipe = Recipe(format=form, target_bpw=5.0, types=StorageRecipe(candidates=("Q2_K", "Q4_K")))
    plan = plan_compression(source, statistics, recipe)
    experts = [expert for layer in plan.layers for expert in layer.experts]
    assert {kind for expert in experts for kind in expert.types[:2]} <= {Type.Q2_K, Type.Q4_K}
    assert {expert.types[2] for expert in experts} <= {Type.IQ4_NL, Type.Q5_0}
    assert counts(source, recipe, plan, statistics).keys() <= {"Q4_K to Q5_0", "Q2_K to IQ4_NL"}
    assert counts(source, recipe, plan, statistics)
    assert plan.expected_kl is not None
    assert plan.expected_kl > 0


def test_types_by_name_under_a_size_fall_back(source: ModelSource, statistics: Statistics) -> None:
    types = StorageRecipe(expert="Q4_K", low="Q2_K", attention="Q5_K")
    recipe = Recipe(target_bpw=9.0, types=types, free_constants=True)
    plan = plan_compression(source, statistics, recipe)
    experts = [expert for layer in plan.layers for expert in layer.experts]
    assert {expert.types for expert in experts} == {(Type.Q4_K, Type.Q4_K, Type.Q5_0)}
    assert {expert.low_types for expert in experts} == {(Type.Q2_K, Type.Q2_K, Type.IQ4_NL)}
    assert counts(source, recipe, plan, statistics) == {"Q4_K to Q5_0": 2, "Q2_K to IQ4_NL": 2}


def test_prices_that_are_known_are_not_measured_again(source: ModelSource, statistics: Statistics) -> None:
    said: list[str] = []
    recipe = Recipe(types=StorageRecipe(expert="Q4_K", low="Q2_K"))
    plan = plan_compression(source, statistics, recipe, on_progress=lambda what, _done, _total: said.append(what))
    assert set(said) <= {"trying what it loses"}
    assert plan.expected_kl is not None
    assert 0 < plan.expected_kl < math.inf


def test_plain_types_fall_back_in_the_yardstick(source: ModelSource, statistics: Statistics) -> None:
    plan = plan_compression(source, statistics, Recipe(format="stock", types=StorageRecipe(expert="Q4_K")))
    below, above = plain_neighbours(source, statistics, plan_bytes(plan, source) + 10_000)
    assert below.type == "Q4_K"
    assert [layer.experts for layer in below.plan.layers] == [layer.experts for layer in plan.layers]
    assert below.plan.expected_kl is not None
    assert 0 < below.plan.expected_kl < math.inf
    assert above.n_bytes > below.n_bytes


def test_narrower_experts_fall_back(sentencepiece_path: Path, tmp_path: Path) -> None:
    """Rows of 512 fit all types, and calibration has tried no others on them; those of 384 need some."""
    sizes = TinyConfig(n_layer=1, n_embd=256, n_ff=512, n_expert=4, n_expert_used=2)
    source = open_source(save_checkpoint(tmp_path / "c", sentencepiece_path, sizes))
    statistics = learnt(source, tmp_path)
    narrow = ExpertRecipe(width=384)
    named = Recipe(experts=narrow, types=StorageRecipe(expert="Q4_K"))
    plan = plan_compression(source, statistics, named)
    assert {expert.types for expert in plan.layers[0].experts} == {(Type.Q4_K, Type.Q4_K, Type.Q5_0)}
    assert counts(source, named, plan, statistics) == {"Q4_K to Q5_0": 1}
    plan = plan_compression(source, statistics, Recipe(experts=narrow, target_bpw=3.6))
    kinds = {expert.types[2] for expert in plan.layers[0].experts}
    assert kinds <= SMALL - {Type.Q8_0, Type.F16}, "a budget that has no room for more"
    assert plan.expected_kl is not None
    assert 0 < plan.expected_kl < math.inf


def test_a_mix_may_have_another_type_in_the_only_place_that_fits(moe_checkpoint: Path) -> None:
    """As Q4_K_M has Q5_K for attn_output, whose rows of 4096 are the only ones of gpt-oss that 256 divides."""
    spec = open_source(moe_checkpoint).spec
    matrices = [typed("token_embd.weight", 2880, Type.Q4_K), typed("blk.0.attn_output.weight", 4096, Type.Q5_K)]
    check_fits(Path("m"), spec, "Q4_K_M", Type.Q4_K, matrices)
    others = [*matrices[:1], typed("blk.0.attn_v.weight", 2880, Type.Q8_0)]
    with pytest.raises(UnsupportedModelError, match="no multiple of 256, as Q4_K in Q4_K_M needs"):
        check_fits(Path("m"), spec, "Q4_K_M", Type.Q4_K, others)


def test_a_type_that_fits_nowhere_is_refused(moe_checkpoint: Path) -> None:
    recipe = Recipe(types=StorageRecipe(expert="Q4_K"))
    with pytest.raises(UnsupportedModelError, match=r"no multiple of 256, as Q4_K in Q4_K needs\. Use --type Q8_0 or"):
        plan_compression(open_source(moe_checkpoint), None, recipe)


def test_second_copies_that_would_be_no_smaller_are_refused(moe_checkpoint: Path) -> None:
    recipe = Recipe(types=StorageRecipe(expert="IQ4_NL", low="Q2_K"))
    told = r"Second copies in Q2_K would be no smaller than the first\. .* Use --two-copies Q8_0,IQ4_NL, or"
    with pytest.raises(UsageError, match=told):
        plan_compression(open_source(moe_checkpoint), None, recipe)
    recipe = Recipe(types=StorageRecipe(expert="Q4_0", low="Q8_0"))
    with pytest.raises(UsageError, match=r"no smaller than the first\. Name the better type first"):
        plan_compression(open_source(moe_checkpoint), None, recipe)


def test_a_first_copy_that_fits_nowhere_is_refused_with_two_types_that_do(moe_checkpoint: Path) -> None:
    recipe = Recipe(types=StorageRecipe(expert="Q4_K", low="Q2_K"))
    with pytest.raises(
        UnsupportedModelError, match=r"as Q4_K in Q4_K needs\. Use --two-copies Q8_0,IQ4_NL, or a recipe"
    ):
        plan_compression(open_source(moe_checkpoint), None, recipe)
    suggested = Recipe(types=StorageRecipe(expert="Q8_0", low="IQ4_NL"))
    plan = plan_compression(open_source(moe_checkpoint), None, suggested)
    assert all(expert.low_types for layer in plan.layers for expert in layer.experts)


def test_types_that_must_know_what_matters_are_refused_before_writing(source: ModelSource) -> None:
    with pytest.raises(UsageError, match=r"IQ1_S, IQ2_XS cannot be made.* --stats"):
        plan_compression(source, None, Recipe(types=StorageRecipe(expert="IQ2_XS", low="IQ1_S")))
