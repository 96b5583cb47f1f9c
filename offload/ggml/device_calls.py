"""Which device this process waits for: a call of ggml's comes back once the device has answered, or never.

The thread that made the call hears nothing until then, so that others ask here what it waits for: also processes that
never open ggml, so nothing here does.
"""

import threading
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

_calls: dict[int, tuple["AnsweredBy", float]] = {}
"""By thread: whose call it has made, and when."""
_owners: dict[int, "AnsweredBy"] = {}
"""By ggml's address of a buffer type: who answers for what lies in its buffers."""


@dataclass(frozen=True, slots=True)
class DeviceWait:
    """A thread of this process has waited for `device` for so many `seconds`; `advice` is a sentence."""

    device: str
    seconds: float
    advice: str

    def __str__(self) -> str:
        """What is wrong, as a sentence without its stop."""
        return f"{self.device} has not answered for {self.seconds:.0f} seconds"


class AnsweredBy:
    """A context in which a thread waits for a device, which `is_lent` by a server or this machine's."""

    def __init__(self, device: str, *, is_lent: bool) -> None:
        self._device, self._is_lent = device, is_lent

    def __enter__(self) -> None:
        _calls[threading.get_ident()] = (self, time.monotonic())

    def __exit__(self, *exception: Any) -> None:
        _calls.pop(threading.get_ident(), None)

    def wait(self, seconds: float) -> DeviceWait:
        """What to tell of a call that has lasted for so long."""
        lent = "Check that its RPC server runs and serves nobody else, and the network to it, or leave --rpc out."
        local = "End what else uses the device, or compute on the CPU with --device none."
        return DeviceWait(self._device, seconds, lent if self._is_lent else local)


def answers_for(buft: int, owner: AnsweredBy) -> None:
    """Remembers who answers for what lies in buffers of a type."""
    _owners[buft] = owner


def waiting_for(buft: int) -> AbstractContextManager[None]:
    """A context in which a thread waits for who answers for buffers of a type; in host memory it waits for nobody."""
    return _owners.get(buft) or nullcontext()


def longest_wait() -> DeviceWait | None:
    """What has been waited for longest at this moment; None while nothing is. May be asked from any thread."""
    calls, now = list(_calls.values()), time.monotonic()
    waits = [call.wait(now - since) for call, since in calls]
    return max(waits, key=lambda wait: wait.seconds, default=None)
