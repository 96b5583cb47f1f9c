"""Notices that an engine's process is silent, or that its work stands still."""

from dataclasses import dataclass

from slimoe.offload.errors import DeviceError
from slimoe.offload.ggml.device_calls import DeviceWait
from slimoe.server import messages


@dataclass(frozen=True, slots=True)
class Patience:
    """How many seconds the supervisor waits for an engine's process that sends nothing, or whose work stands still.

    Only time in which the supervisor's own process runs is counted. A step can be long: a large expert may come from a
    slow disk, and one processor may compute a whole batch.
    """

    untold: float = 3.0
    """Of silence, until `/health` tells of it."""
    deaf: float = 60.0
    """Of a device's silence, until `/health` and the log tell of it: a slow one may compute a batch for long."""
    silent: float = 15.0
    """Of silence, until the process is killed."""
    opening: float = 120.0
    """The same, before the process has sent its first heartbeat."""
    stuck: float = 120.0
    """Without progress, or with one call to a device, although heartbeats come, until the process is killed."""


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
        self._awaited: DeviceWait | None = None

    def note(self, message: messages.FromEngine) -> None:
        """The process has sent a message."""
        self._silent_seconds = 0.0
        if isinstance(message, messages.Beat):
            self._is_heard, self._stuck_seconds, self._awaited = True, message.stuck_seconds, message.awaited

    @property
    def silence(self) -> str | None:
        """What to tell of a process that is silent; None when it is not, or not yet for long."""
        if self._silent_seconds <= self._patience.untold:
            return None
        return f"The engine's process has not responded for {self._silent_seconds:.0f} seconds."

    @property
    def device_silence(self) -> str | None:
        """What to tell of a device that the process waits for; None while it waits for none, or not yet for long."""
        if self._awaited is None or self._awaited.seconds <= self._patience.deaf:
            return None
        return f"{self._awaited}. {self._awaited.advice}"

    def tick(self) -> messages.Failure | None:
        """Counts on; returns why the process is to be killed, None to leave it alone."""
        self._silent_seconds += messages.BEAT_SECONDS
        awaited = self._awaited
        if self._silent_seconds > (self._patience.silent if self._is_heard else self._patience.opening):
            problem = f"The engine's process did not respond for {self._silent_seconds:.0f} seconds."
        elif awaited is not None and awaited.seconds > self._patience.stuck:
            self.begin()
            said = f"{awaited}, and the engine was ended. {awaited.advice}"
            return messages.Failure(0, "device", said, exit_code=DeviceError.exit_code)
        elif self._stuck_seconds > self._patience.stuck:
            problem = f"The engine did not get on for {self._stuck_seconds:.0f} seconds."
        else:
            return None
        self.begin()
        return messages.Failure(0, "engine_stuck", f"{problem} It was ended; try again.")
