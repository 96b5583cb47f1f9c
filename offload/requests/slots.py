"""Slots as clients count them: which conversation was answered last in each, to be saved, restored or erased.

The KV cache itself knows no slots, but sequences of tokens that share what they have in common. A slot is the number
that a request asked for, or the lowest that was free, and stands for the tokens of the last request that had it.
"""

from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Literal, NamedTuple

import numpy as np

from slimoe.offload.errors import UsageError
from slimoe.offload.memory.cells import Cells, Sequence, Tokens
from slimoe.offload.memory.kv_store import KVStore
from slimoe.offload.memory.prompt_cache import PromptCache
from slimoe.offload.requests.request import Generator
from slimoe.offload.requests.slot_file import SlotPlace, read_slot, write_slot

SlotAction = Literal["save", "restore", "erase"]


class SlotChange(NamedTuple):
    """What was done: with how many tokens, with a file of how many bytes, in how many seconds."""

    n_tokens: int
    n_bytes: int
    seconds: float


class Slots:
    """The last tokens of each of `n_slots` slots, whose keys and values may be in the cells still."""

    def __init__(
        self,
        identity: Callable[[], str],
        cells: Cells,
        kv: KVStore,
        n_slots: int,
        n_ctx: int,
        prompts: PromptCache | None = None,
    ) -> None:
        """`identity` gives the model's hash; with `prompts` a conversation that is erased is also erased on disk."""
        self._identity, self._cells, self._kv, self._prompts = identity, cells, kv, prompts
        self.n_slots, self._n_ctx = n_slots, n_ctx
        self._jobs: dict[int, Generator] = {}
        self._tokens: dict[int, Tokens] = {}

    def enter(self, job: Generator) -> None:
        """Gives a request its slot: the one that it asks for, or the lowest in which none is answered."""
        free = (n for n in range(self.n_slots) if n not in self._jobs or self._jobs[n].is_over)
        wanted = job.request.id_slot
        slot = next(free, 0) if wanted is None else wanted % self.n_slots
        self._jobs[slot] = job
        self._tokens.pop(slot, None)

    def tokens(self, slot: int) -> Tokens:
        """The tokens that a slot stands for."""
        if slot in self._tokens:
            return self._tokens[slot]
        job = self._jobs.get(slot)
        return np.empty(0, np.int32) if job is None else job.tokens

    def change(self, action: SlotAction, slot: int, path: Path) -> SlotChange:
        """Saves a slot to a file, restores it from there, or erases it, which takes no file; raises UsageError."""
        if action == "erase":
            return self.erase(slot)
        return self.save(slot, path) if action == "save" else self.restore(slot, path)

    def save(self, slot: int, path: Path) -> SlotChange:
        """Writes a slot's tokens, as far as the cache still has them, to a file; raises UsageError."""
        begin = perf_counter()
        sequence = self._cells.begin()
        try:
            self._cells.adopt(sequence, self.tokens(slot))
            if not len(sequence):
                raise UsageError(f"There is nothing to save in slot {slot}: nothing was answered in it, or no longer.")
            n_bytes = write_slot(path, self._identity(), self._kv, sequence.tokens, self._place(sequence))
            return SlotChange(len(sequence), n_bytes, perf_counter() - begin)
        finally:
            self._cells.remember(sequence)

    def restore(self, slot: int, path: Path) -> SlotChange:
        """Reads a file back, which prompts that begin alike will find; raises UsageError, and nothing is lost."""
        begin = perf_counter()
        self._check_free(slot)
        sequence = self._cells.begin()

        def find_place(tokens: Tokens) -> SlotPlace:
            if len(tokens) > self._cells.n_unused:
                raise UsageError(f"{path.name} has {len(tokens)} tokens, for which requests in progress leave no room.")
            self._cells.begin_step()
            self._cells.append(sequence, tokens, is_loaded=True)
            return self._place(sequence)

        try:
            tokens, n_bytes = read_slot(path, self._identity(), self._kv, self._n_ctx, find_place)
        except BaseException:
            self._cells.truncate(sequence, 0)
            raise
        finally:
            self._cells.remember(sequence)
        self._tokens[slot] = tokens
        return SlotChange(len(tokens), n_bytes, perf_counter() - begin)

    def erase(self, slot: int) -> SlotChange:
        """Forgets a slot's conversation: its prompt will be computed anew, but for what others begin alike."""
        begin = perf_counter()
        self._check_free(slot)
        tokens = self.tokens(slot)
        self._cells.discard(tokens)
        if self._prompts is not None:
            self._prompts.forget(tokens)
        self._jobs.pop(slot, None)
        self._tokens.pop(slot, None)
        return SlotChange(len(tokens), 0, perf_counter() - begin)

    def _check_free(self, slot: int) -> None:
        job = self._jobs.get(slot)
        if job is not None and not job.is_over:
            raise UsageError(f"Slot {slot} answers a request now. Try again when it is done.")

    def _place(self, sequence: Sequence) -> SlotPlace:
        moves = sequence.moves
        return SlotPlace(sequence.cells, moves[0][1] if moves else 0, self._cells.window(sequence, 0))
