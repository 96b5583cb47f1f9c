"""Simulated machines: seconds by hand, caches against looking at everything, and the whole grid in small."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from bench.models.random_trace import write_random_trace
from bench.simulated.caches import ClassLru, Lru, most_used, placed, uploading
from bench.simulated.compare import main
from bench.simulated.engine import played
from bench.simulated.foresight import foreseen
from bench.simulated.grid import ENGINE, ORACLE, STATIC
from bench.simulated.machine import Machine, layer_seconds
from bench.simulated.routing import Habits, in_lru, recorded, repeated, routed
from slimoe.offload.cache.router_trace import Trace, TraceHeader, read_trace

MACHINE = Machine(
    device_rate=100, cpu_rate=10, memory_rate=12, link_rate=4, device_launch=1, cpu_launch=2, link_delay=3
)


def test_seconds_of_a_layer_by_hand() -> None:
    assert layer_seconds(MACHINE, 100, 2, 0, 0) == pytest.approx(1 + 2)
    assert layer_seconds(MACHINE, 100, 0, 0, 2) == pytest.approx(2 + 20 + 3)
    assert layer_seconds(MACHINE, 100, 0, 1, 0) == pytest.approx(3 + 25 + 1 + 1)
    # From 3 to 14.5 s both read: 4 bytes/s over the link, 8 of 12 left to the CPU, which had done 10 before.
    assert layer_seconds(MACHINE, 100, 0, 1, 1) == pytest.approx(3 + 25 + 1 + 1)
    assert layer_seconds(MACHINE, 100, 0, 1, 3) == pytest.approx(28 + (300 - 10 - 25 * 8) / 10 + 3)


def test_routing_repeats_and_prefers_as_it_is_told() -> None:
    even, local = (routed(6, 32, 4, Habits(0.3, skew, repeats), 300, 1) for skew, repeats in ((0.1, 0.0), (1.5, 0.4)))
    assert (np.sort(local.selected, axis=2)[..., 1:] != np.sort(local.selected, axis=2)[..., :-1]).all()
    assert repeated(even.selected) == pytest.approx(4 / 32, abs=0.05)
    assert repeated(local.selected) > 0.4
    assert in_lru(local.selected, 0.5, 32) > in_lru(even.selected, 0.5, 32) + 0.2
    assert in_lru(even.selected, 1.0, 32) > 0.95


def test_recorded_tokens_stand_one_after_the_other_without_the_last_layer(tmp_path: Path) -> None:
    header = TraceHeader("none", 2, ((1,) * 6,) * 3)
    traces = list[Trace]()
    for seed in (1, 2):
        write_random_trace(tmp_path / "trace", header, n_prompt=20, n_answer=5, n_turns=1, seed=seed)
        traces.append(read_trace(tmp_path / "trace"))
    both = recorded(traces, traces[1])
    assert both.selected.shape == (2 * 25, 2, 2)
    prompt, answer = traces[1].steps[:2]
    assert (both.selected[25:45, 1] == prompt.layers[1].selected).all()
    assert (both.selected[45, 0] == answer.layers[0].selected).all()
    assert both.likings == pytest.approx(traces[1].rates()[:2])


def test_recorded_texts_need_both_kinds_of_traces_and_more_tokens_than_warm_up(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    write_random_trace(path, TraceHeader("none", 2, ((1,) * 6,) * 3), n_prompt=20, n_answer=5, n_turns=1, seed=1)
    alone, short = (CliRunner().invoke(main, ["--trace", str(path), *more]) for more in ([], ["--priors", str(path)]))
    assert (alone.exit_code, short.exit_code) == (2, 2)
    assert "both" in alone.stderr
    assert "more than 192" in short.stderr


def test_caches_find_what_looking_at_everything_finds() -> None:
    routing = routed(3, 8, 2, Habits(0.5, 0.5, 0.3), 80, 2)
    selected = routing.selected
    held: list[tuple[int, int]] = []
    n_here = 0
    for token in selected.tolist():
        for layer, experts in enumerate(token):
            keys = [(layer, expert) for expert in experts]
            n_here += sum(key in held for key in keys)
            for key in sorted(keys, key=lambda key: key not in held):
                if key in held:
                    held.remove(key)
                held = [*held, key][-7:]
    assert uploading(selected, 7, Lru).here.sum() == n_here
    static = placed(selected, most_used(routing.likings, 7))
    assert static.here.sum() > placed(selected, most_used(-routing.likings, 7)).here.sum()


def test_a_share_of_the_misses_is_left_to_the_cpu_once_the_cache_is_full() -> None:
    selected = routed(3, 16, 4, Habits(0.5, 0.5, 0.3), 200, 2).selected
    every, half = (uploading(selected, 12, ClassLru, share) for share in (0.0, 0.5))
    assert (every.here + every.uploaded == 4).all()
    missed = 4 * half.here.size - half.here.sum()
    assert half.uploaded.sum() == pytest.approx(missed / 2, abs=12)


@pytest.mark.parametrize("link", [1e9, 50e9])
def test_the_engine_keeps_its_slots_and_is_between_static_and_foresight(link: float) -> None:
    routing = routed(4, 16, 2, Habits(0.3, 1.0, 0.3), 400, 3)
    machine = Machine(400e9, 20e9, 70e9, link)
    uses = routing.likings / routing.likings.sum(axis=1, keepdims=True) * 2
    own = played(routing.selected, 16, uses, 24, machine, 3e6)
    known = foreseen(routing.selected, uses, 24, machine, 3e6)
    still = placed(routing.selected, most_used(uses, 24))
    assert own.choice.mode == ("upload" if link > 20e9 else "swap")
    assert still.here.sum() < own.counts.here.sum()
    assert own.counts.here.sum() < known.here.sum() or link < 20e9


def test_the_grid_in_small(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["--smoke", "--out", str(tmp_path)], catch_exceptions=False)
    document = json.loads(result.stdout.splitlines()[-1])
    assert len(document["cells"]) == 30
    for cell in document["cells"]:
        ms = cell["ms_per_token"]
        assert ms[ORACLE] == min(ms.values()) > 0
        assert ms[ENGINE] < 1.05 * ms[STATIC]
    worst = max(cell["ms_per_token"][ENGINE] / cell["ms_per_token"][STATIC] for cell in document["cells"])
    assert document["worst_over_static"] == pytest.approx(worst, abs=1e-3)
    assert ET.parse(tmp_path / "simulated-grid.svg").getroot().tag.endswith("svg")
