"""Tells the server again and again that the engine's process runs. Apart: its thread does nothing else."""

import threading
import time
from collections.abc import Callable

from slimoe.offload.ggml.device_calls import longest_wait
from slimoe.server.messages import BEAT_SECONDS, Beat


class Heartbeat:
    """Sends a beat every `BEAT_SECONDS` from a thread of its own; the engine's thread calls `tick` at each step.

    `progress` is a figure that changes when slow work gets on without a tick, such as bytes read from disk. `check` is
    called with every beat.
    """

    def __init__(self, send: Callable[[Beat], None]) -> None:
        self._send = send
        self._n_ticks = 0
        self._is_idle = True
        self.progress: Callable[[], object] = lambda: None
        self.check: Callable[[], None] = lambda: None

    def start(self) -> None:
        """Starts the thread."""
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def tick(self) -> None:
        """Notes that the engine has made progress."""
        self._n_ticks += 1
        self._is_idle = False

    def rest(self) -> None:
        """Notes that the engine is idle until the next tick."""
        self._is_idle = True

    def _beat(self) -> None:
        last: object = None
        moved_at = time.monotonic()
        while True:
            try:
                state = (self._n_ticks, self.progress())
            except Exception:
                # The figures were changing while they were read.
                state = (self._n_ticks, object())
            if self._is_idle or state != last:
                last, moved_at = state, time.monotonic()
            self._send(Beat(time.monotonic() - moved_at, longest_wait()))
            self.check()
            time.sleep(BEAT_SECONDS)
