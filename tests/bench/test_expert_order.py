"""Orders of experts on made up traces, whose reads can be told beforehand, and requests that join neighbours."""

from contextlib import closing
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from bench.joined_reads import MOST_BYTES, PAGE, Disk, requests, trace_of, ways
from bench.traces.expert_order import learnt_orders, n_runs, pair_counts, try_orders
from bench.traces.layer_slots import Selections, divided, reads
from bench.traces.routing import Routing
from slimoe.offload.cache.router_trace import PROMPT, Trace, TraceHeader, TraceLayer, TraceRun, TraceStep
from slimoe.offload.gguf.header import TensorInfo

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


# --- requests ---


def tensor(n_bytes_each: int, offset: int = 3 * PAGE, n_expert: int = 8) -> TensorInfo:
    """A stack of experts' matrices."""
    return TensorInfo("up", (n_bytes_each, 1, n_expert), Type.I8, 0, offset, n_bytes_each * n_expert)


def test_neighbours_share_a_request_where_they_are_joined() -> None:
    stack = tensor(2 * PAGE)
    apart = [(3 * PAGE + 2 * PAGE * place, 2 * PAGE) for place in (2, 3, 6)]
    assert requests([stack], [3, 6, 2], joined=False) == apart
    assert requests([stack], [3, 6, 2], joined=True) == [(7 * PAGE, 4 * PAGE), apart[2]]
    assert requests([stack, stack], [0], joined=True) == 2 * [(3 * PAGE, 2 * PAGE)]


def test_a_page_between_two_matrices_is_read_twice_unless_they_are_joined() -> None:
    stack = tensor(PAGE, offset=PAGE + 32)
    assert requests([stack], [0, 1], joined=False) == [(PAGE, 2 * PAGE), (2 * PAGE, 2 * PAGE)]
    assert requests([stack], [0, 1], joined=True) == [(PAGE, 3 * PAGE)]


def test_long_requests_are_cut() -> None:
    assert requests([tensor(MOST_BYTES + PAGE, 0)], [0], joined=True) == [(0, MOST_BYTES), (MOST_BYTES, PAGE)]


def test_ways_differ_in_their_requests() -> None:
    made = ways(8, [0, 5, 1, 2, 3, 4, 6, 7])
    missed = [5, 7, 0]
    assert {name: len(way([tensor(PAGE)], missed)) for name, way in made.items()} == {
        "apart": 3,
        "joined": 3,
        "joined, co-selection": 2,
        "all neighbours": 1,
    }


def test_an_observed_text_is_a_trace_of_answers() -> None:
    logits = np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32)
    trace = trace_of(Routing(logits, logits, 3), 100)
    assert (trace.header.n_layer, trace.header.n_expert, len(trace.steps[0].layers[1].selected)) == (2, 8, 5)
    assert trace.steps[0].is_answer(5).all()


def test_all_requests_are_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(5 * PAGE + 7))
    with closing(Disk(path, 2)) as disk:
        assert disk.read([(0, 2 * PAGE), (PAGE, PAGE), (4 * PAGE, 2 * PAGE)]) == 4 * PAGE + 7


def test_slots_are_divided_at_the_least_cost_and_all_used() -> None:
    """Against every division."""
    rng = np.random.default_rng(4)
    costs = -np.sort(-rng.uniform(0, 1, (4, 7)), axis=1)
    costs[:, :2] = np.inf
    for n_slots in (8, 12, 17, 24):
        every = [one for one in product(range(2, 7), repeat=4) if sum(one) == n_slots]
        least = min(sum(costs[layer, n] for layer, n in enumerate(one)) for one in every)
        found = divided(costs, n_slots)
        assert sum(found) == n_slots
        assert sum(costs[layer, n] for layer, n in enumerate(found)) == pytest.approx(least)
    assert sum(divided(np.zeros((3, 5)), 7)) == 7, "slots that bring nothing are used too"


def test_reads_of_a_cache_by_hand() -> None:
    """One layer, two slots: experts that take turns in threes are all read, and half of them were foretold."""
    selected = np.array([[[0], [1], [2]] * 8])
    foretold = np.where(np.arange(24) % 2 == 0, selected[0, :, 0], -1)[None, :, None]
    tokens, uses = Selections(selected, foretold, 3), np.full((1, 3), 1 / 3)
    assert reads(tokens, 3, uses)[0].sum() == 0
    shared, alone = reads(tokens, 2, uses), reads(tokens, [2], uses)
    np.testing.assert_array_equal(shared, alone)
    n_read, n_unforeseen = (part.sum() * 24 for part in shared)
    assert 8 <= n_read <= 24
    assert 0 < n_unforeseen < n_read
