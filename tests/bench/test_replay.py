"""The replay against brute force on small cases, hand-worked ones, and the engine's own order of decisions."""

import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench.models.random_trace import write_random_trace
from bench.replay import CANDIDATES, Plan, figures, main, replay
from bench.traces.cache_replay import CacheReplay, Tally, Tier, pool_sizes, pools_within
from bench.traces.candidate import Belady, Candidate, Online, OracleStatic
from bench.traces.demand import Demand, demands
from slimoe.offload.cache.policy import POLICIES, PolicyContext, make_policy
from slimoe.offload.cache.residency import Key
from slimoe.offload.cache.router_trace import (
    ANSWER,
    PROMPT,
    Trace,
    TraceHeader,
    TraceLayer,
    TraceRun,
    TraceStep,
    read_trace,
)

ROOT = Path(__file__).parents[2]
HOST = Tier(1e9, 10e9, 10e9, computes_misses=False)
DEVICE = Tier(1e9, 100e9, 10e9, computes_misses=True)


def header_of(*n_experts: int, n_bytes: int = 1000, n_used: int = 1) -> TraceHeader:
    return TraceHeader("none", n_used, tuple((n_bytes,) * n for n in n_experts))


def answers(tokens: Sequence[Sequence[Sequence[int]]]) -> list[TraceStep]:
    """Steps of one token: for each layer its experts."""
    return [
        TraceStep(
            (TraceRun(ANSWER, 0, at, 1),),
            tuple(
                TraceLayer(layer, np.array([experts], np.int32), np.ones((1, len(experts)), np.float16))
                for layer, experts in enumerate(token)
            ),
        )
        for at, token in enumerate(tokens)
    ]


def random_trace(tmp_path: Path, header: TraceHeader, seed: int, n_prompt: int = 9, n_answer: int = 25) -> Trace:
    path = tmp_path / f"trace-{seed}"
    write_random_trace(path, header, n_prompt, n_answer, n_turns=2, seed=seed)
    return read_trace(path)


def hits(header: TraceHeader, steps: Sequence[Demand], n_slots: int, candidate: Candidate, tier: Tier = HOST) -> int:
    cache = CacheReplay(header, pool_sizes(header, n_slots), candidate, tier)
    tallies = cache.run(steps)
    cache.check()
    return sum(tally.hits for tally in tallies.values())


def most_hits(header: TraceHeader, steps: Sequence[Demand], n_slots: int) -> int:
    """The best of all caches, by trying every content after every visit."""
    keys = [(layer, expert) for layer, sizes in enumerate(header.expert_bytes) for expert in range(len(sizes))]
    best = {frozenset(held): 0 for held in itertools.combinations(keys, n_slots)}
    for visit in (visit for step in steps for visit in step.visits):
        after: dict[frozenset[Key], int] = {}
        for held, so_far in best.items():
            total = so_far + len(held.intersection(visit.keys))
            for chosen in itertools.combinations(sorted(held.union(visit.keys)), n_slots):
                content = frozenset(chosen)
                after[content] = max(total, after.get(content, 0))
        best = after
    return max(best.values())


@pytest.mark.parametrize("n_slots", [1, 2, 3, 4])
def test_belady_is_the_best_of_all_caches(tmp_path: Path, n_slots: int) -> None:
    header = header_of(4, 3, n_used=2)
    for seed in range(2):
        steps = demands(random_trace(tmp_path, header, seed, n_prompt=2, n_answer=7))
        assert hits(header, steps, n_slots, Belady(header, steps)) == most_hits(header, steps, n_slots)


def test_belady_by_hand() -> None:
    """Two slots, a b c a b c a b: starts with a b; c is not kept; so a and b are hit each time, c never."""
    header = header_of(3)
    steps = demands(Trace(header, tuple(answers([[[expert]] for expert in (0, 1, 2, 0, 1, 2, 0, 1)]))))
    assert hits(header, steps, 2, Belady(header, steps)) == 6
    # a c c b b a with one slot: a is let go for c, c for b, b for a
    steps = demands(Trace(header, tuple(answers([[[expert]] for expert in (0, 2, 2, 1, 1, 0)]))))
    assert hits(header, steps, 1, Belady(header, steps)) == 3


@pytest.mark.parametrize("n_slots", [1, 2, 3])
def test_the_static_oracle_is_the_best_fixed_set(tmp_path: Path, n_slots: int) -> None:
    header = header_of(4, 3, n_used=2)
    keys = [(layer, expert) for layer, sizes in enumerate(header.expert_bytes) for expert in range(len(sizes))]
    for seed in range(5):
        steps = demands(random_trace(tmp_path, header, seed))
        wanted = [visit.keys for step in steps for visit in step.visits]
        best = max(
            sum(len(set(held).intersection(keys)) for keys in wanted) for held in itertools.combinations(keys, n_slots)
        )
        assert hits(header, steps, n_slots, OracleStatic(header, steps)) == best


@pytest.mark.parametrize("tier", [HOST, DEVICE], ids=["host", "device"])
@pytest.mark.parametrize("n_slots", [1, 2, 5, 9, 15])
def test_nobody_beats_belady(tmp_path: Path, n_slots: int, tier: Tier) -> None:
    header = header_of(5, 5, 5, n_used=2)
    for seed in range(3):
        trace = random_trace(tmp_path, header, seed)
        results = replay(Plan(trace, pool_sizes(header, n_slots), tier, None), list(CANDIDATES))
        total = {name: sum(tally.hits for tally in phases.values()) for name, phases in results.items()}
        assert total["belady"] == max(total.values())
        visits = {sum(tally.hits + tally.misses for tally in phases.values()) for phases in results.values()}
        assert len(visits) == 1, "all candidates serve the same visits"


@pytest.mark.parametrize("name", POLICIES)
def test_room_for_everything_never_misses(tmp_path: Path, name: str) -> None:
    header = header_of(5, 0, 3, n_used=2)
    steps = demands(random_trace(tmp_path, header, 1))
    context = PolicyContext(header.n_layer, header.n_expert, 2)
    cache = CacheReplay(header, pool_sizes(header, 99), Online(make_policy(name, context)), HOST)
    assert all(tally.misses == 0 and tally.hits > 0 for tally in cache.run(steps).values())


def test_lru_by_hand_and_what_it_costs() -> None:
    """One layer, two slots, full of a and b at the start: c takes a's, a takes b's, c is hit."""
    header = header_of(3)
    trace = Trace(header, tuple(answers([[[expert]] for expert in (1, 2, 0, 2)])))
    plan = Plan(trace, pool_sizes(header, 2), HOST, None)
    tally = replay(plan, ["lru"])["lru"]["answer"]
    assert (tally.hits, tally.misses, tally.moved_bytes, tally.n_tokens) == (2, 2, 2000, 4)
    row = figures(tally, HOST)
    assert row["hit_share"] == 0.5
    assert row["moved_bytes_per_token"] == 500
    assert row["move_ms_per_token"] == pytest.approx(1e3 * 500 / 1e9)
    assert row["compute_ms_per_token"] == pytest.approx(1e3 * 1000 / 10e9)
    assert row["ms_per_token"] == pytest.approx(row["move_ms_per_token"] + row["compute_ms_per_token"])


def test_a_device_multiplies_misses_where_they_lie_and_swaps_what_pays() -> None:
    """Expert 2 is used all the time: one move, and hits from then on. One use does not pay a move."""
    header = header_of(3)
    often = Trace(header, tuple(answers([[[2]]] * 300)))
    tally = replay(Plan(often, pool_sizes(header, 1), DEVICE, None), ["lfu-decay"])["lfu-decay"]["answer"]
    assert tally.moved_bytes == 1000
    assert 0 < tally.misses < 100
    assert tally.hits + tally.misses == 300
    once = Trace(header, tuple(answers([[[2]]])))
    tally = replay(Plan(once, pool_sizes(header, 1), DEVICE, None), ["lfu-decay"])["lfu-decay"]["answer"]
    assert (tally.moved_bytes, tally.misses, tally.miss_bytes, tally.hit_bytes) == (0, 1, 1000, 0)


def test_a_move_that_the_link_makes_too_dear_is_not_made() -> None:
    header = header_of(3)
    often = Trace(header, tuple(answers([[[2]]] * 300)))
    slow = Tier(1e6, 100e9, 10e9, computes_misses=True)
    assert replay(Plan(often, pool_sizes(header, 1), slow, None), ["lfu-decay"])["lfu-decay"]["answer"].moved_bytes == 0


def test_what_was_predicted_takes_slots_and_is_read_once() -> None:
    """Two layers of three experts, three slots, which hold layer 0 at the start.

    At layer 0 experts 0 and 1 of layer 1 are predicted. The latest equal in layer 0 that is not in use leaves for each.
    Expert 0 is selected, which was read ahead; expert 1 was read in vain, but is a hit at the next token.
    """
    header = header_of(3, 3)
    tokens = [[[0], [0]], [[0], [1]]]
    first, second = answers(tokens)
    predicted = replace(first.layers[0], predicted=((1, 0), (1, 1)))
    steps = demands(Trace(header, (replace(first, layers=(predicted, first.layers[1])), second)))
    cache = CacheReplay(header, {1000: 3}, Online(make_policy("static", PolicyContext(2, 3, 1))), HOST)
    tally = cache.run(steps)["answer"]
    cache.check()
    assert (tally.hits, tally.pending, tally.misses, tally.moved_bytes) == (3, 1, 1, 2000)
    blind = CacheReplay(header, {1000: 3}, Online(make_policy("static", PolicyContext(2, 3, 1))), HOST)
    tally = blind.run(demands(Trace(header, (first, second))))["answer"]
    assert (tally.hits, tally.pending, tally.misses, tally.moved_bytes) == (2, 0, 2, 2000)


def test_what_is_in_use_or_predicted_does_not_leave_for_what_is_predicted() -> None:
    """Two slots: the expert in use keeps its own, the first predicted one takes the other, the second gets none."""
    header = header_of(3, 3)
    (step,) = answers([[[0], [1]]])
    predicted = replace(step.layers[0], predicted=((1, 0), (1, 1)))
    steps = demands(Trace(header, (replace(step, layers=(predicted, step.layers[1])),)))
    cache = CacheReplay(header, {1000: 2}, Online(make_policy("static", PolicyContext(2, 3, 1))), HOST)
    tally = cache.run(steps)["answer"]
    assert (tally.hits, tally.pending, tally.misses, tally.moved_bytes) == (1, 0, 1, 2000)


def test_a_batch_visits_each_expert_once_and_what_is_here_first() -> None:
    """Slots hold experts 0 and 1; the batch wants 1, 2 and 3: one hit, though 2 and 3 come in."""
    header = header_of(4)
    selected = np.array([[3], [2], [1], [3], [2]], np.int32)
    step = TraceStep((TraceRun(PROMPT, 0, 0, 5),), (TraceLayer(0, selected, np.ones(selected.shape, np.float16)),))
    (demand,) = demands(Trace(header, (step,)))
    assert demand.visits[0].keys == ((0, 1), (0, 2), (0, 3))
    cache = CacheReplay(header, {1000: 2}, Online(make_policy("lru", PolicyContext(1, 4, 1))), HOST)
    tally = cache.run([demand])["prompt"]
    assert (tally.hits, tally.misses, tally.n_tokens) == (1, 2, 5)


def test_experts_of_several_sizes_have_pools_of_their_own(tmp_path: Path) -> None:
    header = TraceHeader("none", 2, ((10,) * 4, (30,) * 4, (10,) * 4))
    assert pool_sizes(header, 6) == {10: 4, 30: 2}
    assert pool_sizes(header, 1000) == {10: 8, 30: 4}
    assert pools_within(header, 100) == {10: 4, 30: 2}
    assert pools_within(header, 99) == {10: 3, 30: 1}
    trace = random_trace(tmp_path, header, 3)
    for size in range(13):
        for phases in replay(Plan(trace, pool_sizes(header, size), HOST, None), list(CANDIDATES)).values():
            assert all(tally.moved_bytes == tally.miss_bytes for tally in phases.values())


def test_a_mixed_step_seeds_with_its_prompt_only() -> None:
    """The answer's row in a batch with a prompt counts for itself, and is not taken for the prompt's."""
    header = header_of(4)
    selected = np.array([[3], [3], [1]], np.int32)
    runs = (TraceRun(PROMPT, 0, 0, 2), TraceRun(ANSWER, 1, 7, 1))
    step = TraceStep(runs, (TraceLayer(0, selected, np.ones(selected.shape, np.float16)),))
    policy = make_policy("lfu-decay", PolicyContext(1, 4, 1))
    candidate = Online(policy)
    (demand,) = demands(Trace(header, (step,)))
    candidate.observe(demand.visits[0])
    told = make_policy("lfu-decay", PolicyContext(1, 4, 1))
    told.decode(0, [1])
    told.prompt(0, np.array([0, 0, 0, 2]))
    np.testing.assert_array_equal(policy.values, told.values)
    assert not demand.is_answer
    assert demand.has_answer


def test_the_command_replays_a_file_with_priors_of_another(tmp_path: Path) -> None:
    header = header_of(5, 5, 5, n_used=2)
    for seed in (1, 2):
        random_trace(tmp_path, header, seed)
    size = ["--bytes", "40%", "--policy", "static", "--policy", "belady", "--move-gbs", "3"]
    arguments = [str(tmp_path / "trace-1"), *size, "--priors", str(tmp_path / "trace-2")]
    command = [sys.executable, "-m", "bench.replay", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["slots"] == 6
    assert list(document["policies"]) == ["static", "belady"]
    expected = Plan(read_trace(tmp_path / "trace-1"), {1000: 6}, HOST, read_trace(tmp_path / "trace-2").rates())
    tally: Tally = replay(expected, ["static"])["static"]["answer"]
    row = document["policies"]["static"]["answer"]
    assert (row["hits"], row["misses"]) == (tally.hits, tally.misses)
    assert row["pending"] == row["ahead"] == tally.pending, "the field's old name"
    assert row["move_ms_per_token"] == pytest.approx(tally.moved_bytes / tally.n_tokens / 3e9 * 1e3)


def test_the_old_name_of_the_host_tier_is_understood() -> None:
    assert main.make_context("bench", ["--tier", "arena"]).params["tier_name"] == "host"


def test_mistakes_are_answered_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random_trace(tmp_path, header_of(5), 1)
    random_trace(tmp_path, TraceHeader("other", 1, ((1,) * 5,)), 2)
    random_trace(tmp_path, TraceHeader("dense", 1, ((), ())), 3)
    trace, others, dense, none = (str(tmp_path / name) for name in ("trace-1", "trace-2", "trace-3", "none"))
    cases: list[tuple[list[str], str]] = [
        ([], "Name a trace"),
        ([trace], "--slots or --bytes"),
        ([trace, "--slots", "2", "--bytes", "50%"], "--slots or --bytes"),
        ([trace, "--bytes", "much"], "no size"),
        ([trace, "--slots", "2", "--priors", others], "another model"),
        ([dense, "--slots", "2"], "without experts"),
        ([none, "--slots", "2"], "cannot be read"),
    ]
    for arguments, words in cases:
        with pytest.raises(SystemExit) as caught:
            main(arguments, standalone_mode=False)
        assert caught.value.code not in (None, 0, 1)
        said = capsys.readouterr()
        assert words in said.err
        assert said.out == ""
