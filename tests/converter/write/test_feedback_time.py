"""A time for error feedback is spent where it saves most, and what it does not reach is as plain as without."""

from dataclasses import replace
from pathlib import Path

import gguf
import pytest

from slimoe.converter.budget.compress import plan_compression
from slimoe.converter.layout.offsets import lay_out
from slimoe.converter.layout.plan import CompressPlan
from slimoe.converter.recipe.recipe import FitRecipe, Recipe, StorageRecipe
from slimoe.converter.source.model_source import ModelSource
from slimoe.converter.source.open_source import open_source
from slimoe.converter.stats.statistics import Statistics
from slimoe.converter.stats.type_costs import TypeCosts, statistics_costs
from slimoe.converter.write.feedback_time import (
    FeedbackTime,
    Speeds,
    costs_with_feedback,
    measured_speeds,
    saved_share,
    with_chosen,
)
from slimoe.converter.write.writer import chosen_quantiser, write_planned
from slimoe.offload.errors import UsageError
from tests.models.compress_plans import learnt

NAMED = StorageRecipe(expert="Q4_0", attention="Q8_0", token="Q8_0", output="Q8_0")
SPEEDS = Speeds(lambda kind, _n_rows: {"Q4_0": 1e-3, "Q8_0": 2e-3}[kind.name], 1e12)


@pytest.fixture(scope="module")
def source(moe_checkpoint: Path) -> ModelSource:
    """Two layers of 6 experts, top 3, n_embd 64, n_ff 96."""
    return open_source(moe_checkpoint)


@pytest.fixture(scope="module")
def statistics(source: ModelSource, tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    return learnt(source, tmp_path_factory.mktemp("learnt"), n_sequences=4, length=16)


@pytest.fixture(scope="module")
def costs(source: ModelSource, statistics: Statistics) -> TypeCosts:
    return statistics_costs(source, statistics, ("Q4_0", "Q8_0"), 1, lambda _what, _done, _total: None)


def planned(source: ModelSource, statistics: Statistics, feedback: bool | float) -> CompressPlan:
    return plan_compression(source, statistics, Recipe(types=NAMED, fit=FitRecipe(feedback=feedback)))


def time_of(source: ModelSource, plan: CompressPlan, statistics: Statistics) -> FeedbackTime:
    return FeedbackTime.of(source, plan, lay_out(source, plan, statistics), SPEEDS)


def blocks(path: Path) -> dict[str, bytes]:
    return {tensor.name: tensor.data.tobytes() for tensor in gguf.GGUFReader(path).tensors}


def test_matrices_that_read_the_same_are_taken_together(source: ModelSource, statistics: Statistics) -> None:
    needed = time_of(source, planned(source, statistics, True), statistics)
    names = [{matrix.key.name.split(".")[-2] for matrix in group} for group, _ in needed.groups]
    assert names.count({"attn_q", "attn_k", "attn_v"}) == 2
    assert names.count({"attn_output"}) == 2
    assert names.count({"ffn_gate_exps", "ffn_up_exps"}) == names.count({"ffn_down_exps"}) == 12
    assert names.count({"output"}) == 1
    assert len(names) == 29
    one_expert = max(seconds for group, seconds in needed.groups if group[0].key.expert == 0)
    assert one_expert == pytest.approx(2 * 96 * 64 * 1e-3, rel=1e-2)
    assert needed.seconds == pytest.approx(needed.following + sum(seconds for _, seconds in needed.groups))


def test_a_time_is_spent_where_it_saves_most(source: ModelSource, statistics: Statistics, costs: TypeCosts) -> None:
    whole = time_of(source, planned(source, statistics, True), statistics)
    shares = []
    for part in (0.1, 0.4, 1.0):
        plan = planned(source, statistics, part * whole.seconds + 1e-3)
        chosen = with_chosen(plan, whole, costs)
        taken = whole.chosen(chosen)
        assert taken.seconds <= part * whole.seconds + 1e-3
        worth = {
            group[0].key: sum(costs.of(one.origin or group[0].key, one.type) for one in group) / seconds
            for group, seconds in whole.groups
            if group[0].expert is None
        }
        left_out = [worth[group[0].key] for group, _ in whole.groups if group[0].expert is None]
        inside = [worth[group[0].key] for group, _ in taken.groups if group[0].expert is None]
        assert sorted(left_out, reverse=True)[: len(inside)] == pytest.approx(sorted(inside, reverse=True))
        shares.append(saved_share(chosen, whole, costs))
        assert shares[-1] >= 0.99 * part
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)


def test_a_plan_expects_less_of_types_with_feedback(
    source: ModelSource, statistics: Statistics, costs: TypeCosts
) -> None:
    """More than its share of it is left, since tables have none, and less than all."""
    plain, timed, fed = (planned(source, statistics, feedback).expected_kl or 0.0 for feedback in (False, 60.0, True))
    assert timed == plain
    left = costs_with_feedback(costs)
    shares = {key.name: float((left.costs[key] / nats).mean()) for key, nats in costs.costs.items()}
    assert shares.pop("token_embd.weight") == 1
    assert all(0.3 < share < 0.4 for share in shares.values())
    assert 0.3 * plain < fed < 0.9 * plain


def test_a_time_that_reaches_nothing_is_refused(source: ModelSource, statistics: Statistics, costs: TypeCosts) -> None:
    whole = time_of(source, planned(source, statistics, True), statistics)
    with pytest.raises(UsageError, match=r"Give [0-9]+ s or more, or --no-feedback"):
        with_chosen(planned(source, statistics, 1e-3), whole, costs)


def test_what_time_does_not_reach_is_plain(source: ModelSource, statistics: Statistics, tmp_path: Path) -> None:
    plain, timed = (planned(source, statistics, feedback) for feedback in (False, 60.0))
    needed = time_of(source, timed, statistics)
    group = next(group for group, _ in needed.groups if group[0].key.name == "blk.0.attn_q.weight")
    timed = replace(timed, fitted=frozenset((one.tensor, one.slot) for one in group))
    found = []
    for number, plan in enumerate((plain, timed)):
        path = tmp_path / f"{number}.gguf"
        write_planned(source, plan, path, statistics, quantiser=chosen_quantiser(source, plan, statistics, 1))
        found.append(blocks(path))
    differ = {name for name, own in found[0].items() if own != found[1][name]}
    assert differ == {"blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.0.attn_v.weight"}


def test_speeds_of_this_machine() -> None:
    speeds = measured_speeds(1)
    assert 1e6 < speeds.products < 1e15
    assert all(0 <= speeds.per_weight(gguf.GGMLQuantizationType.Q3_K, n) < 1e-3 for n in (64, 4096))
