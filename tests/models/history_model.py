"""A model that shows what a batch let it see: each next token follows from the whole history, found in the cells."""

from collections.abc import Callable, Sequence

import numpy as np

from slimoe.offload.ggml.cpu_backend import EngineAbortedError
from slimoe.offload.graph.batch import Batch
from slimoe.offload.graph.runner import Logits
from slimoe.offload.memory.cells import NO_TOKENS

N_VOCAB = 97


def next_token(history: Sequence[int]) -> int:
    """What the model says after `history`."""
    return hash(tuple(history)) % N_VOCAB


def repeating_token(history: Sequence[int]) -> int:
    """What a model says that soon repeats itself, but for a word that differs each time."""
    return next_token(history) if len(history) % 23 == 0 else (5 * len(history)) % 11


def answer_to(prompt: Sequence[int], n_tokens: int, follow: Callable[[Sequence[int]], int] = next_token) -> list[int]:
    """The greedy answer."""
    history = list(prompt)
    for _ in range(n_tokens):
        history.append(follow(history))
    return history[len(prompt) :]


class HistoryModel:
    """Stands in for the engine's runner, and keeps the batches it was given; `follow` gives the likeliest token.

    A state holds the tokens that were read into it, which must be those before a run that goes on from it.
    """

    def __init__(self, n_cells: int, follow: Callable[[Sequence[int]], int] = next_token) -> None:
        self._follow = follow
        self.cells = np.full(n_cells, -1, np.int32)
        self.states: dict[int, list[int]] = {NO_TOKENS: []}
        self.batches: list[Batch] = []
        self.could_abort: list[bool] = []
        self.before_each: Callable[[Batch], None] = lambda batch: None
        self.after_each: Callable[[Batch, Logits], None] = lambda batch, logits: None

    @property
    def n_read(self) -> int:
        """Tokens computed so far."""
        return sum(batch.n_tokens for batch in self.batches)

    def compute(self, batch: Batch, is_cancelled: Callable[[], bool] | None) -> Logits:
        """One-hot logits [n_out, n_vocab]."""
        assert len(set(batch.cells.tolist())) == batch.n_tokens
        assert int(max(run.visible.max() for run in batch.runs)) < batch.n_kv
        self.batches.append(batch)
        self.could_abort.append(is_cancelled is not None)
        self.before_each(batch)
        self.cells[batch.cells] = batch.tokens
        for run, (before, after) in zip(batch.runs, batch.states, strict=False):
            history = self.cells[run.visible].tolist()
            assert self.states[before] == history[: -run.n_tokens]
            self.states[after] = history
        if is_cancelled is not None and is_cancelled():
            self.cells[batch.cells] = -1
            raise EngineAbortedError
        logits = np.zeros((batch.n_out, N_VOCAB), np.float32)
        end = batch.n_tokens
        for run in reversed(batch.runs):
            for index in range(run.n_tokens - 1, -1, -1):
                row = end - run.n_tokens + index - (batch.n_tokens - batch.n_out)
                if row >= 0:
                    seen = run.visible[: len(run.visible) - run.n_tokens + index + 1]
                    logits[row, self._follow(self.cells[seen].tolist())] = 9
            end -= run.n_tokens
        self.after_each(batch, logits)
        return logits
