"""Drafted tokens: which are verified, and that answers are the same with them, in fewer steps."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from slimoe.offload.cache.disk_reader import ReadFailedError
from slimoe.offload.errors import BadLogitsError
from slimoe.offload.graph.batch import Batch
from slimoe.offload.graph.runner import Logits
from slimoe.offload.memory.cells import Cells
from slimoe.offload.requests.drafting import MOST_DRAFTED, MOST_PREDICTED, STEP_SIZES, Drafting, DraftMode
from slimoe.offload.requests.request import Generator, ModelFacts
from slimoe.offload.requests.scheduler import Scheduler
from slimoe.offload.requests.step_times import StepTimes
from slimoe.offload.requests.text_drafts import Draft, TextDrafts
from slimoe.offload.text.generation import Failed, Finished, GenerationRequest, SamplingParams, TokenStep
from tests.models.history_model import N_VOCAB, HistoryModel, answer_to, next_token, repeating_token

GREEDY = SamplingParams(temperature=0.0)


@dataclass
class Run:
    """Requests that were answered together, with the tokens and the end of each."""

    mode: DraftMode
    follow: Callable[[Sequence[int]], int] = repeating_token
    n_parallel: int = 4
    n_batch: int = 64
    n_ctx: int = 400
    n_states: int = 0
    cancelled: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.cells = Cells(2000, self.n_states)
        self.model = HistoryModel(2000, self.follow)
        drafting = Drafting(self.mode)
        self.scheduler = Scheduler(self.cells, self.model.compute, self.n_parallel, self.n_batch, drafting)
        self.jobs: list[Generator] = []
        self.tokens: list[list[int]] = []
        self.ends: dict[int, Finished | Failed] = {}

    def submit(self, request: GenerationRequest) -> None:
        id = len(self.jobs)
        facts = ModelFacts(self.n_ctx, N_VOCAB, None, lambda: {})
        self.jobs.append(Generator(request, facts, lambda: id in self.cancelled, id))
        self.tokens.append([])
        self.scheduler.submit(self.jobs[-1])

    def step(self) -> None:
        for id, event in self.scheduler.step():
            if isinstance(event, TokenStep):
                self.tokens[id].append(event.token)
            if isinstance(event, Finished | Failed):
                self.ends[id] = event

    def answer(self, *requests: GenerationRequest) -> "Run":
        for request in requests:
            self.submit(request)
        while not self.scheduler.is_idle:
            self.step()
        return self

    def finished(self, id: int = 0) -> Finished:
        end = self.ends[id]
        assert isinstance(end, Finished)
        return end


def _is_drafted(batch: Batch) -> bool:
    run = batch.runs[0]
    return run.is_answer and run.n_tokens > 1


def greedy(prompt: Sequence[int], max_tokens: int | None = 120) -> GenerationRequest:
    return GenerationRequest(tuple(prompt), max_tokens, GREEDY)


def test_an_answer_that_repeats_takes_fewer_steps() -> None:
    plain, drafted = (Run(mode).answer(greedy((1, 2, 3))) for mode in ("none", "ngram"))
    assert plain.tokens == drafted.tokens == [answer_to((1, 2, 3), 120, repeating_token)]
    assert len(plain.model.batches) == 120
    assert len(drafted.model.batches) < 80
    timings = drafted.finished().timings
    # The first step draws a token from the prompt, each other one more than it has accepted.
    assert timings.draft_n_accepted == 120 - len(drafted.model.batches)
    assert timings.draft_n == drafted.model.n_read - 3 - (len(drafted.model.batches) - 1)
    assert 0 < timings.draft_n_accepted < timings.draft_n
    assert (plain.finished().timings.draft_n, plain.finished().timings.draft_n_accepted) == (0, 0)


def test_steps_have_few_sizes() -> None:
    run = Run("ngram").answer(*(greedy((n, 2, 3)) for n in range(3)))
    sizes = {batch.n_tokens for batch in run.model.batches[3:]}
    assert sizes <= {1, 2, 3, *STEP_SIZES}
    assert max(sizes) == STEP_SIZES[-1]
    assert all(batch.n_out == batch.n_tokens for batch in run.model.batches[3:])


@pytest.mark.parametrize("n_states", [0, 16], ids=["attention", "recurrent"])
@pytest.mark.parametrize("n_batch", [4, 5, 64])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.3])
def test_with_a_seed_the_answers_are_the_same(temperature: float, n_batch: int, n_states: int) -> None:
    """Also beside each other, with penalties, and up to the end of the context window."""
    draw = random.Random(7)
    requests = [
        replace(
            greedy([draw.randrange(5) for _ in range(draw.randint(1, 90))], draw.choice([0, 1, 2, 3, 150, None])),
            sampling=SamplingParams(temperature, top_k=3, seed=seed, repeat_penalty=draw.choice([1.0, 1.1])),
            n_logprobs=draw.choice([None, 2]),
        )
        for seed in range(12)
    ]
    plain, drafted = (Run(mode, n_batch=n_batch, n_states=n_states) for mode in ("none", "ngram"))
    for run in (plain, drafted):
        run.answer(*requests)
    assert drafted.tokens == plain.tokens
    for id, job in enumerate(drafted.jobs):
        assert drafted.finished(id).reason == plain.finished(id).reason
        tokens, wanted = job.tokens.tolist(), plain.jobs[id].tokens.tolist()
        assert tokens == (wanted[: len(tokens)] if n_states else wanted)
        assert len(wanted) - len(tokens) <= MOST_DRAFTED
    n_least = 20 if n_states else 100 if n_batch > 5 else 50
    assert sum(drafted.finished(id).timings.draft_n_accepted for id in range(12)) > n_least
    assert max(batch.n_tokens for batch in drafted.model.batches) <= n_batch
    assert drafted.cells.n_unused == drafted.cells.n_cells


def test_tokens_before_a_wrong_draft_are_read_again_where_layers_are_recurrent() -> None:
    plain, cut, recurrent = Run("none"), Run("ngram"), Run("ngram", n_states=8)
    for run in (plain, cut, recurrent):
        run.answer(greedy((1, 2, 3)))
    assert recurrent.tokens == cut.tokens == plain.tokens
    timings = recurrent.finished().timings
    assert len(recurrent.model.batches) == 120 - timings.draft_n_accepted < 80
    n_again = recurrent.model.n_read - cut.model.n_read
    assert 0 < n_again <= MOST_DRAFTED * len(recurrent.model.batches) // 4
    assert max(batch.n_tokens for batch in recurrent.model.batches) <= STEP_SIZES[-1]


def test_who_begins_to_write_waits_while_another_reads_again_where_layers_are_recurrent() -> None:
    run = Run("ngram", n_states=16)
    run.submit(greedy((1, 2, 3)))
    while not run.jobs[0].n_again:
        run.step()
    run.answer(greedy((4, 2, 3)))
    assert run.tokens == [answer_to((first, 2, 3), 120, repeating_token) for first in (1, 4)]
    together = [batch for batch in run.model.batches if len(batch.runs) == 2]
    assert {batch.n_tokens for batch in together} == {2}, "drafts are verified for one that writes alone"
    assert len(together) > 60


def test_the_sequence_holds_what_was_answered() -> None:
    """Who goes on from there finds all of it, and nothing else in its cells."""
    run = Run("ngram").answer(greedy((1, 2, 3)))
    said = [1, 2, 3, *run.tokens[0]]
    assert run.jobs[0].tokens.tolist() == said[:-1]
    run.answer(greedy((*said, 50), 1))
    assert run.finished(1).timings.cached_n == len(said) - 1
    assert run.tokens[1] == [repeating_token([*said, 50])]
    assert run.cells.n_unused == run.cells.n_cells
    assert int(run.cells.n_users.sum()) == len(said) + 1


def test_a_new_text_is_not_drafted_for_long() -> None:
    """Where drafts are never right they are soon no longer verified."""

    def alternating(history: Sequence[int]) -> int:
        # Three tokens that come again and again, and then one that depends on all before.
        return next_token(history) if len(history) % 4 == 3 else len(history) % 4

    run = Run("ngram", alternating).answer(greedy((0, 1, 2), 200))
    assert run.tokens == [answer_to((0, 1, 2), 200, alternating)]
    first, last = run.model.batches[1:60], run.model.batches[-60:]
    wrong = [sum(batch.n_tokens - 1 for batch in part) for part in (first, last)]
    assert wrong[1] <= 60, "one draft each at most"


def test_cancelling_between_steps() -> None:
    run = Run("ngram")
    for n in (1, 2):
        run.submit(greedy((n, 2, 3)))
    for _ in range(8):
        run.step()
    run.cancelled.add(0)
    run.answer()
    assert run.finished(0).reason == "cancelled"
    assert run.tokens[0] == answer_to((1, 2, 3), len(run.tokens[0]), repeating_token)
    assert run.jobs[0].tokens.tolist() == [1, 2, 3, *run.tokens[0][:-1]]
    assert run.tokens[1] == answer_to((2, 2, 3), 120, repeating_token)
    assert run.cells.n_unused == run.cells.n_cells


@pytest.mark.parametrize("n_states", [0, 8], ids=["attention", "recurrent"])
def test_what_only_a_draft_needs_may_be_unreadable(n_states: int) -> None:
    """The step is made again without drafts."""
    run, n_failed = Run("ngram", n_states=n_states), 0

    def fail(batch: Batch) -> None:
        nonlocal n_failed
        if _is_drafted(batch):
            n_failed += 1
            raise ReadFailedError("the disk is broken")

    run.model.before_each = fail
    run.answer(greedy((1, 2, 3), 60))
    assert n_failed > 5
    assert run.tokens == [answer_to((1, 2, 3), 60, repeating_token)]
    assert run.finished().timings.draft_n == 0


@pytest.mark.parametrize("n_states", [0, 8], ids=["attention", "recurrent"])
@pytest.mark.parametrize("place", range(60, 76, 3))
def test_what_comes_before_an_error_is_given_out(place: int, n_states: int) -> None:
    """Also where both are in one step."""

    def spoil(batch: Batch, logits: Logits) -> None:
        logits[batch.positions[-batch.n_out :] == place] = np.nan

    runs = Run("none", n_states=n_states), Run("ngram", n_states=n_states)
    for run in runs:
        run.model.after_each = spoil
        run.answer(greedy((1, 2, 3)))
        end = run.ends[0]
        assert isinstance(end, Failed)
        assert isinstance(end.error, BadLogitsError)
        assert len(run.tokens[0]) == place - 2
    assert runs[0].tokens == runs[1].tokens
    assert len(runs[1].model.batches) < len(runs[0].model.batches)


def test_while_a_prompt_is_read_nothing_is_drafted() -> None:
    run = Run("ngram", n_batch=32)
    run.submit(greedy((1, 2, 3)))
    run.step()
    while not _is_drafted(run.model.batches[-1]):
        run.step()
    run.submit(greedy(range(60), 2))
    run.step()
    assert [one.n_tokens for one in run.model.batches[-1].runs] == [8, 1]
    run.answer()
    assert run.tokens[0] == answer_to((1, 2, 3), 120, repeating_token)


def test_a_text_teaches_how_often_its_drafts_are_right() -> None:
    drafts, right = TextDrafts(), TextDrafts()
    for text in (drafts, right):
        text.go_on([1, 2, 3, 4])
    for n in range(30):
        for text, following in ((drafts, 50 + n), (right, 4)):
            text.go_on([1, 2, 3])
            assert text.propose(1).tokens
            text.go_on([following])
    for text in (drafts, right):
        text.go_on([1, 2, 3])
    assert drafts.propose(1).chances[0] < 0.1
    assert right.propose(1).chances[0] > 0.9
    assert right.propose(9).tokens == (4, 1, 2, 3, 4, 1, 2, 3, 4)
    chances = right.propose(9).chances
    assert list(chances) == sorted(chances, reverse=True)


# --- what auto chooses --------------------------------------------------------------------------------------

ON_DISK = {1: 1.0, 2: 1.98, 4: 2.83, 8: 4.18, 16: 5.92}
IN_MEMORY = {n: float(n) for n in (1, *STEP_SIZES)}


def times(by_size: dict[int, float], expected: Callable[[int], float | None] = lambda n: None) -> StepTimes:
    measured = StepTimes(expected)
    for n_tokens, seconds in by_size.items():
        for _ in range(9):
            measured.note(n_tokens, 256, seconds)
    return measured


def draft(chance: float, n: int = MOST_DRAFTED) -> Draft:
    return Draft(tuple(range(n)), tuple(chance**power for power in range(1, n + 1)))


def sizes(drafting: Drafting, *drafts: Draft, n_batch: int = 512, n_again: int | None = None) -> list[int]:
    chosen = drafting.choose(drafts, n_batch, n_again)
    assert all(one.tokens == given.tokens[: len(one.tokens)] for one, given in zip(chosen, drafts, strict=True))
    return [len(one.tokens) for one in chosen]


@pytest.mark.parametrize(
    ("by_size", "chance", "n_drafted"),
    [
        ({1: 1.0, 2: 1.0, 4: 1.0, 8: 1.0, 16: 1.0}, 0.9, 15),
        ({1: 1.0, 2: 1.1, 4: 1.3, 8: 1.6, 16: 2.0}, 0.95, 15),
        ({1: 1.0, 2: 1.1, 4: 1.3, 8: 1.6, 16: 2.0}, 0.6, 3),
        ({1: 1.0, 2: 1.1, 4: 1.3, 8: 1.6, 16: 2.0}, 0.1, 0),
        ({1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0, 16: 16.0}, 0.99, 0),
        ({1: 1.0, 2: 1.0, 4: 9.0, 8: 9.0, 16: 9.0}, 0.5, 1),
    ],
)
def test_auto_takes_what_gives_most_tokens_in_a_second(
    by_size: dict[int, float], chance: float, n_drafted: int
) -> None:
    assert sizes(Drafting("auto", times(by_size)), draft(chance)) == [n_drafted]


def test_auto_drafts_nothing_before_a_step_was_measured() -> None:
    drafting = Drafting("auto")
    assert sizes(drafting, draft(0.99)) == [0]
    for _ in range(9):
        assert sizes(drafting, draft(0.99)) == [0]
        drafting.times.note(1, 256, 1.0)
    assert sizes(drafting, draft(0.99)) == [1]
    drafting.times.forget()
    assert sizes(drafting, draft(0.99)) == [0]


def test_auto_believes_the_plan_until_it_has_measured() -> None:
    expected = {1: 10.0, 2: 19.0, 4: 35.0, 8: 60.0, 16: 110.0}
    drafting = Drafting("auto", times({1: 1.0}, expected.get))
    assert sizes(drafting, draft(0.8)) == [0]
    for _ in range(2):
        drafting.times.note(4, 256, 3.0)
    # No longer than between the sizes that were measured.
    assert drafting.times.seconds(8) == pytest.approx(3 * (1 + 0.4 * (3**0.5 - 1)))
    drafting = Drafting("auto", times({1: 1.0}, {1: 10.0, 2: 19.0, 4: 29.0, 8: 41.0, 16: 60.0}.get))
    assert sizes(drafting, draft(0.97)) == [15]
    assert times({1: 1.0, 4: 3.0}).seconds(16) is None, "twice what was measured at most"


def test_larger_steps_are_tried_as_long_as_they_may_pay() -> None:
    """As on a disk: two tokens have hardly an expert in common, sixteen have nearly all."""
    taken, drafting, tried = ON_DISK, Drafting("auto"), list[int]()
    assert draft(0.9).chances[0] * 1.0 + 1 < taken[2], "two tokens do not pay by themselves"
    for _ in range(40):
        size = 1 + sizes(drafting, draft(0.9))[0]
        tried.append(size)
        drafting.times.note(size, 256, taken[size])
    assert tried[:19] == [1] * 9 + [2, 2, 4, 4, 8, 8, 16, 16, 16, 16]
    assert set(tried[19:]) == {16}


def test_steps_whose_time_is_that_of_their_tokens_are_left_alone() -> None:
    """As where processors are busy with each token: what is tried is tried twice, once it is built."""
    drafting, tried = Drafting("auto"), list[int]()
    for _ in range(200):
        size = 1 + sizes(drafting, draft(0.7))[0]
        tried.append(size)
        drafting.times.note(size, 256, size * 1.0)
    assert tried[:70] == [1] * 9 + [2, 2] + [1] * 59
    assert tried.count(1) > 190


def test_auto_goes_on_at_a_gain_that_it_would_not_begin_at() -> None:
    drafting = Drafting("auto", times({1: 1.0, 2: 1.5, 4: 9.0, 8: 9.0, 16: 9.0}))
    little, much = draft(0.6), draft(0.7)
    assert [sizes(drafting, one) for one in (little, much, little)] == [[0], [1], [1]]
    assert sizes(drafting, draft(0.4)) == [0]
    assert sizes(drafting, little) == [0]


def test_what_was_slow_once_is_tried_again() -> None:
    drafting, waited = Drafting("auto", times({1: 1.0})), list[int]()
    for _ in range(5):
        n_single = 0
        while sizes(drafting, draft(0.9)) == [0]:
            drafting.times.note(1, 256, 1.0)
            n_single += 1
            assert n_single < 5000
        drafting.times.note(2, 256, 90.0)
        waited.append(n_single)
    assert waited[:2] == [0, 0], "the first time a graph is built"
    assert 50 < waited[2] < waited[3] < waited[4], "later and later"


def test_a_step_that_builds_a_graph_does_not_count() -> None:
    measured = times({1: 1.0})
    measured.note(1, 512, 50.0)
    assert measured.seconds(1) == 1.0
    measured.note(1, 512, 1.0)
    assert measured.seconds(1) == 1.0
    for n_kv in range(0, 5120, 256):
        measured.note(4, n_kv, 7.0)
    assert measured.seconds(4) == pytest.approx(7.0), "where every one does it counts"


def test_the_likeliest_tokens_of_all_requests_are_taken() -> None:
    drafting = Drafting("auto", times({1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0, 8: 1.0, 16: 99.0}))
    assert sizes(drafting, draft(0.9), draft(0.1), draft(0.8)) == [4, 0, 1]
    assert sizes(drafting, draft(0.9), Draft(), draft(0.8), n_batch=7) == [1, 0, 0]
    assert sizes(drafting, *[draft(0.9)] * 20) == [0] * 20


def test_auto_has_the_block_draft_where_that_saves_time() -> None:
    by_size = {1: 1.0, 2: 1.2, 3: 1.4, 4: 1.6}
    drafting = Drafting("auto", times(by_size))
    assert drafting.n_predicted(1, None) == 3, "2.53 tokens in 1.6 steps' time"
    for _ in range(99):
        drafting.block.note_time(3, 1.5)
    assert drafting.n_predicted(1, None) == 0, "a draft takes half a step"
    for _ in range(999):
        drafting.block.note_time(3, 0.15)
        drafting.block.note_right(3, 3)
    assert drafting.n_predicted(1, None) == 3
    for _ in range(99):
        drafting.block.note_right(1, 0)
    assert drafting.n_predicted(1, None) == 0, "nothing is right any more"
    for _ in range(9999):
        drafting.n_predicted(1, None)
    assert drafting.n_predicted(1, None) > 0, "it is tried again, later"


def test_of_what_the_block_has_drafted_any_number_is_verified() -> None:
    drafting = Drafting("auto", times({1: 1.0, 2: 1.2, 3: 1.4, 4: 1.6}))
    chosen = drafting.choose([draft(0.8, 2)], 512, is_predicted=True)
    assert [len(one.tokens) for one in chosen] == [2]
    assert sizes(drafting, draft(0.8, 2)) == [1], "others in few sizes of steps"


def speed_of_auto(taken: dict[int, float], chance: float, n_tokens: int) -> float:
    """How many times as fast so many tokens come, where each drafted one is right with this chance."""
    drafting, draw, seconds, n_done = Drafting("auto"), random.Random(3), 0.0, 0
    while n_done < n_tokens:
        n_drafted = sizes(drafting, draft(chance))[0]
        n_gained = 1 + next((n for n in range(n_drafted) if draw.random() >= chance), n_drafted)
        drafting.settle(1, n_gained, taken[1 + n_drafted], is_plain=not n_drafted)
        drafting.times.note(1 + n_drafted, 256, taken[1 + n_drafted])
        seconds, n_done = seconds + taken[1 + n_drafted], n_done + n_gained
    return n_done * taken[1] / seconds


@pytest.mark.parametrize("chance", [0.3, 0.5, 0.7, 0.9, 0.99])
def test_what_auto_tries_in_vain_costs_little(chance: float) -> None:
    assert speed_of_auto(IN_MEMORY, chance, 300) > 0.97
    assert speed_of_auto(IN_MEMORY, chance, 20000) > 0.995


def test_auto_is_faster_where_tokens_share_experts_that_are_read() -> None:
    assert speed_of_auto(ON_DISK, 0.9, 300) > 1.3
    assert speed_of_auto(ON_DISK, 0.98, 2000) > 2
    assert speed_of_auto(ON_DISK, 0.3, 2000) > 0.99


def test_drafts_that_never_pay_are_given_up_however_likely_they_seem() -> None:
    """As where what they need is read from a disk that others keep busy."""
    drafting, n_drafted = Drafting("auto", times({1: 1.0, 2: 1.0, 4: 1.0, 8: 1.0, 16: 1.0})), 0
    for _ in range(1000):
        n = sizes(drafting, draft(0.9))[0]
        drafting.settle(1, 1, 1.0 + n, is_plain=not n)
        n_drafted += n
    assert 0 < n_drafted < 40


def test_auto_rests_after_a_look_in_vain() -> None:
    """By the time that the look took; the others look before each step."""
    drafting = Drafting("auto")
    for seconds, n_steps in ((1e-5, 1), (1e-4, 8), (5e-4, 16), (1.0, 16)):
        drafting.looked(seconds, is_found=False)
        n_rested = 0
        while not n_rested or not drafting.is_due:
            drafting.settle(1, 1, 0.01, is_plain=True)
            n_rested += 1
        assert n_rested <= n_steps + 1
        assert n_rested >= n_steps
    drafting.looked(1.0, is_found=True)
    assert drafting.is_due
    for mode in ("ngram", "mtp"):
        other = Drafting(mode)
        other.looked(1.0, is_found=False)
        assert other.is_due


def test_a_block_that_is_hardly_ever_right_drafts_seldom() -> None:
    drafting, counts = Drafting("mtp"), list[int]()
    for _ in range(1000):
        counts.append(drafting.n_predicted(1, None))
        drafting.block.note_right(counts[-1], 0)
    assert sum(map(bool, counts[:300])) < 16
    assert 0 < sum(map(bool, counts[300:])) < 10
    for _ in range(10):
        drafting.block.note_right(3, 3)
    assert [drafting.n_predicted(1, None) for _ in range(5)] == [MOST_PREDICTED] * 5


def test_reading_again_is_a_price_where_layers_are_recurrent() -> None:
    """Of one draft with the chance 0.6, 0.4 tokens are read again, each for 0.3 of a step."""
    by_size = {1: 1.0, 2: 1.3, 4: 9.0, 8: 9.0, 16: 9.0}
    assert sizes(Drafting("auto", times(by_size)), draft(0.47)) == [1]
    assert sizes(Drafting("auto", times(by_size)), draft(0.47), n_again=0) == [0], "1.47 tokens in 1.3 + 0.53 * 0.3"
    assert sizes(Drafting("auto", times(by_size)), draft(0.6), n_again=0) == [1]
    by_size = {1: 1.0, 2: 1.3, 3: 1.3, 4: 1.4, 8: 9.0, 16: 9.0}
    assert sizes(Drafting("auto", times(by_size)), draft(0.9), n_again=2) == [1]
    assert sizes(Drafting("auto", times(by_size)), draft(0.9), n_again=15) == [0]
    assert sizes(Drafting("ngram"), draft(0.99), n_again=6) == [9]


def test_ngram_takes_what_is_rather_right_than_wrong() -> None:
    drafting = Drafting("ngram")
    assert sizes(drafting, draft(0.99)) == [15]
    assert sizes(drafting, draft(0.9)) == [3]
    assert sizes(drafting, draft(0.6)) == [1]
    assert sizes(drafting, draft(0.4)) == [0]
    assert sizes(drafting, Draft()) == [0]
