"""Orders of experts on made up traces, whose reads can be told beforehand."""

from pathlib import Path

import numpy as np
import pytest

from bench.traces.expert_order import learnt_orders, n_runs, pair_counts, try_orders
from slimoe.offload.cache.router_trace import PROMPT, Trace, TraceHeader, TraceLayer, TraceRun, TraceStep

N_EXPERT = 12
PAIRS = ((0, 7), (3, 11), (5, 2), (9, 4), (10, 1), (6, 8))


@pytest.fixture
def trace() -> Trace:
    """Experts that always come in pairs, which are no neighbours; one layer, one prompt of many tokens."""
    rng = np.random.default_rng(0)
    selected = np.array([PAIRS[n] for n in rng.integers(len(PAIRS), size=200)], np.int32)
    layer = TraceLayer(0, selected, np.full(selected.shape, 0.5, np.float16))
    step = TraceStep((TraceRun(PROMPT, 0, 0, len(selected)),), (layer,))
    return Trace(TraceHeader("none", 2, ((1000,) * N_EXPERT,)), (step,))


def test_runs_of_neighbours_are_one_read() -> None:
    assert [n_runs(np.array(places)) for places in ([], [4], [5, 4], [1, 3], [9, 2, 3, 1])] == [0, 1, 1, 2, 2]


def test_pairs_are_counted_with_their_own_uses(trace: Trace) -> None:
    counts = pair_counts(trace)[0]
    assert np.array_equal(counts, counts.T)
    assert np.trace(counts) == 400
    assert {tuple(sorted(pair)) for pair in np.argwhere(np.triu(counts, 1)).tolist()} == {
        tuple(sorted(pair)) for pair in PAIRS
    }


def test_what_is_selected_together_is_one_read_where_it_lies_together(trace: Trace, tmp_path: Path) -> None:
    found = try_orders(trace, learnt_orders(trace), part=0.5)
    orders = found["orders"]
    assert 0 < found["missed_per_token"] < 2
    assert orders["router"]["reads_per_token"] == pytest.approx(3 * found["missed_per_token"])
    assert orders["co-selection"]["ratio"] == pytest.approx(0.5, abs=0.1)
    assert orders["co-selection"]["bytes_per_read"] > 1.6 * orders["router"]["bytes_per_read"]
