"""Several requests at once: what each step reads, and that nobody notices the others."""

import random
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from slimoe.offload.cache.disk_reader import ReadFailedError
from slimoe.offload.errors import BadLogitsError, ContextOverflowError, UsageError
from slimoe.offload.graph.batch import Batch
from slimoe.offload.graph.runner import Logits
from slimoe.offload.memory.cells import Cells
from slimoe.offload.requests.request import Generator, ModelFacts
from slimoe.offload.requests.scheduler import Scheduler
from slimoe.offload.text.generation import (
    Event,
    Failed,
    Finished,
    GenerationRequest,
    PromptLogprobs,
    PromptProgress,
    SamplingParams,
    TokenStep,
)
from tests.models.history_model import N_VOCAB, HistoryModel, answer_to

N_BATCH = 64


@dataclass
class Bench:
    """A scheduler over the model of histories, and what it told."""

    n_parallel: int = 4
    n_ctx: int = 1000
    n_cells: int = 4000
    n_batch: int = N_BATCH
    events: dict[int, list[Event | Failed]] = field(default_factory=lambda: defaultdict(list))
    cancelled: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.model = HistoryModel(self.n_cells)
        self.cells = Cells(self.n_cells)
        self.scheduler = Scheduler(self.cells, self.model.compute, self.n_parallel, self.n_batch)
        self.requests: dict[int, GenerationRequest] = {}
        self.jobs: dict[int, Generator] = {}

    def submit(self, request: GenerationRequest) -> int:
        id = len(self.requests)
        facts = ModelFacts(self.n_ctx, N_VOCAB, None, lambda: {})
        self.jobs[id] = Generator(request, facts, lambda: id in self.cancelled, id)
        self.scheduler.submit(self.jobs[id])
        self.requests[id] = request
        return id

    def step(self) -> dict[int, list[Event | Failed]]:
        """What one step told, by request."""
        told = defaultdict(list)
        for id, event in self.scheduler.step():
            told[id].append(event)
            self.events[id].append(event)
        return told

    def finish(self) -> None:
        n_steps = 0
        while not self.scheduler.is_idle:
            self.step()
            n_steps += 1
            assert n_steps < 100_000, "somebody is stuck"

    def tokens(self, id: int) -> list[int]:
        return [event.token for event in self.events[id] if isinstance(event, TokenStep)]

    def end(self, id: int) -> Event | Failed:
        """The last event, after which nothing may follow."""
        ends = [isinstance(event, Finished | Failed) for event in self.events[id]]
        assert ends.count(True) == 1
        assert ends[-1]
        return self.events[id][-1]

    def assert_nothing_is_held(self) -> None:
        assert self.scheduler.is_idle
        assert self.cells.n_unused == self.n_cells
        everything = self.cells.begin()
        self.cells.append(everything, [0] * self.n_cells)
        assert everything.cells.tolist() == list(range(self.n_cells))
        assert (self.cells.n_users == 1).all()


def greedy(prompt: tuple[int, ...] | range, max_tokens: int = 5) -> GenerationRequest:
    return GenerationRequest(tuple(token % N_VOCAB for token in prompt), max_tokens, SamplingParams(temperature=0.0))


def is_reading(batch: Batch) -> bool:
    return batch.runs[0].n_tokens > 1


def test_each_gets_its_own_answer() -> None:
    bench = Bench()
    requests = [greedy(range(n, 3 * n + 1), max_tokens=n) for n in (1, 7, 40, 150, 2, 333)]
    ids = [bench.submit(request) for request in requests]
    bench.finish()
    for id, request in zip(ids, requests, strict=True):
        assert request.max_tokens is not None
        assert bench.tokens(id) == answer_to(request.prompt_ids, request.max_tokens)
        end = bench.end(id)
        assert isinstance(end, Finished)
        assert end.timings.prompt_n + end.timings.cached_n == len(request.prompt_ids)
    bench.assert_nothing_is_held()


def test_one_alone_reads_whole_batches_in_the_first_cells() -> None:
    bench = Bench(n_parallel=1)
    bench.submit(greedy(range(150), max_tokens=4))
    bench.finish()
    assert [batch.n_tokens for batch in bench.model.batches] == [64, 64, 22, 1, 1, 1]
    assert [batch.n_out for batch in bench.model.batches] == [1] * 6
    assert np.concatenate([batch.cells for batch in bench.model.batches]).tolist() == list(range(153))


def test_who_writes_gets_a_token_in_every_step() -> None:
    bench = Bench()
    writers = [bench.submit(greedy((n, n + 1), max_tokens=90)) for n in range(3)]
    for _ in writers:
        bench.step()
    long = bench.submit(greedy(range(900), max_tokens=3))
    n_parts = 0
    while not bench.tokens(long):
        told = bench.step()
        assert bench.model.batches[-1].n_tokens <= N_BATCH // 4 + len(writers)
        assert all(sum(isinstance(event, TokenStep) for event in told[id]) == 1 for id in writers)
        assert isinstance(told[long][0], PromptProgress)
        n_parts += 1
    assert n_parts == -(-900 // (N_BATCH // 4))
    bench.finish()
    assert [bench.tokens(id) for id in writers] == [answer_to((n, n + 1), 90) for n in range(3)]
    assert bench.tokens(long) == answer_to(bench.requests[long].prompt_ids, 3)


def test_a_short_prompt_does_not_wait_for_long_ones() -> None:
    bench = Bench()
    long = [bench.submit(greedy(range(n, n + 900))) for n in (0, 1)]
    for _ in range(3):
        bench.step()
    short = bench.submit(greedy((5, 6)))
    n_steps = 0
    while not bench.tokens(short):
        bench.step()
        n_steps += 1
    assert n_steps <= 3
    assert not any(bench.tokens(id) for id in long)
    done = Counter(id for id in long for event in bench.events[id])
    assert max(done.values()) - min(done.values()) <= 1, "prompts take turns"


@pytest.mark.parametrize("n_before", [0, 1, 5])
def test_a_shared_beginning_is_read_once(n_before: int) -> None:
    """Also when it is being read just now, by whomever."""
    bench = Bench()
    prompts = [(*range(50), *range(300), n) for n in range(4)]
    first = bench.submit(greedy(prompts[0]))
    for _ in range(n_before):
        bench.step()
    ids = [first, *(bench.submit(greedy(prompt)) for prompt in prompts[1:])]
    bench.finish()
    assert [bench.tokens(id) for id in ids] == [answer_to(greedy(prompt).prompt_ids, 5) for prompt in prompts]
    assert bench.model.n_read == 350 + 4 + 4 * 4
    ends = [bench.end(id) for id in ids]
    assert sum(end.timings.prompt_n for end in ends if isinstance(end, Finished)) == 350 + 4
    bench.assert_nothing_is_held()


def test_the_next_turn_reads_only_what_is_new() -> None:
    bench = Bench()
    prompt = tuple(range(70))
    first = bench.submit(greedy(prompt, max_tokens=10))
    bench.submit(greedy((9, 9, 9)))
    bench.finish()
    turn = (*prompt, *bench.tokens(first), 1, 2, 3)
    n_before = bench.model.n_read
    second = bench.submit(greedy(turn, max_tokens=1))
    bench.finish()
    assert bench.tokens(second) == answer_to(turn, 1)
    assert bench.model.n_read - n_before == 4
    end = bench.end(second)
    assert isinstance(end, Finished)
    assert (end.timings.cached_n, end.timings.prompt_n) == (79, 4)


def test_no_more_than_there_are_places_for() -> None:
    bench = Bench(n_parallel=3)
    ids = [bench.submit(greedy((n,), max_tokens=n + 1)) for n in range(9)]
    while not bench.scheduler.is_idle:
        bench.step()
        assert bench.model.batches[-1].n_tokens <= 3
    assert [bench.tokens(id) for id in ids] == [answer_to((n,), n + 1) for n in range(9)]


def test_requests_wait_for_cells() -> None:
    """Each may come to need 60 of 100 cells, so they take turns although there are places for all."""
    bench = Bench(n_ctx=100, n_cells=100)
    ids = [bench.submit(greedy((n,) * 20, max_tokens=41)) for n in range(5)]
    first_tokens = []
    while not bench.scheduler.is_idle:
        told = bench.step()
        first_tokens += [id for id in told if len(bench.tokens(id)) == 1 and id not in first_tokens]
        assert len([id for id in ids if bench.tokens(id) and len(bench.tokens(id)) < 41]) <= 1
    assert first_tokens == ids, "first come, first served"
    assert [bench.tokens(id) for id in ids] == [answer_to((n,) * 20, 41) for n in range(5)]
    bench.assert_nothing_is_held()


def test_a_context_is_used_to_its_end_by_everyone() -> None:
    bench = Bench(n_parallel=3, n_ctx=30, n_cells=90)
    ids = [bench.submit(replace(greedy((n, n)), max_tokens=None)) for n in range(7)]
    bench.finish()
    assert [bench.tokens(id) for id in ids] == [answer_to((n, n), 29) for n in range(7)]


def test_scored_prompts_beside_others() -> None:
    bench = Bench(n_batch=200)
    writer = bench.submit(greedy((1,), max_tokens=30))
    bench.step()
    prompt = greedy(range(150)).prompt_ids
    others = [bench.submit(greedy(prompt)), bench.submit(replace(greedy(prompt), prompt_logprobs=True, n_logprobs=1))]
    bench.finish()
    (scores,) = (event for event in bench.events[others[1]] if isinstance(event, PromptLogprobs))
    assert [score.top[0][0] for score in scores.tokens if score] == [
        answer_to(prompt[:n], 1)[0] for n in range(1, len(prompt))
    ]
    assert [bench.tokens(id) for id in others] == [answer_to(prompt, 5)] * 2
    assert bench.tokens(writer) == answer_to((1,), 30)


# --- ends --------------------------------------------------------------------------------------------------


def test_cancelling_one_leaves_the_others_alone() -> None:
    bench = Bench(n_parallel=2)
    ids = [bench.submit(greedy(range(n, n + 100), max_tokens=20)) for n in range(3)]
    while not bench.tokens(ids[1]):
        bench.step()
    bench.cancelled |= {ids[0], ids[2]}
    told = bench.step()
    for id in (ids[0], ids[2]):
        assert [event.reason for event in told[id] if isinstance(event, Finished)] == ["cancelled"]
    bench.finish()
    assert bench.tokens(ids[1]) == answer_to(bench.requests[ids[1]].prompt_ids, 20)
    bench.assert_nothing_is_held()


def test_a_prompt_is_given_up_inside_its_batch_when_it_is_alone() -> None:
    bench = Bench()
    id = bench.submit(greedy(range(200)))
    bench.step()
    bench.model.before_each = lambda batch: bench.cancelled.add(id)
    told = bench.step()
    assert [type(event) for event in told[id]] == [Finished]
    again = bench.submit(greedy(range(200)))
    bench.model.before_each = lambda batch: None
    bench.finish()
    assert bench.tokens(again) == answer_to(bench.requests[again].prompt_ids, 5)
    assert bench.model.n_read == 64 + 64 + (200 - 64) + 4, "what was read before the cancelled batch is known"
    bench.assert_nothing_is_held()


def test_only_what_concerns_nobody_else_is_given_up_half_way() -> None:
    bench = Bench()
    bench.submit(greedy((1,), max_tokens=30))
    bench.step()
    bench.submit(greedy(range(200)))
    bench.finish()
    assert bench.model.could_abort == [len(b.runs) == 1 and n == 0 for n, b in enumerate(bench.model.batches)]
    assert any(is_reading(batch) for batch in bench.model.batches)


def test_an_error_of_the_device_ends_those_in_the_batch() -> None:
    bench = Bench(n_parallel=2)
    ids = [bench.submit(greedy((n, n), max_tokens=5)) for n in range(4)]

    def fail(batch: Batch) -> None:
        if len(bench.model.batches) == 3:
            bench.model.cells[:] = -1
            raise OSError("the device is gone")

    bench.model.before_each = fail
    bench.finish()
    ends = [bench.end(id) for id in ids]
    assert [type(end) for end in ends] == [Failed, Failed, Finished, Finished]
    assert isinstance(ends[0], Failed)
    assert "gone" in str(ends[0].error)
    assert [bench.tokens(id) for id in ids[2:]] == [answer_to((n, n), 5) for n in (2, 3)]
    bench.assert_nothing_is_held()


def test_what_cannot_be_read_ends_only_who_needs_it() -> None:
    bench = Bench(n_parallel=3)
    ids = [bench.submit(greedy((n, n + 1), max_tokens=6)) for n in (10, 20, 30)]
    while not all(bench.tokens(id) for id in ids):
        bench.step()
    victim = bench.jobs[ids[1]].sequence
    assert victim is not None
    first = int(victim.cells[0])

    def fail(batch: Batch) -> None:
        if any(int(run.visible[0]) == first for run in batch.runs):
            raise ReadFailedError("the disk is broken")

    bench.model.before_each = fail
    bench.finish()
    ends = [bench.end(id) for id in ids]
    assert [type(end) for end in ends] == [Finished, Failed, Finished]
    assert isinstance(ends[1], Failed)
    assert "disk is broken" in str(ends[1].error)
    assert [bench.tokens(ids[n]) for n in (0, 2)] == [answer_to((m, m + 1), 6) for m in (10, 30)]
    bench.assert_nothing_is_held()


def test_bad_logits_end_one_request() -> None:
    bench = Bench()
    ids = [bench.submit(greedy((n, n), max_tokens=5)) for n in range(3)]

    def spoil(batch: Batch, logits: Logits) -> None:
        if len(batch.runs) == 3:
            logits[1] = np.nan

    bench.model.after_each = spoil
    bench.finish()
    ends = [bench.end(id) for id in ids]
    failed = [id for id, end in zip(ids, ends, strict=True) if isinstance(end, Failed)]
    assert len(failed) == 1
    assert all(isinstance(end.error, BadLogitsError) for end in ends if isinstance(end, Failed))
    for id in set(ids) - set(failed):
        assert bench.tokens(id) == answer_to((id, id), 5)
    bench.assert_nothing_is_held()


def test_requests_that_make_no_sense_are_refused_at_once() -> None:
    bench = Bench()
    with pytest.raises(UsageError, match="prompt is empty"):
        bench.submit(greedy(()))
    with pytest.raises(ContextOverflowError):
        bench.submit(greedy(range(1001)))
    assert bench.scheduler.is_idle


@pytest.mark.parametrize("seed", range(4))
def test_a_thousand_requests_come_and_go_at_random(seed: int) -> None:
    draw = random.Random(seed)
    bench = Bench(n_parallel=draw.randint(1, 6), n_ctx=120, n_cells=draw.choice([130, 256, 700]), n_batch=16)
    bench.model.before_each = lambda batch: _sometimes_fail(draw)
    running: list[int] = []
    while len(bench.requests) < 1000 or not bench.scheduler.is_idle:
        if len(bench.requests) < 1000 and draw.random() < 0.4:
            prompt = [draw.randrange(3) for _ in range(draw.randint(1, 80))]
            request = greedy(tuple(prompt), max_tokens=draw.choice([0, 1, 5, 20, 200]))
            running.append(bench.submit(replace(request, prompt_logprobs=draw.random() < 0.1)))
        if running and draw.random() < 0.1:
            bench.cancelled.add(running.pop(draw.randrange(len(running))))
        bench.step()
    kinds: Counter[str] = Counter()
    for id, request in bench.requests.items():
        end = bench.end(id)
        kinds[end.reason if isinstance(end, Finished) else "failed"] += 1
        assert request.max_tokens is not None
        n_tokens = min(request.max_tokens, bench.n_ctx - len(request.prompt_ids) + 1)
        expected = answer_to(request.prompt_ids, n_tokens)
        got = bench.tokens(id)
        assert got == (expected if isinstance(end, Finished) and end.reason == "length" else expected[: len(got)])
    assert min(kinds[kind] for kind in ("length", "cancelled", "failed")) > 10, kinds
    bench.assert_nothing_is_held()


def _sometimes_fail(draw: random.Random) -> None:
    if draw.random() < 0.01:
        raise OSError("a read failed")
