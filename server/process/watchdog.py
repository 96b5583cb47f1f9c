"""Notices that an engine's process is silent, or that its work stands still."""

from dataclasses import dataclass

from slimoe.server import messages


@dataclass(frozen=True, slots=True)
class Patience:
    """How many seconds the supervisor waits for an engine's process that sends nothing, or whose work stands still.

    Only time in which the supervisor's own process runs is counted. A step can be long: a large expert may come from a
    slow disk, and one processor may compute a whole batch.
    """

    untold: float = 3.0
    """Of silence, until `/health` tells of it."""
    silent: float = 15.0
    """Of silence, until the process is killed."""
    opening: float = 120.0
    """The same, before the process has sent its first heartbeat."""
    stuck: float = 120.0
    """Without progress although heartbeats come, until the process is killed."""


USUAL_PATIENCE = Patience()


class Watchdog:
    """Counts the seconds for which one process has been silent, or stuck; `tick` is called every `BEAT_SECONDS`."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self.begin()

    def begin(self) -> None:
        """A new process is watched."""
        self._is_heard = False
        self._silent_seconds = self._stuck_seconds = 0.0

    def note(self, message: messages.FromEngine) -> None:
        """The process has sent a message."""
        self._silent_seconds = 0.0
        if isinstance(message, messages.Beat):
            self._is_heard, self._stuck_seconds = True, message.stuck_seconds

    @property
    def silence(self) -> str | None:
        """What to tell of a process that is silent; None when it is not, or not yet for long."""
        if self._silent_seconds <= self._patience.untold:
            return None
        return f"The engine's process has not responded for {self._silent_seconds:.0f} seconds."

    def tick(self) -> str | None:
        """Counts on; returns why the process is to be killed, None to leave it alone."""
        self._silent_seconds += messages.BEAT_SECONDS
        if self._silent_seconds > (self._patience.silent if self._is_heard else self._patience.opening):
            problem = f"The engine's process did not respond for {self._silent_seconds:.0f} seconds."
        elif self._stuck_seconds > self._patience.stuck:
            problem = f"The engine did not get on for {self._stuck_seconds:.0f} seconds."
        else:
            return None
        self._silent_seconds = self._stuck_seconds = 0.0
        return f"{problem} It was ended; try again."
