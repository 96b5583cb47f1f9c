"""Drafts of a model's own block: it is given each token with the hidden states before it, and answers stay the same."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from slimoe.offload.cache.disk_reader import ReadFailedError
from slimoe.offload.graph.batch import Batch
from slimoe.offload.graph.runner import Hidden, Logits
from slimoe.offload.memory.cells import Cells
from slimoe.offload.model.mtp_block import MOST_WAITING
from slimoe.offload.requests.drafting import MOST_PREDICTED, Drafting, DraftMode
from slimoe.offload.requests.mtp_drafts import MtpDrafts
from slimoe.offload.requests.request import Generator, ModelFacts
from slimoe.offload.requests.scheduler import Scheduler
from slimoe.offload.text.generation import Failed, Finished, GenerationRequest, SamplingParams, TokenStep
from tests.models.history_model import N_VOCAB, HistoryModel, answer_to, next_token

GREEDY = SamplingParams(temperature=0.0)
N_CELLS = 2000


class HistoryBlock:
    """Checks that hidden states are those of the token before, and predicts what the model says, but for some texts.

    The model's hidden states are the token and its position; the block's own are -1 and the position.
    """

    def __init__(self) -> None:
        self.cells = np.full(N_CELLS, -1, np.int32)
        self.n_predicted = self.n_unknown = 0
        self.most_read = 0
        self.fails_from = 1 << 30
        self.n_stored, self.is_right = 0, True

    def store(self, batch: Batch, hidden: Hidden) -> None:
        row, self.n_stored = 0, self.n_stored + batch.n_tokens
        for run in batch.runs:
            begin = len(run.visible) - run.n_tokens
            for index in range(run.n_tokens):
                token, position = hidden[row + index].tolist()
                before = batch.tokens[row + index - 1] if index else self.cells[run.visible[begin - 1]]
                if begin and not index and not hidden[row].any():
                    self.n_unknown += 1
                elif begin + index and token >= 0:
                    assert (token, position) == (before, begin + index - 1)
                elif begin + index:
                    assert position == begin + index - 1
                else:
                    assert (token, position) == (0, 0), "nothing is before the first token"
            row += run.n_tokens
        self.cells[batch.cells] = batch.tokens

    def predict(self, batch: Batch, hidden: Hidden) -> tuple[Logits, Hidden]:
        assert batch.n_out == len(batch.runs)
        self.store(batch, hidden)
        if self.n_predicted >= self.fails_from:
            raise ReadFailedError("the disk is broken")
        self.n_predicted += len(batch.runs)
        self.most_read = max(self.most_read, batch.n_tokens)
        logits, last = np.zeros((len(batch.runs), N_VOCAB), np.float32), np.empty((len(batch.runs), 2), np.float32)
        for index, run in enumerate(batch.runs):
            history = self.cells[run.visible].tolist()
            token = next_token(history)
            logits[index, token if self.is_right and len(history) % 5 else (token + 1) % N_VOCAB] = 9
            last[index] = -1, len(history) - 1
        return logits, last


@dataclass
class Run:
    """Requests that were answered together."""

    mode: DraftMode
    n_states: int = 0
    n_batch: int = 64
    tokens: dict[int, list[int]] = field(default_factory=dict)
    ends: dict[int, Finished] = field(default_factory=dict)
    drafting: Drafting | None = None

    def __post_init__(self) -> None:
        self.cells, self.model, self.block = Cells(N_CELLS, self.n_states), HistoryModel(N_CELLS), HistoryBlock()
        self.has_block = True
        mtp = MtpDrafts(lambda: self.block if self.has_block else None, self._hidden, self.cells)
        drafting = self.drafting or Drafting(self.mode)
        self.scheduler = Scheduler(self.cells, self.model.compute, 4, self.n_batch, drafting, None, mtp)
        self._facts = ModelFacts(400, N_VOCAB, None, lambda: {})

    def _hidden(self) -> Hidden:
        batch = self.model.batches[-1]
        return np.stack([batch.tokens, batch.positions], axis=1).astype(np.float32)

    def submit(self, request: GenerationRequest) -> None:
        self.scheduler.submit(Generator(request, self._facts, lambda: False, len(self.tokens)))
        self.tokens[len(self.tokens)] = []

    def step(self) -> None:
        for id, event in self.scheduler.step():
            assert not isinstance(event, Failed), event.error
            if isinstance(event, TokenStep):
                self.tokens[id].append(event.token)
            if isinstance(event, Finished):
                self.ends[id] = event

    def answer(self, *requests: GenerationRequest) -> "Run":
        for request in requests:
            self.submit(request)
        while not self.scheduler.is_idle:
            self.step()
        return self


def greedy(prompt: Sequence[int], max_tokens: int | None = 120) -> GenerationRequest:
    return GenerationRequest(tuple(prompt), max_tokens, GREEDY)


recurrent = pytest.mark.parametrize("n_states", [0, 16], ids=["attention", "recurrent"])


@recurrent
def test_most_of_what_the_block_says_is_accepted(n_states: int) -> None:
    run = Run("mtp", n_states).answer(greedy((1, 2, 3)))
    assert run.tokens[0] == answer_to((1, 2, 3), 120)
    timings = run.ends[0].timings
    assert len(run.model.batches) == 120 - timings.draft_n_accepted
    assert 60 < timings.draft_n_accepted < timings.draft_n
    assert run.block.n_predicted == timings.draft_n, "nothing is predicted that is not verified"
    assert run.cells.n_unused == run.cells.n_cells


@recurrent
@pytest.mark.parametrize("n_batch", [4, 5, 64])
def test_answers_are_the_same_beside_each_other(n_batch: int, n_states: int) -> None:
    draw = random.Random(7)
    requests = [
        replace(
            greedy([draw.randrange(5) for _ in range(draw.randint(1, 90))], draw.choice([0, 1, 2, 3, 150, None])),
            sampling=SamplingParams(draw.choice([0.0, 0.3, 2.0]), top_k=3, seed=seed),
        )
        for seed in range(12)
    ]
    plain, drafted = (Run(mode, n_states, n_batch) for mode in ("none", "mtp"))
    for run in (plain, drafted):
        run.answer(*requests)
    assert drafted.tokens == plain.tokens
    assert drafted.block.n_unknown <= len(requests), "only where a text goes on from what another one has read"
    assert sum(end.timings.draft_n_accepted for end in drafted.ends.values()) > 40
    assert max(batch.n_tokens for batch in drafted.model.batches) <= n_batch


class Seldom(Drafting):
    """Drafts for one step of so many."""

    def __init__(self, period: int) -> None:
        super().__init__("mtp")
        self._period, self._n_steps = period, 0

    def n_predicted(self, n_writing: int, n_again: int | None) -> int:
        self._n_steps += 1
        return 0 if self._n_steps % self._period else MOST_PREDICTED


@recurrent
@pytest.mark.parametrize("n_batch", [5, 64])
def test_what_was_said_while_the_block_rested_is_known_when_it_drafts_again(n_batch: int, n_states: int) -> None:
    run = Run("mtp", n_states, n_batch, drafting=Seldom(9)).answer(greedy((1, 2, 3), 350))
    assert run.tokens[0] == answer_to((1, 2, 3), 350)
    assert run.block.n_unknown == 0
    assert run.ends[0].timings.draft_n_accepted > 30


@recurrent
def test_a_block_that_is_wrong_is_soon_at_rest_and_reads_nothing(n_states: int) -> None:
    run = Run("mtp", n_states)
    run.block.is_right = False
    run.answer(greedy((1, 2, 3), 200))
    assert run.tokens[0] == answer_to((1, 2, 3), 200)
    assert run.block.n_stored < 80


@recurrent
def test_after_a_long_rest_many_tokens_are_read_at_once(n_states: int) -> None:
    run = Run("mtp", n_states, drafting=Seldom(10000)).answer(greedy((1, 2, 3), 300))
    assert run.tokens[0] == answer_to((1, 2, 3), 300)
    assert run.block.n_predicted == 0
    assert run.block.n_stored in (MOST_WAITING + 2, MOST_WAITING + 3)


def test_few_tokens_are_predicted_and_read_again() -> None:
    run = Run("mtp", 16).answer(greedy((1, 2, 3)))
    assert max(batch.n_tokens for batch in run.model.batches) <= 8
    assert 1 < run.block.most_read <= 8, "the tokens that are read again, and the one drawn last"
    plain = Run("mtp").answer(greedy((1, 2, 3)))
    assert max(batch.n_tokens for batch in plain.model.batches) == 1 + MOST_PREDICTED
    assert plain.block.most_read == 1


def test_a_model_that_is_opened_anew_may_be_without_the_block() -> None:
    run = Run("mtp")
    run.submit(greedy((1, 2, 3)))
    for _ in range(9):
        run.step()
    run.has_block = False
    n_predicted = run.block.n_predicted
    for _ in range(9):
        run.step()
    assert run.block.n_predicted == n_predicted > 0
    run.answer()
    assert run.tokens[0] == answer_to((1, 2, 3), 120)


def test_a_block_that_cannot_be_run_any_more_drafts_nothing() -> None:
    run = Run("mtp")
    run.block.fails_from = 31
    run.answer(greedy((1, 2, 3)))
    assert run.tokens[0] == answer_to((1, 2, 3), 120)
    assert 0 < run.ends[0].timings.draft_n <= 31


def test_auto_lets_the_block_draft_what_the_text_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock on which a step of any size takes as long as drafting a hundred tokens."""
    run, now = Run("auto"), 0.0

    def advance(*_: object) -> None:
        nonlocal now
        now += 1.0

    run.model.after_each = advance
    monkeypatch.setattr("time.perf_counter", lambda: now)
    run.answer(greedy((1, 2, 3), 300))
    assert run.tokens[0] == answer_to((1, 2, 3), 300)
    assert run.ends[0].timings.draft_n_accepted > 150
