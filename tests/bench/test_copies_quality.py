"""The bench of lossy modes: figures by hand, and two exact copies that are the better one to the last bit."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench.copies_quality import Mode, measure, parse_mode, smallest_plan, table
from bench.lossy.copies_hints import measure_hints, write_hints
from bench.lossy.copies_scores import Text, bytes_per_token, divergences, planned, selected_bytes
from slimoe.offload.errors import UsageError
from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.plan.engine_plan import plan_engine
from tests.models.configs import engine_config


def test_divergences_by_hand() -> None:
    figures = divergences([(0.0, True), (0.2, True), (0.4, False), (1.0, True)])
    assert figures["kl_mean"] == pytest.approx(0.4)
    assert figures["kl_median"] == pytest.approx(0.3)
    assert figures["kl_max"] == 1.0
    assert 0.9 < figures["kl_99.9%"] < 1.0
    assert figures["same_top"] == 0.75


def test_modes_are_compared_with_room_for_some_experts(tmp_path: Path) -> None:
    plan = smallest_plan(tmp_path)
    refused = Mode("no such cache", "Q8_0", {"kv_type": "q1"})
    rows = measure(replace(plan, modes=(*plan.modes, refused)), lambda _: None)
    assert [(row["mode"], row["room"]) for row in rows] == [
        (mode, room) for mode in ("Q8_0", "two copies, exact", "no such cache") for room in plan.rooms
    ]
    scored = [row for row in rows if row["mode"] != "no such cache"]
    divergence = {row[name]["kl_mean"] for row in scored for name in ("cold", "warm")}
    assert len(divergence) == 1, "exact in every room, cold and warm, and two copies are the better one"
    assert 0 < divergence.pop() < 0.1
    for row in scored:
        assert row["warm"]["expert_bytes"] == pytest.approx(2 * 2 * 3 * 256 * 512 * 34 / 32)
        assert (row["warm"]["missed_bytes"] > 0) == (row["room"] < 1)
    assert all("kv" in row["failure"].lower() for row in rows if row["mode"] == "no such cache")
    assert table(rows).row_count == len(rows)
    assert not (tmp_path / "F32.gguf").exists()


def test_bytes_that_a_lossy_mode_saves(tmp_path: Path) -> None:
    """A selected expert in its smaller copy saves the difference, a skipped one all."""
    plan = smallest_plan(tmp_path)
    model = plan.file("Q8_0,Q4_K")
    assert plan.file(str(model)) == model, "a file by its name is taken as it is"
    config = engine_config(model, n_ctx=256)
    weights = 3 * 256 * 512
    high, low = weights * 34 // 32, weights * 144 // 256
    counters = {
        "low_selected": 1.5,
        "skipped_selected": 0.3,
        "constant_selected": 0.2,
        "bytes_read": 900.0,
        "bytes_wasted": 100.0,
    }
    figures = bytes_per_token(selected_bytes(config), counters)
    assert figures["saved_bytes"] == pytest.approx(1.5 * (high - low) + 0.5 * high)
    assert figures["expert_bytes"] == pytest.approx(4 * high - figures["saved_bytes"])
    assert figures["missed_bytes"] == 800


def test_slots_are_those_of_the_room(tmp_path: Path) -> None:
    """With too little for any step, the fewest; low copies and elastic mixes have their part of the same room."""
    model = smallest_plan(tmp_path).file("Q8_0,Q4_0")
    whole = 4 * 2 * 3 * 256 * 512 * 34 // 32
    sizes = {}
    for lossy in (None, "low", "elastic"):
        tiers = planned(engine_config(model, n_ctx=256, lossy=lossy), int(0.7 * whole)).tiers
        assert tiers is not None
        sizes[lossy] = tiers.host_pool
        assert 0.4 * whole < tiers.host_pool < 0.9 * whole
    fewest = planned(engine_config(model, n_ctx=256), 0).tiers
    assert fewest is not None
    assert fewest.n_resident == 2


def test_hints_are_measured_and_written(tmp_path: Path) -> None:
    """A divergence allowed can be kept with them; the weights are the same as before."""
    small = smallest_plan(tmp_path)
    model, target = small.file("Q8_0,Q4_0"), tmp_path / "hinted.gguf"
    with pytest.raises(UsageError):
        plan_engine(engine_config(model, n_ctx=256, max_kl=0.1))
    text = Text(small.texts[0], np.empty((0, 0)))
    hints = measure_hints(model, [text], 1, lambda line: None)
    for hint in hints:
        assert hint.use is not None
        assert sum(hint.use) == pytest.approx(2)
        assert hint.low_error is not None
        assert hint.skip_error is not None
        used = [expert for expert, use in enumerate(hint.use) if use > 0]
        assert all(0 < hint.low_error[expert] < hint.skip_error[expert] for expert in used)
    write_hints(model, target, hints)
    assert plan_engine(engine_config(target, n_ctx=256, max_kl=0.1)).lossy is not None
    before, after = read_gguf(model), read_gguf(target)
    assert list(before.tensors) == list(after.tensors)
    begins = [min(tensor.offset for tensor in file.tensors.values()) for file in (before, after)]
    data = [path.read_bytes()[begin:] for path, begin in zip((model, target), begins, strict=True)]
    assert data[0] == data[1]


def test_modes_are_written_as_names_and_changes() -> None:
    assert parse_mode("kl 0.01:max_kl=0.01 policy=lru", "Q4_K,Q2_K") == Mode(
        "kl 0.01", "Q4_K,Q2_K", {"max_kl": 0.01, "policy": "lru"}
    )
    with pytest.raises(UsageError, match="NAME:FIELD=VALUE"):
        parse_mode("low", "Q4_K,Q2_K")
