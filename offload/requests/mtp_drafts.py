"""Drafts the next tokens of answers with the block that predicts a further token (MTP), one after the other.

The block reads a token and the hidden states that the model had before it, and predicts what follows; what it predicts
it reads again, with hidden states of its own. Its keys and values of a prompt are stored part by part; those of an
answer wait until something is drafted, or until they are many: so a block at rest takes little time. Where some are
missing, as of a text whose own were read from disk, drafts are worse; answers never depend on them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from slimoe.offload.errors import SlimoeError
from slimoe.offload.graph.batch import Batch, make_batch
from slimoe.offload.graph.runner import Hidden, Logits
from slimoe.offload.memory.cells import Cells
from slimoe.offload.model.mtp_block import MOST_WAITING
from slimoe.offload.requests.drafting import MOST_PREDICTED
from slimoe.offload.requests.request import Generator
from slimoe.offload.requests.text_drafts import NO_DRAFT, Acceptance, Draft

_MOST_ROWS = 16
"""Hidden states that are kept of a step: those of a step that verifies drafts."""
_LIKELY = 0.5
"""No further token is predicted behind one that is less likely, with all before it, to be right."""
_CLASSES = ((0.2, 0.15), (0.4, 0.3), (0.6, 0.5), (0.8, 0.7), (0.95, 0.85), (1.0, 0.95))
"""Largest probabilities, as the block gives them, of classes that are counted apart, and the chance that is assumed."""


class Block(Protocol):
    """What runs the block, such as an `MtpRunner`."""

    def store(self, batch: Batch, hidden: Hidden) -> None:
        """Stores the keys and values of a batch's tokens, each with the hidden states before it."""

    def predict(self, batch: Batch, hidden: Hidden) -> tuple[Logits, Hidden]:
        """The same, and what follows on the last tokens: logits [n_out, n_vocab], hidden states [n_out, n_embd]."""


class _Waiting(NamedTuple):
    """Tokens of an answer that the block has not read, from the place `begin` on, and the hidden states before each."""

    begin: int
    tokens: NDArray[np.int32]
    before: Hidden

    @property
    def end(self) -> int:
        """The place behind them."""
        return self.begin + len(self.tokens)

    def up_to(self, end: int) -> "_Waiting":
        """Those before the place `end`."""
        n = end - self.begin
        return _Waiting(self.begin, self.tokens[:n], self.before[:n])


@dataclass(slots=True)
class _Text:
    """What is known of one answer: hidden states before each token that is read next, and of those read last.

    Those before hold where the text goes on from `n_read` tokens, and not from more that another request has read.
    `probabilities` are those of the tokens drafted last, by the block.
    """

    before: Hidden
    rows: Hidden
    n_read: int = 0
    probabilities: list[float] = field(default_factory=list)
    waiting: list[_Waiting] = field(default_factory=list)
    acceptance: Acceptance = field(default_factory=lambda: Acceptance(_CLASSES))


class MtpDrafts:
    """The drafts of all requests; `block` and `hidden` give what runs it now, and the last step's hidden states.

    A model that was opened anew may be without the block: then nothing is drafted.
    """

    def __init__(self, block: Callable[[], Block | None], hidden: Callable[[], Hidden], cells: Cells) -> None:
        self._block, self._hidden, self._cells = block, hidden, cells
        self._texts: dict[Generator, _Text] = {}

    @property
    def is_ready(self) -> bool:
        """Whether there is a block now."""
        return self._block() is not None

    def computed(self, batch: Batch, jobs: Sequence[Generator], n_batch: int) -> None:
        """Takes in what a step has computed for requests, whose runs the batch has.

        The block reads at most `n_batch` tokens at once.
        """
        block = self._block()
        if block is None:
            self._texts.clear()
            return
        hidden, row = self._hidden(), 0
        read = list[tuple[NDArray[np.int32], NDArray[np.int64], Hidden]]()
        for job, run in zip(jobs, batch.runs, strict=True):
            nothing = np.zeros((1, hidden.shape[1]), np.float32)
            text = self._texts.setdefault(job, _Text(nothing, nothing))
            rows = hidden[row : row + run.n_tokens]
            begin, tokens = len(run.visible) - run.n_tokens, batch.tokens[row : row + run.n_tokens]
            before = np.concatenate([text.before[:1] if text.n_read == begin else nothing, rows[:-1]])
            text.rows = rows[-_MOST_ROWS:].copy()
            row += run.n_tokens
            if not job.is_reading:
                text.waiting.append(_Waiting(begin, tokens, before))
            else:
                read.append((tokens, run.visible, before))
        try:
            for job in jobs:
                waiting = self._texts[job].waiting
                if waiting and waiting[-1].end - waiting[0].begin >= MOST_WAITING:
                    self._store_waiting(block, job, n_batch)
            if read:
                parts = [(tokens.tolist(), visible) for tokens, visible, _ in read]
                block.store(make_batch(parts, 1), np.concatenate([before for *_, before in read]))
        except SlimoeError:
            # Such as a token table that cannot be read: what answers need of it fails by itself.
            self._texts.clear()

    def taken(self, job: Generator, n_drafted: int) -> int:
        """Learns what became of the tokens that the last step has read for a request, `n_drafted` of them drafts.

        Returns how many of these the block has drafted.
        """
        text = self._texts.get(job)
        if text is None:
            return 0
        n_kept = len(text.rows) - job.n_rejected
        probabilities, text.probabilities = text.probabilities[:n_drafted], []
        for index, probability in enumerate(probabilities):
            is_right = index < n_drafted - job.n_rejected
            text.acceptance.note(probability, is_right=is_right)
            if not is_right:
                break
        text.before = np.concatenate([text.before[:1], text.rows])[n_kept - job.n_again : n_kept + 1]
        text.n_read = len(job.tokens)
        while text.waiting and text.waiting[-1].end > text.n_read:
            last = text.waiting.pop()
            if last.begin < text.n_read:
                text.waiting.append(last.up_to(text.n_read))
        return len(probabilities)

    def forget(self, job: Generator) -> None:
        """Forgets a request that is over."""
        self._texts.pop(job, None)

    def propose(self, jobs: Sequence[Generator], most: Sequence[int], n_batch: int) -> list[Draft]:
        """Drafts of at most so many tokens for requests that write, and what they are likely to be worth.

        The block reads at most `n_batch` tokens at once.
        """
        try:
            return self._propose(jobs, most, n_batch)
        except SlimoeError:
            return [NO_DRAFT] * len(jobs)

    def _propose(self, jobs: Sequence[Generator], most: Sequence[int], n_batch: int) -> list[Draft]:
        block = self._block()
        drafting = [job for job, n_most in zip(jobs, most, strict=True) if n_most > 0 and job in self._texts]
        if block is None or not drafting:
            return [NO_DRAFT] * len(jobs)
        for job in drafting:
            self._store_waiting(block, job, n_batch)
        limits = {job: min(MOST_PREDICTED, n_most) for job, n_most in zip(jobs, most, strict=True)}
        tokens = {job: job.next_tokens(1) for job in drafting}
        hidden = {job: self._texts[job].before for job in drafting}
        drafts = dict.fromkeys(jobs, NO_DRAFT)
        # Cells that nobody has: the step that verifies the drafts stores other keys and values in them.
        free = self._cells.free(sum(len(tokens[job]) + limits[job] - 1 for job in drafting))
        cells: dict[Generator, np.ndarray] = {}
        for job in drafting:
            assert job.sequence is not None
            n = len(tokens[job]) + limits[job] - 1
            cells[job], free = np.concatenate([job.sequence.cells, free[:n]]), free[n:]
            if len(cells[job]) < len(job.sequence) + n:
                return [NO_DRAFT] * len(jobs)
        ends = {job: len(job.sequence or ()) + len(tokens[job]) for job in drafting}
        while drafting:
            batch = make_batch([(tokens[job], cells[job][: ends[job]]) for job in drafting], len(drafting))
            logits, last = block.predict(batch, np.concatenate([hidden[job] for job in drafting]))
            for index, job in enumerate(list(drafting)):
                drafts[job] = self._longer(job, drafts[job], logits[index])
                tokens[job], hidden[job] = drafts[job].tokens[-1:], last[index : index + 1].copy()
                ends[job] += 1
                if len(drafts[job].tokens) == limits[job] or drafts[job].chances[-1] < _LIKELY:
                    drafting.remove(job)
        return [drafts[job] for job in jobs]

    def _store_waiting(self, block: Block, job: Generator, n_batch: int) -> None:
        """Stores the keys and values of what the block has not read of an answer."""
        text = self._texts[job]
        if not text.waiting or job.sequence is None:
            return
        tokens = np.concatenate([one.tokens for one in text.waiting])
        before = np.concatenate([one.before for one in text.waiting])
        first, text.waiting = text.waiting[0].begin, []
        for begin in range(0, len(tokens), n_batch):
            part = tokens[begin : begin + n_batch].tolist()
            batch = make_batch([(part, job.sequence.cells[: first + begin + len(part)])], 1)
            block.store(batch, before[begin : begin + n_batch])

    def _longer(self, job: Generator, draft: Draft, logits: Logits) -> Draft:
        """The draft with the likeliest token behind it."""
        text = self._texts[job]
        token = int(logits.argmax())
        probability = 1.0 / float(np.exp(logits - logits[token]).sum())
        text.probabilities = [*text.probabilities[: len(draft.tokens)], probability]
        chance = (draft.chances[-1] if draft.chances else 1.0) * text.acceptance.rate(probability)
        return Draft((*draft.tokens, token), (*draft.chances, chance))
