"""Writes a prompt cache's records in a thread of its own, so that no step waits for a disk."""

import threading
import time
from collections import deque
from contextlib import suppress
from typing import NamedTuple

from slimoe.offload.files.regular_file import reason
from slimoe.offload.memory.contents import Bytes
from slimoe.offload.memory.prompt_folder import PromptFolder, Tell
from slimoe.offload.memory.prompt_record import RecordName

HELD_RECORDS = 2
"""Records in memory at most: one that is being written, and one that waits."""
_PAUSE_SECONDS = 60.0


class Record(NamedTuple):
    """A record to write, and when it was used."""

    name: RecordName
    head: bytes
    content: Bytes
    used_ns: int


class PromptWriter:
    """Writes records into a folder, one after the other; after one that could not be written it pauses a minute."""

    def __init__(self, folder: PromptFolder, tell: Tell) -> None:
        self._folder, self._tell = folder, tell
        self._changed = threading.Condition()
        self._waiting: deque[Record] = deque()
        self._n_held = 0
        self._is_closed = False
        self._paused_until = 0.0
        self.n_bytes, self.seconds = 0, 0.0
        """What was written since the start, and the time that took."""
        self._thread = threading.Thread(target=self._run, name="prompt cache", daemon=True)
        self._thread.start()

    @property
    def is_paused(self) -> bool:
        """Whether records are refused, because one could not be written."""
        return time.monotonic() < self._paused_until

    def has_room(self, seconds: float) -> bool:
        """Waits until a record can be taken, at most so long; whether one can."""
        with self._changed:
            return self._changed.wait_for(lambda: self._n_held < HELD_RECORDS, max(0.0, seconds))

    def put(self, record: Record) -> None:
        """Takes a record, for which there must be room."""
        with self._changed:
            assert self._n_held < HELD_RECORDS
            self._n_held += 1
            self._waiting.append(record)
            self._changed.notify_all()

    def finish(self, seconds: float) -> bool:
        """Waits until all is written, at most so long; whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._n_held, max(0.0, seconds))

    def close(self) -> None:
        """Ends the thread behind the record that is being written."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join(_PAUSE_SECONDS)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_closed)
                if self._is_closed:
                    return
                record = self._waiting.popleft()
            self._write(record)
            del record
            with self._changed:
                self._n_held -= 1
                self._changed.notify_all()

    def _write(self, record: Record) -> None:
        begin = time.perf_counter()
        try:
            if not self.is_paused:
                self._folder.write(*record)
                self.n_bytes += len(record.head) + record.content.nbytes
        except OSError as error:
            self._paused_until = time.monotonic() + _PAUSE_SECONDS
            with suppress(OSError):
                problem = f"{self._folder.path} cannot be written ({reason(error)})"
                self._tell(f"Prompt cache: {problem}. It is tried again in a minute.")
        self.seconds += time.perf_counter() - begin
