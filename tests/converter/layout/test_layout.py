"""What a plan makes, before it is made: places, sizes, keys, and everything that a format cannot hold."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from slimoe.converter.gguf.header import alignment_of
from slimoe.converter.layout.offsets import PlanSize, lay_out, plan_bytes
from slimoe.converter.layout.plan import CompressPlan, ExpertPlan, LayerPlan
from slimoe.converter.source.checkpoint_source import checkpoint_source
from slimoe.converter.source.model_source import ModelSource
from slimoe.offload.errors import UnsupportedModelError, UsageError
from tests.models.compress_plans import RandomPlans, same_plan, statistics_of, with_layers
from tests.models.held_model import hold, random_mixtral
from tests.models.tiny_checkpoint import TinyConfig

F32, F16, Q8_0, Q4_K = Type.F32, Type.F16, Type.Q8_0, Type.Q4_K


# --- sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("calibrated", [False, True])
def test_sizes_are_counted_exactly(source: ModelSource, calibrated: bool) -> None:
    statistics = statistics_of(source) if calibrated else None
    size, plans = PlanSize(source, statistics), RandomPlans(source, 1)
    for plan in [same_plan(source, "Q8_0"), *(plans.draw() for _ in range(20))]:
        layout = lay_out(source, plan, statistics)
        last = layout.tensors[-1]
        assert size.of(plan) == plan_bytes(plan, source, statistics) == layout.n_bytes
        assert layout.n_bytes >= len(layout.header) + last.offset + last.n_bytes
        assert layout.n_bytes % alignment_of(layout.metadata) == 0


def test_fewer_experts_are_fewer_bytes(source: ModelSource) -> None:
    plan = same_plan(source, "F32", "native")
    layer = plan.layers[1]
    fewer = replace(layer, experts=layer.experts[:5], rows=(0, 1, 2, 3, 4), target=(0, 1, 2, 3, 4))
    saved = plan_bytes(plan, source) - plan_bytes(with_layers(plan, {1: fewer}), source)
    assert abs(saved - 4 * (3 * 64 * 96 + 64)) <= 4 * 4096


# --- native ------------------------------------------------------------------------------------------------


def test_copies_of_one_kind_share_a_bucket(source: ModelSource) -> None:
    kept = np.arange(32)
    experts = (
        ExpertPlan((0,), (F16, F16, F32), (Q8_0,) * 3),
        ExpertPlan((1,), (F16, F16, F32)),
        ExpertPlan((2,), (Q8_0,) * 3),
        ExpertPlan((3,), (F16, F16, F32), kept=kept),
    )
    base = same_plan(source, "F32", "native")
    layer = replace(base.layers[0], experts=experts, rows=(5, 0, 2, 1), target=(3, 2, 1, 0))
    layout = lay_out(source, with_layers(base, {0: layer}))
    found = {tensor.name.removeprefix("blk.0.ffn_"): tensor for tensor in layout.tensors}
    slots = {name: [(m.key.expert, m.copy) for m in tensor.matrices] for name, tensor in found.items()}
    assert slots["gate_exps.b0.weight"] == [(0, 0), (1, 0)]
    assert slots["down_exps.b1.weight"] == [(0, 1), (2, 0)]
    assert slots["up_exps.b2.weight"] == [(3, 0)]
    assert "gate_exps.b3.weight" not in found
    assert found["down_exps.b0.weight"].type is F32
    assert found["down_exps.b2.weight"].ne == (32, 64, 1)
    assert layout.metadata["slimoe.expert.bucket"][:8] == [0, 1, 0, -1, 1, -1, 2, -1]
    assert layout.metadata["slimoe.expert.target"][:4] == [3, 2, 1, 0]


def test_only_large_experts_begin_at_pages(source: ModelSource) -> None:
    """Padding to pages would be percents of a small file."""
    large = hold(random_mixtral(TinyConfig(n_layer=1, n_embd=1024, n_ff=1376, n_expert=2, n_expert_used=1)))
    for model, alignment in ((source, 32), (large, 4096)):
        layout = lay_out(model, same_plan(model, "Q8_0", "native"))
        assert layout.metadata["general.alignment"] == alignment
        assert all(tensor.offset % alignment == 0 for tensor in layout.tensors)
        assert len(layout.header) % alignment == 0


def test_keys_say_where_a_file_comes_from(source: ModelSource) -> None:
    statistics = statistics_of(source)
    plan = replace(same_plan(source, "Q8_0"), recipe="[expert-drop]\nkeep = 6")
    metadata = lay_out(source, plan, statistics).metadata
    assert metadata["slimoe.recipe"] == "[expert-drop]\nkeep = 6"
    assert metadata["slimoe.source.sha256"] == source.source_hash
    assert metadata["slimoe.calibration.sha256"] == "ab" * 32
    assert metadata["slimoe.calibration.tokens"] == 3
    assert "slimoe.calibration.tokens" not in lay_out(source, plan).metadata


def test_hints_reach_the_file(source: ModelSource) -> None:
    base = same_plan(source, "F16", "native")
    hints = [{"use": (0.5,) * 6, "skip_ratio": 0.25 * n, "error": ((0.125,),) * 6} for n in (1, 2)]
    layers = {n: replace(layer, hints=hints[n]) for n, layer in enumerate(base.layers)}
    metadata = lay_out(source, with_layers(base, layers)).metadata
    assert metadata["slimoe.expert.use"] == [0.5] * 12
    assert metadata["slimoe.layer.skip_ratio"] == [0.25, 0.5]
    assert metadata["slimoe.expert.error"] == [0.125] * 12


# --- what does not go --------------------------------------------------------------------------------------


def _without_ffn(layer: LayerPlan) -> LayerPlan:
    return replace(layer, experts=(), rows=(), target=())


def _first_expert(layer: LayerPlan, expert: ExpertPlan) -> LayerPlan:
    return replace(layer, experts=(expert, *layer.experts[1:]))


STOCK_CANNOT = {
    "Layer Drop": (_without_ffn, "without experts"),
    "attention drop": (lambda layer: replace(layer, has_attention=False), "without attention"),
    "fewer experts in one layer": (
        lambda layer: replace(layer, experts=layer.experts[:5], rows=(0, 1, 2, 3, 5), target=(0, 1, 2, 3, 4)),
        "5 experts and layer 0 6",
    ),
    "types by expert": (lambda layer: _first_expert(layer, ExpertPlan((0,), (F32, F32, Q8_0))), "different types"),
    "second copies": (lambda layer: _first_expert(layer, ExpertPlan((0,), (F32,) * 3, (Q8_0,) * 3)), "second copies"),
    "narrower expert": (
        lambda layer: _first_expert(layer, replace(layer.experts[0], kept=np.arange(64))),
        "those of layer 0 have 96",
    ),
    "aliases": (
        lambda layer: replace(layer, experts=layer.experts[:5], target=(0, 1, 2, 3, 4, 4)),
        "rows mean other experts",
    ),
    "constants": (
        lambda layer: replace(
            layer, experts=layer.experts[:5], target=(0, 1, 2, 3, 4, -1), constants=np.zeros((1, 64), np.float32)
        ),
        "constant vectors",
    ),
}


@pytest.mark.parametrize("what", STOCK_CANNOT)
def test_what_stock_files_cannot_hold(source: ModelSource, what: str) -> None:
    change, message = STOCK_CANNOT[what]
    plan = same_plan(source, "F32")
    changed = with_layers(plan, {1: change(plan.layers[1])})
    for attempt in (lay_out, lambda source, plan: plan_bytes(plan, source)):
        with pytest.raises(UnsupportedModelError, match=rf"layer 1 .*{message}.*stock format.* native format"):
            attempt(source, changed)
    lay_out(source, replace(changed, format="native"))


def test_stock_files_hold_narrower_and_fewer_experts_in_all_layers(source: ModelSource) -> None:
    plan = same_plan(source, "F32")
    layers = {
        n: replace(
            layer,
            experts=tuple(replace(expert, kept=np.arange(n, 64 + n)) for expert in layer.experts[:4]),
            rows=(1, 2, 3, 5),
            target=(0, 1, 2, 3),
            types=dict.fromkeys(layer.types, (F16, Q8_0)[n]),
        )
        for n, layer in enumerate(plan.layers)
    }
    metadata = lay_out(source, with_layers(plan, layers)).metadata
    assert (metadata["llama.expert_count"], metadata["llama.feed_forward_length"]) == (4, 64)
    assert metadata["llama.expert_used_count"] == 3


@pytest.mark.parametrize("form", ["stock", "native"])
def test_a_layer_keeps_as_many_experts_as_are_used(source: ModelSource, form: str) -> None:
    plan = same_plan(source, "F32", "stock" if form == "stock" else "native")
    two = [replace(layer, experts=layer.experts[:2], rows=(0, 1), target=(0, 1)) for layer in plan.layers]
    with pytest.raises(UnsupportedModelError, match="layer 0 would keep 2 experts, but 3 are used"):
        lay_out(source, replace(plan, layers=tuple(two)))
    aliases = replace(plan.layers[0], experts=plan.layers[0].experts[:2], target=(0, 1, 0, 1, 0, 1))
    with pytest.raises(UnsupportedModelError, match="layer 0 would"):
        lay_out(source, with_layers(plan, {0: aliases}))


def test_a_second_copy_is_smaller(source: ModelSource) -> None:
    plan = same_plan(source, "Q8_0", "native")
    layer = _first_expert(plan.layers[1], ExpertPlan((0,), (Q8_0,) * 3, (Q8_0, Q8_0, F16)))
    with pytest.raises(UnsupportedModelError, match="layer 1 would have a second copy of expert 0"):
        lay_out(source, with_layers(plan, {1: layer}))


def test_something_stays(source: ModelSource) -> None:
    plan = same_plan(source, "F32", "native")
    with pytest.raises(UnsupportedModelError, match="keep an expert"):
        lay_out(source, replace(plan, layers=tuple(map(_without_ffn, plan.layers))))
    with pytest.raises(UnsupportedModelError, match="keep its attention"):
        lay_out(source, replace(plan, layers=tuple(replace(layer, has_attention=False) for layer in plan.layers)))


@pytest.mark.parametrize(
    ("types", "kept", "message"),
    [
        ((F32, F32, Q4_K), None, r"layer 1: blk.1.ffn_down_exps.weight\[0\] .*rows of 96.* 256, as Q4_K .*IQ4_NL"),
        ((Q4_K, F32, F32), None, r"layer 1: blk.1.ffn_gate_exps.weight\[0\] .*rows of 64"),
        ((F32, F32, Q8_0), np.arange(40), r"rows of 40.* 32, as Q8_0 .*Use F32 or F16 or BF16"),
    ],
)
def test_types_that_do_not_divide_rows(
    source: ModelSource, types: tuple[Type, Type, Type], kept: np.ndarray | None, message: str
) -> None:
    plan = same_plan(source, "F32", "native")
    layer = _first_expert(plan.layers[1], ExpertPlan((0,), types, kept=kept))
    for attempt in (lay_out, lambda source, plan: plan_bytes(plan, source)):
        with pytest.raises(UnsupportedModelError, match=message):
            attempt(source, with_layers(plan, {1: layer}))


def test_attention_and_tables_have_types_that_fit(source: ModelSource) -> None:
    plan = same_plan(source, "F32")
    with pytest.raises(UnsupportedModelError, match=r": token_embd.weight would have rows of 64"):
        lay_out(source, replace(plan, token_type=Q4_K))
    layer = replace(plan.layers[0], types={**plan.layers[0].types, "attn_k": Q4_K})
    with pytest.raises(UnsupportedModelError, match=r"layer 0: blk.0.attn_k.weight would"):
        lay_out(source, with_layers(plan, {0: layer}))


def test_statistics_of_another_checkpoint(source: ModelSource) -> None:
    other = replace(statistics_of(source), source_hash="0" * 64)
    with pytest.raises(UsageError, match="another checkpoint"):
        lay_out(source, same_plan(source, "F32"), other)


def test_a_model_without_experts(dense_checkpoint: Path) -> None:
    source = checkpoint_source(dense_checkpoint)
    plan = CompressPlan("stock", (), F32, F32, "")
    with pytest.raises(UnsupportedModelError, match="no experts to compress"):
        lay_out(source, plan)
