"""Drafts the next tokens of answers with the block that predicts a further token (MTP), one after the other.

The block reads a token and the hidden states that the model had before it, and predicts what follows; what it predicts
it reads again, with hidden states of its own. Its keys and values of what the model has read are stored step by step.
Where these are missing, as of a text whose own were read from disk, drafts are worse; answers never depend on them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from slimoe.offload.errors import SlimoeError
from slimoe.offload.graph.batch import Batch, make_batch
from slimoe.offload.graph.runner import Hidden, Logits
from slimoe.offload.memory.cells import Cells
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

    def computed(self, batch: Batch, jobs: Sequence[Generator]) -> None:
        """Takes in what a step has computed for requests, whose runs the batch has."""
        block = self._block()
        if block is None:
            self._texts.clear()
            return
        hidden = self._hidden()
        before, row = np.empty_like(hidden), 0
        for job, run in zip(jobs, batch.runs, strict=True):
            nothing = np.zeros((1, hidden.shape[1]), np.float32)
            text = self._texts.setdefault(job, _Text(nothing, nothing))
            rows = hidden[row : row + run.n_tokens]
            is_known = text.n_read == len(run.visible) - run.n_tokens
            before[row], before[row + 1 : row + run.n_tokens] = text.before[0] if is_known else 0, rows[:-1]
            text.rows = rows[-_MOST_ROWS:].copy()
            row += run.n_tokens
        try:
            block.store(batch, before)
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
        return len(probabilities)

    def forget(self, job: Generator) -> None:
        """Forgets a request that is over."""
        self._texts.pop(job, None)

    def propose(self, jobs: Sequence[Generator], most: Sequence[int]) -> list[Draft]:
        """Drafts of at most so many tokens for requests that write, and what they are likely to be worth."""
        try:
            return self._propose(jobs, most)
        except SlimoeError:
            return [NO_DRAFT] * len(jobs)

    def _propose(self, jobs: Sequence[Generator], most: Sequence[int]) -> list[Draft]:
        block = self._block()
        drafting = [job for job, n_most in zip(jobs, most, strict=True) if n_most > 0 and job in self._texts]
        if block is None or not drafting:
            return [NO_DRAFT] * len(jobs)
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

    def _longer(self, job: Generator, draft: Draft, logits: Logits) -> Draft:
        """The draft with the likeliest token behind it."""
        text = self._texts[job]
        token = int(logits.argmax())
        probability = 1.0 / float(np.exp(logits - logits[token]).sum())
        text.probabilities = [*text.probabilities[: len(draft.tokens)], probability]
        chance = (draft.chances[-1] if draft.chances else 1.0) * text.acceptance.rate(probability)
        return Draft((*draft.tokens, token), (*draft.chances, chance))
