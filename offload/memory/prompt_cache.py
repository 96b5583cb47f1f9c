"""Keeps keys, values and states of prompts on disk, for when a program starts again or other texts take their cells.

What was computed is written as records, a little between steps and the rest while nothing else is to be done. A prompt
that comes is looked up block by block, and read as far as that is expected to be faster than computing.
"""

import itertools
import time
from collections.abc import Callable, Sequence

import numpy as np

from slimoe.offload.memory.cells import Cells, Indices, Tokens, common_prefix
from slimoe.offload.memory.cells import Sequence as TokenSequence
from slimoe.offload.memory.contents import Bytes, read_rows, read_state, write_rows, write_state
from slimoe.offload.memory.kv_store import KVStore
from slimoe.offload.memory.prompt_folder import PromptFolder, Tell
from slimoe.offload.memory.prompt_record import LEAST_TOKENS, RecordForm, RecordName, TextKeys
from slimoe.offload.memory.prompt_writer import PromptWriter, Record

_BUSY_SHARE = 0.02
"""While requests are answered, writing may take such a share of the time."""
_RESCUE_SHARE = 0.05
"""What is about to be lost may be written in such a share of the time that it would take to compute it again."""
_SLICE_SECONDS = 0.1
"""While others write answers, a step reads so long from disk."""
_LEAST_CREDIT = -1.0
_RECORD_SECONDS = 0.001
"""What a record takes to be read beside its bytes."""
_FADES = 0.9
_FLUSH_SECONDS = 10.0

IsCancelled = Callable[[], bool]


class PromptCache:
    """What of the texts in some cells is on disk, and what is still to be written."""

    def __init__(self, folder: PromptFolder, form: RecordForm, cells: Cells, store: KVStore, tell: Tell) -> None:
        self._folder, self._form, self._cells, self._store, self._tell = folder, form, cells, store, tell
        self._writer = PromptWriter(folder, tell)
        self._wanted: dict[RecordName, TextKeys] = {}
        self._credit = self._charged = 0.0
        self._compute_seconds: float | None = None
        self._byte_seconds: float | None = None
        self._n_tokens = self._n_told = self._n_bytes = 0
        self._seconds = 0.0
        cells.before_loss = self.rescue

    def counters(self) -> dict[str, float]:
        """Running totals: tokens and bytes that were read in place of being computed, and bytes that were written."""
        return {
            "n_prompt_cache_tokens": self._n_tokens,
            "bytes_prompt_cache_read": self._n_bytes,
            "bytes_prompt_cache_written": self._writer.n_bytes,
            "prompt_cache_seconds": self._seconds,
        }

    def close(self) -> None:
        """Writes what is left, within some seconds, and ends."""
        deadline = time.monotonic() + _FLUSH_SECONDS
        while self._wanted and time.monotonic() < deadline:
            self._write(next(iter(self._wanted)), deadline - time.monotonic())
        self._writer.finish(deadline - time.monotonic())
        self._writer.close()

    # --- writing -------------------------------------------------------------------------------------------

    def note(self, sequence: TokenSequence, *, is_done: bool = False) -> None:
        """Lets be written what of a sequence is not on disk; with `is_done` what is there counts as used just now."""
        if len(sequence) < LEAST_TOKENS or self._writer.is_paused:
            return
        keys, ends, places = TextKeys(self._form, sequence.tokens), set(self._ends(0, len(sequence))), set[int]()
        if self._cells.has_places:
            places = {place for place in sequence.places if place >= LEAST_TOKENS}
            if self._cells.has_windows:
                places.add(len(sequence))
            ends = places | {end for end in ends if end < max(places, default=0)}
        names = [name for end in sorted(ends) for name in self._names(keys, end, has_state=end in places)]
        names += [name for place in sorted(places) for name in self._windows(keys, 0, place)]
        missing = [name for name in names if not self._folder.has(name, keys.used_ns(name) if is_done else None)]
        self._wanted |= dict.fromkeys(missing, keys)

    def step_done(self, seconds: float) -> None:
        """Writes a little after a step that took so long."""
        # The thread that writes takes processor time from those that compute. Nothing is saved up: a step that is long
        # allows for more, and none of many short ones is held up for what the others left.
        allowed, owed = _BUSY_SHARE * seconds, self._writer.seconds - self._charged
        self._credit = max(_LEAST_CREDIT, min(allowed, self._credit + allowed - owed))
        self._charged = self._writer.seconds
        while self._credit > 0 and self._wanted:
            begin = time.perf_counter()
            self._write(next(iter(self._wanted)), self._credit)
            self._credit -= time.perf_counter() - begin

    def tidy(self, seconds: float) -> bool:
        """Writes the next record, and waits at most so long; whether there are more, or one is being written."""
        if self._wanted:
            self._write(next(iter(self._wanted)), seconds)
        is_written = not self._wanted and self._writer.finish(seconds)
        self._charged = self._writer.seconds
        return not is_written

    def rescue(self, sequence: TokenSequence) -> None:
        """Writes what a sequence is about to lose, as far as that is much faster than computing it again."""
        lost = [name for name, keys in self._wanted.items() if self._is_in(name, keys, sequence)]
        # Without a state the tokens behind the one before are computed again, which are counted as so many.
        n_tokens = sum(self._form.n_tokens(name) if name.kind == "kv" else LEAST_TOKENS for name in lost)
        deadline = time.monotonic() + _RESCUE_SHARE * n_tokens * (self._compute_seconds or 0.0)
        for name in lost:
            self._write(name, deadline - time.monotonic(), sequence)
            self._wanted.pop(name, None)

    def forget(self, tokens: Tokens) -> None:
        """Removes what is on disk of a text, but for the beginning that sequences in memory have still."""
        keys, n_known = TextKeys(self._form, tokens), self._cells.n_known(tokens)
        self._wanted.clear()
        self._writer.finish(_FLUSH_SECONDS)
        self._folder.remove(name for name in self._folder.names(keys) if name.n_tokens > n_known)

    def _write(self, name: RecordName, seconds: float, holder: TokenSequence | None = None) -> None:
        """Hands a record of what a `holder` has, or anyone, to the writer, if that has room before so many seconds."""
        if self._writer.is_paused:
            self._wanted.clear()
        elif self._writer.has_room(seconds):
            keys = self._wanted.pop(name)
            if holder is None:
                tokens, n_windowed = keys.tokens[: name.n_tokens], self._n_windowed(name)
                holder = self._cells.holder(tokens, has_state=name.is_of_state, n_windowed=n_windowed)
            if holder is not None:
                content = self._content(name, holder)
                self._writer.put(Record(name, keys.head(name), content, keys.used_ns(name)))

    def _content(self, name: RecordName, holder: TokenSequence) -> Bytes:
        """What a record has, from the cells or a state of a sequence."""
        content, done = np.empty(self._form.n_bytes(name), np.uint8), 0
        if name.is_of_state:
            state, tensors = holder.state_at(name.n_tokens), self._store.state_tensors()
            pieces = (read_state(self._store, tensors[index], state) for index in self._form.part(name))
        else:
            tensors, cells = self._rows(name, holder)
            cells = cells[name.n_tokens - self._form.n_tokens(name) : name.n_tokens]
            shapes = zip(tensors, self._form.rows_of(name), strict=True)
            pieces = (read_rows(tensor, cells, range(n_heads)) for tensor, (n_heads, _) in shapes)
        for piece in pieces:
            content[done : done + piece.nbytes] = piece.reshape(-1)
            done += piece.nbytes
        return content

    def _rows(self, name: RecordName, sequence: TokenSequence) -> tuple[Sequence[int], Indices]:
        """The tensors of which a record has rows, and the cells of a sequence's tokens in them."""
        if name.kind == "window":
            return self._store.window_tensors(), sequence.window_cells
        return self._store.tensors(), sequence.cells

    def _n_windowed(self, name: RecordName) -> int:
        """How many of the last tokens must be in layers with a window for a record to be written."""
        return self._form.n_tokens(name) if name.kind == "window" else 0

    # --- reading -------------------------------------------------------------------------------------------

    def computed(self, n_tokens: int, seconds: float) -> None:
        """Notes how long so many tokens of a prompt took to compute."""
        each = seconds / n_tokens
        self._compute_seconds = each if self._compute_seconds is None else (3 * self._compute_seconds + each) / 4

    def load(
        self, sequence: TokenSequence, wanted: Sequence[int], is_cancelled: IsCancelled, *, is_alone: bool
    ) -> bool:
        """Reads more of the beginning of `wanted` into a sequence; whether no more is to be read.

        Where neither a state nor a window must be behind it, it is read in parts, unless the request `is_alone`.
        """
        if len(wanted) < LEAST_TOKENS:
            return True
        keys, begin = TextKeys(self._form, np.asarray(wanted, np.int32)), time.perf_counter()
        if self._cells.has_places:
            is_done = self._load_to_place(sequence, keys, is_cancelled)
        else:
            is_done = self._load_blocks(sequence, keys, is_cancelled, np.inf if is_alone else begin + _SLICE_SECONDS)
        self._seconds += time.perf_counter() - begin
        if is_done and self._n_tokens > self._n_told:
            self._tell(f"Prompt cache: {self._n_tokens - self._n_told} tokens were read in place of being computed.")
            self._n_told = self._n_tokens
        return is_done

    def _load_blocks(self, sequence: TokenSequence, keys: TextKeys, is_cancelled: IsCancelled, deadline: float) -> bool:
        names = []
        for end in self._ends(len(sequence), len(keys.tokens)):
            if not self._folder.has(name := keys.name(end)):
                break
            names.append(name)
        if not names or not self._pays(names, names[-1].n_tokens - len(sequence)):
            return True
        for name in names:
            if is_cancelled() or time.perf_counter() > deadline:
                return False
            content, begin = self._read(name, keys), len(sequence)
            if content is None:
                break
            self._cells.append(sequence, keys.tokens[begin : name.n_tokens])
            self._fill_rows(name, content, sequence, begin)
            self._n_tokens += name.n_tokens - begin
        return True

    def _load_to_place(self, sequence: TokenSequence, keys: TextKeys, is_cancelled: IsCancelled) -> bool:
        """Reads up to the last place of which there is a state, or a window, at once."""
        n_known, n_most = len(sequence), len(keys.tokens)
        kind = "window" if self._cells.has_windows else "state0"
        found = {name.n_tokens for name in self._folder.names(keys) if name.kind == kind}
        whole = itertools.takewhile(lambda end: self._folder.has(keys.name(end)), self._ends(n_known, n_most))
        n_whole = max(whole, default=n_known)
        for end in sorted((end for end in found if n_known < end <= n_most), reverse=True):
            blocks = [keys.name(block) for block in self._ends(n_known, end - 1)]
            if blocks and blocks[-1].n_tokens > n_whole:
                continue
            windows = self._windows(keys, n_known, end)
            behind = [*self._names(keys, end, has_state=True), *windows]
            names = [*blocks, *behind]
            if not all(map(self._folder.has, behind)) or not self._pays(names, end - n_known):
                continue
            self._cells.begin_step()
            self._cells.append(sequence, keys.tokens[n_known:end], is_loaded=True)
            is_whole = False
            try:
                is_whole = all(not is_cancelled() and self._fill(name, keys, sequence, n_known) for name in names)
            finally:
                if not is_whole:
                    self._cells.truncate(sequence, n_known)
            if is_whole:
                self._cells.keep(sequence)
                self._n_tokens += end - n_known
            if is_whole or is_cancelled():
                return is_whole
        return True

    def _fill(self, name: RecordName, keys: TextKeys, sequence: TokenSequence, n_known: int) -> bool:
        """Fills a sequence's state, or its cells behind the first `n_known`, from a record; whether that was whole."""
        content = self._read(name, keys)
        if content is None:
            return False
        if not name.is_of_state:
            n_passed = len(sequence) - self._cells.n_before if name.kind == "window" else 0
            self._fill_rows(name, content, sequence, max(n_known, n_passed))
            return True
        state, tensors, done = sequence.state_at(name.n_tokens), self._store.state_tensors(), 0
        for index in self._form.part(name):
            write_state(self._store, tensors[index], state, content[done : done + self._form.states[index]])
            done += self._form.states[index]
        return True

    def _fill_rows(self, name: RecordName, content: Bytes, sequence: TokenSequence, n_known: int) -> None:
        """Fills the cells of a record's tokens, but for the first `n_known` of the text, which others may use."""
        n_tokens, done = self._form.n_tokens(name), 0
        begin = max(n_known, name.n_tokens - n_tokens)
        tensors, cells = self._rows(name, sequence)
        cells = cells[begin : name.n_tokens]
        for tensor, (n_heads, row_bytes) in zip(tensors, self._form.rows_of(name), strict=True):
            rows = content[done : done + n_heads * n_tokens * row_bytes].reshape(n_heads, n_tokens, row_bytes)
            write_rows(tensor, cells, range(n_heads), rows[:, n_tokens - len(cells) :])
            done += rows.nbytes

    def _read(self, name: RecordName, keys: TextKeys) -> Bytes | None:
        """The content of a record that is whole."""
        begin = time.perf_counter()
        content = self._folder.read(name, keys.head(name), self._form.n_bytes(name))
        if content is not None:
            each = (time.perf_counter() - begin) / max(1, content.nbytes)
            self._byte_seconds = each if self._byte_seconds is None else (3 * self._byte_seconds + each) / 4
            self._n_bytes += content.nbytes
        return content

    def _pays(self, names: list[RecordName], n_tokens: int) -> bool:
        """Whether reading records is expected to be faster than computing the tokens, as far as both were measured."""
        if self._compute_seconds is None or self._byte_seconds is None:
            return True
        expected = len(names) * _RECORD_SECONDS + self._byte_seconds * sum(map(self._form.n_bytes, names))
        if expected < n_tokens * self._compute_seconds:
            return True
        # A disk that was slow once is tried again some time.
        self._byte_seconds *= _FADES
        return False

    # --- names ---------------------------------------------------------------------------------------------

    def _ends(self, n_known: int, n_most: int) -> range:
        """Where whole blocks end that have tokens behind the first `n_known`, and none behind the first `n_most`."""
        n_block = self._form.n_block
        return range((n_known // n_block + 1) * n_block, n_most + 1, n_block)

    def _names(self, keys: TextKeys, end: int, *, has_state: bool) -> list[RecordName]:
        """The record of the last tokens of a beginning, and those of the state after it."""
        states = [f"state{part}" for part in range(self._form.n_parts)] if has_state else []
        return [keys.name(end, kind) for kind in ("kv", *states)]

    def _windows(self, keys: TextKeys, n_known: int, place: int) -> list[RecordName]:
        """The records of what layers with a window see at a place, but for the first `n_known` tokens of the text."""
        if not self._cells.has_windows:
            return []
        begin = max(n_known, place - self._cells.n_before)
        return [keys.name(end, "window") for end in (*self._ends(begin, place - 1), place)]

    def _is_in(self, name: RecordName, keys: TextKeys, sequence: TokenSequence) -> bool:
        """Whether a sequence has what a record is of."""
        n_tokens = name.n_tokens
        if n_tokens > len(sequence) or (name.is_of_state and not sequence.has_state(n_tokens)):
            return False
        if not sequence.has_windows(n_tokens - self._n_windowed(name), n_tokens) and name.kind == "window":
            return False
        return common_prefix(sequence.tokens, keys.tokens[:n_tokens]) == n_tokens
