"""Several requests at once: decides what each step reads, and hands every request its logits.

A step decodes one token of every request that is writing, and reads a part of one prompt that is not yet read; the
parts are small while others write, and waiting prompts take turns. So nobody who writes waits for longer than a small
part of a prompt takes, and no prompt waits behind a long one.

Where layers are recurrent, all sequences of a step read equally many tokens: steps that decode and steps that read a
prompt take turns. A prompt's parts end where others may go on from: behind each part, and a little before its end.
There drafts are verified while one request writes alone. When one was wrong the sequence goes on from the state before
the step: the next one reads the tokens that were right again, whose experts have just been used. This takes no memory,
and no time where all were right, while a state for each drafted token would be written in every step.
"""

import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from slimoe.offload.cache.disk_reader import ReadFailedError
from slimoe.offload.ggml.cpu_backend import EngineAbortedError
from slimoe.offload.graph.batch import Batch, make_batch
from slimoe.offload.graph.runner import Logits
from slimoe.offload.memory.cells import Cells, Sequence
from slimoe.offload.memory.prompt_cache import PromptCache
from slimoe.offload.requests.drafting import MOST_DRAFTED, Drafting
from slimoe.offload.requests.mtp_drafts import MtpDrafts
from slimoe.offload.requests.request import Generator
from slimoe.offload.requests.text_drafts import NO_DRAFT, Draft
from slimoe.offload.text.generation import Failed, Outcome

Compute = Callable[[Batch, Callable[[], bool] | None], Logits]

_STATE_STEP = 32
"""Of a prompt the state is kept that it has at a multiple of so many tokens, the last before its end: what is asked
next often differs in the last tokens of it, which close the question and open the answer."""
_LEAST_BEHIND = 8
"""And so many tokens before its end at least."""
_MOST_READ = 8
"""Tokens of a step with predicted ones where layers are recurrent, of which some may be read again."""
_PROMPT_SHARE = 4
"""While other requests write, a step reads a quarter of a batch of a prompt: they wait little, and it is not much
slower."""


class _Part(NamedTuple):
    """What a step reads for one request."""

    job: Generator
    sequence: Sequence
    tokens: tuple[int, ...]
    n_drafted: int = 0
    """How many of the tokens, from the last, are drafts."""

    def without_draft(self) -> "_Part":
        """The same without the tokens that need not be read."""
        return _Part(self.job, self.sequence, self.tokens[: len(self.tokens) - self.n_drafted])


class Scheduler:
    """Requests in turn: at most `n_parallel` are active, the others wait in order.

    A request becomes active once there are cells for all tokens that the active requests and it may come to; so none
    gets stuck half-way. `compute` runs one step of at most `n_batch` tokens. What
    `prompts` have on disk is read in place of being computed. `mtp` drafts tokens that the text does not.
    """

    def __init__(
        self,
        cells: Cells,
        compute: Compute,
        n_parallel: int,
        n_batch: int,
        drafting: Drafting | None = None,
        prompts: PromptCache | None = None,
        mtp: MtpDrafts | None = None,
    ) -> None:
        assert 1 <= n_parallel <= n_batch
        self._drafting, self._prompts, self._mtp = drafting or Drafting(), prompts, mtp
        self._cells, self._compute = cells, compute
        self._n_parallel, self._n_batch = n_parallel, n_batch
        self._waiting: deque[Generator] = deque()
        self._active: list[Generator] = []
        self._has_decoded = False
        self._borrowers: set[Generator] = set()

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._waiting and not self._active

    def read_at_most(self, n_batch: int) -> None:
        """Steps have at most so many tokens from now on."""
        assert self._n_parallel <= n_batch
        self._n_batch = n_batch

    @property
    def n_active(self) -> int:
        """Requests that are being answered."""
        return len(self._active)

    def submit(self, job: Generator, sequence: Sequence | None = None) -> None:
        """Queues a request. It goes on from `sequence`, which stays the caller's, or else has one of its own."""
        if sequence is not None:
            job.sequence = sequence
            self._borrowers.add(job)
        self._waiting.append(job)

    def drop(self, job: Generator) -> None:
        """Forgets a request whose answer nobody waits for any more."""
        if job in self._waiting:
            self._waiting.remove(job)
            self._borrowers.discard(job)
            job.release()
        elif job in self._active:
            self._retire(job)

    def step(self) -> list[Outcome]:
        """Computes one step for all requests, and returns what came of it for each."""
        outcomes = [self._cancel(job) for job in (*self._active, *self._waiting) if job.is_cancelled()]
        self._admit()
        parts = self._choose()
        return outcomes + self._read(parts) if parts else outcomes

    # --- who takes part ------------------------------------------------------------------------------------

    def _cancel(self, job: Generator) -> Outcome:
        self.drop(job)
        return Outcome(job.id, job.finish("cancelled"))

    def _admit(self) -> None:
        while self._waiting and len(self._active) < self._n_parallel:
            jobs = (*self._active, self._waiting[0])
            if sum(job.n_tokens_at_most - len(job.sequence or ()) for job in jobs) > self._cells.n_unused:
                break
            job = self._waiting.popleft()
            if job.sequence is None:
                job.sequence = self._cells.begin()
            self._active.append(job)
        if len(self._active) > 1:
            for job in self._active:
                job.has_company = True

    def _choose(self) -> list[_Part]:
        """The next part of one prompt, and the last token of everyone who is writing; with states only one of both."""
        writing = [job for job in self._active if not job.is_reading]
        parts = [_part(job, 1) for job in writing]
        reading = next((job for job in self._active if job.is_reading), None)
        if self._cells.has_states:
            parts = _equally_long(parts)
        if reading is None:
            # Nobody is left where the last answer was cancelled just now.
            may_draft = bool(parts) and self._drafting.is_due and (len(writing) == 1 or not self._cells.has_states)
            return self._with_drafts(parts) if may_draft else parts
        if self._cells.has_states:
            self._has_decoded = bool(writing) and not self._has_decoded
            if self._has_decoded:
                return parts
            parts = []
        self._active.remove(reading)
        self._active.append(reading)
        # What others have read of the same prompt, also since this one began, is taken over.
        assert reading.sequence is not None
        self._cells.adopt(reading.sequence, reading.shareable)
        reading.skip(len(reading.sequence))
        if not self._load(reading, is_alone=not writing):
            return parts
        room = self._n_batch - len(parts)
        if writing:
            room = min(room, max(1, self._n_batch // _PROMPT_SHARE))
        if self._cells.has_states:
            room = min(room, self._n_to_state(reading) or room)
        return [_part(reading, room), *parts]

    def _with_drafts(self, parts: list[_Part]) -> list[_Part]:
        """The same with the drafts that are worth being verified in this step."""
        n_room = self._n_batch - sum(len(part.tokens) for part in parts)
        n_again = parts[0].job.n_again if self._cells.has_states else None
        n_each = n_room // len(parts)
        if self._drafting.mode == "mtp":
            chosen = self._predicted(parts, min(n_each, self._drafting.n_predicted(len(parts), n_again)))
        else:
            begin, n_predicted = time.perf_counter(), 0
            drafts = [part.job.draft(max(0, min(MOST_DRAFTED, n_room))) for part in parts]
            chosen = self._drafting.choose(drafts, self._n_batch, n_again)
            is_found = any(draft.tokens for draft in chosen)
            if self._mtp is not None and self._mtp.is_ready and not is_found:
                n_predicted = min(n_each, self._drafting.n_predicted(len(parts), n_again))
            self._drafting.looked(time.perf_counter() - begin, is_found=is_found or n_predicted > 0)
            if n_predicted:
                drafts = self._predicted(parts, n_predicted)
                chosen = self._drafting.choose(drafts, self._n_batch, n_again, is_predicted=True)
        return [
            part._replace(tokens=part.tokens + draft.tokens, n_drafted=len(draft.tokens))
            for part, draft in zip(parts, chosen, strict=True)
        ]

    def _predicted(self, parts: list[_Part], n_most: int) -> list[Draft]:
        """What the block that predicts tokens drafts for each part, at most so many."""
        if self._mtp is None or n_most <= 0:
            return [NO_DRAFT] * len(parts)
        jobs = [part.job for part in parts]
        if self._cells.has_states:
            # Else one wrong draft after the other would let each step read all of those before again.
            n_most = min(n_most, _MOST_READ - len(parts[0].tokens))
        begin = time.perf_counter()
        drafts = self._mtp.propose(jobs, [min(n_most, job.n_draftable) for job in jobs], self._n_batch)
        self._drafting.predicted(sum(len(draft.tokens) for draft in drafts), time.perf_counter() - begin)
        return drafts

    def _load(self, reading: Generator, *, is_alone: bool) -> bool:
        """Reads what is on disk of a prompt, or a part of it; whether the rest is to be computed."""
        if self._prompts is None:
            return True
        assert reading.sequence is not None
        is_done = self._prompts.load(reading.sequence, reading.shareable, reading.is_cancelled, is_alone=is_alone)
        reading.skip(len(reading.sequence))
        return is_done

    def _n_to_state(self, reading: Generator) -> int:
        """Tokens up to the last place before a prompt's end where its state is kept; 0 behind that."""
        assert reading.sequence is not None
        return max(0, _last_place(reading) - len(reading.sequence))

    # --- what comes of it ----------------------------------------------------------------------------------

    def _read(self, parts: list[_Part]) -> list[Outcome]:
        before = [len(part.sequence) for part in parts]
        self._cells.begin_step()
        for part in parts:
            self._cells.append(part.sequence, part.tokens)
        n_rows = [part.job.n_rows(len(part.tokens)) for part in parts]
        moves = [move for part in parts for move in part.sequence.moves]
        answers = [index for index, part in enumerate(parts) if not part.job.is_reading]
        inputs = [(part.tokens, part.sequence.cells) for part in parts]
        windows = [self._cells.window(part.sequence, len(part.tokens)) for part in parts]
        batch = make_batch(inputs, max(1, sum(n_rows)), moves, answers, windows)
        is_timed, begin = not any(part.job.is_reading for part in parts), time.perf_counter()
        # Only a request alone may stop a step half-way, and only in its prompt: one token is over soon enough.
        may_stop = len(parts) == 1 and parts[0].job.is_reading
        try:
            logits = self._compute(batch, parts[0].job.is_cancelled if may_stop else None)
        except EngineAbortedError:
            self._undo(parts, before)
            return [self._cancel(part.job) for part in parts]
        except ReadFailedError as error:
            if len(parts) == 1 and not parts[0].n_drafted:
                return [self._fail(parts[0].job, error)]
            # Only who needs what cannot be read shall fail.
            self._undo(parts, before)
            return [outcome for part in parts for outcome in self._read([part.without_draft()])]
        except Exception as error:
            return [self._fail(part.job, error) for part in parts]
        seconds, n_accepted = time.perf_counter() - begin, self._drafting.n_accepted
        if not is_timed and self._prompts is not None:
            self._prompts.computed(batch.n_tokens, seconds)
        if self._mtp is not None:
            self._mtp.computed(batch, [part.job for part in parts], self._n_batch)
        outcomes = []
        row = len(logits) - sum(n_rows)
        for part, n in zip(parts, n_rows, strict=True):
            outcomes += self._take(part, logits[row : row + n])
            row += n
        if is_timed and self._drafting.is_wanted:
            n_gained, is_plain = len(parts) + self._drafting.n_accepted - n_accepted, batch.n_tokens == len(parts)
            self._drafting.settle(len(parts), n_gained, seconds, is_plain=is_plain)
            self._drafting.times.note(batch.n_tokens, batch.n_kv, seconds)
        return outcomes

    def _take(self, part: _Part, logits: Logits) -> list[Outcome]:
        job = part.job
        try:
            if job.is_reading:
                self._cells.keep(part.sequence)
                self._cells.keep_window(part.sequence, _last_place(job))
                self._note(job)
            events = job.take(part.tokens, logits)
        except Exception as error:
            return [self._fail(job, error)]
        self._cut_rejected(part)
        if job.is_over:
            self._retire(job)
        return [Outcome(job.id, event) for event in events]

    def _cut_rejected(self, part: _Part) -> None:
        """Takes drafts that were wrong out of the sequence, and with them what then has to be read again."""
        job = part.job
        if part.n_drafted:
            self._drafting.n_accepted += part.n_drafted - job.n_rejected
        if job.n_rejected:
            right = part.tokens[: len(part.tokens) - job.n_rejected]
            n_wanted = len(part.sequence) - job.n_rejected
            self._cells.truncate(part.sequence, n_wanted)
            job.read_again(right[len(right) - (n_wanted - len(part.sequence)) :])
        if self._mtp is not None:
            n_predicted = self._mtp.taken(job, part.n_drafted)
            self._drafting.block.note_right(n_predicted, max(0, n_predicted - job.n_rejected))
        job.n_rejected = 0

    def _undo(self, parts: list[_Part], before: list[int]) -> None:
        """Takes the parts' tokens out of their sequences again: their cells hold nothing of use."""
        for part, n_kept in zip(parts, before, strict=True):
            self._cells.truncate(part.sequence, n_kept)

    def _fail(self, job: Generator, error: Exception) -> Outcome:
        """Ends a request whose cells may hold anything."""
        assert job.sequence is not None
        self._cells.truncate(job.sequence, 0)
        self._retire(job)
        return Outcome(job.id, Failed(error))

    def _retire(self, job: Generator) -> None:
        self._active.remove(job)
        assert job.sequence is not None
        job.is_over = True
        job.release()
        if self._mtp is not None:
            self._mtp.forget(job)
        self._note(job, is_done=True)
        if job in self._borrowers:
            self._borrowers.remove(job)
        else:
            self._cells.remember(job.sequence)

    def _note(self, job: Generator, *, is_done: bool = False) -> None:
        """Lets be kept on disk what was computed, unless it was only to be scored."""
        if self._prompts is not None and job.sequence is not None and job.shareable:
            self._prompts.note(job.sequence, is_done=is_done)


def _equally_long(parts: list[_Part]) -> list[_Part]:
    """The parts that have most tokens: those of others wait for a step, while a request reads tokens again."""
    longest = max((len(part.tokens) for part in parts), default=0)
    return [part for part in parts if len(part.tokens) == longest]


def _last_place(job: Generator) -> int:
    """The place before a prompt's end that is kept."""
    return max(0, len(job.shareable) - _LEAST_BEHIND) // _STATE_STEP * _STATE_STEP


def _part(job: Generator, n_most: int) -> _Part:
    assert job.sequence is not None
    return _Part(job, job.sequence, job.next_tokens(n_most))
