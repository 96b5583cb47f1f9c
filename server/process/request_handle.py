"""A request that the server has sent to the engine, and the answers that have come back."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator

from slimoe.offload.errors import SlimoeError
from slimoe.offload.text.generation import Timings
from slimoe.server.messages import Accepted, Answer, Done, Failure, Progress, Step


class EngineFailure(SlimoeError):
    """The engine could not carry out a request; `failure` is its message."""

    def __init__(self, failure: Failure) -> None:
        self.failure = failure
        super().__init__(failure.message)

    @property
    def exit_code(self) -> int:  # type: ignore[override]
        """The exit status of a command that this failure ends."""
        return self.failure.exit_code


def stopping(id: int) -> Failure:
    """The failure of a request that comes while the server ends, or is cut off by that."""
    return Failure(id, "shutting_down", "The server is shutting down.")


Hold = Callable[[float | None], contextlib.AbstractContextManager[asyncio.Future[None]]]
"""Keeps an engine running until the end of the context, once the future is done, and for some seconds after it.

Given are these seconds, None for the usual time; below 0 they have no end.
"""


@contextlib.contextmanager
def always_loaded(keep: float | None) -> Iterator[asyncio.Future[None]]:
    """Holds an engine that runs all the time, or is starting."""
    is_on: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    is_on.set_result(None)
    yield is_on


class QueueFullError(Exception):
    """The queue is full: `n_waiting` requests wait already, and one more is refused."""

    def __init__(self, n_waiting: int) -> None:
        self.n_waiting = n_waiting
        super().__init__(f"{n_waiting} requests are waiting already")


class RequestHandle:
    """Hands out the engine's answers to one request in order. `close` cancels what is not answered yet."""

    def __init__(self, id: int, on_close: Callable[["RequestHandle"], None]) -> None:
        self.id = id
        self.is_over = False
        self.has_begun = False
        self.is_underway = self.is_accepted = False
        self.is_work = True
        self.n_tries = 1
        self.slot: int | None = None
        """Which of those that the engine works on at once, from when it begins."""
        self.progress: Progress | None = None
        self.n_decoded = 0
        self.submitted_at = time.monotonic()
        self.times: dict[type, tuple[float, float]] = {}
        """When the first and the latest answer of each kind came."""
        self._on_close = on_close
        self._arrived: list[Answer] = []
        self._waiter: asyncio.Future[None] | None = None

    def push(self, answer: Answer) -> None:
        """Adds an answer and wakes who waits. Of several `Accepted`, as a restarted engine sends, one is kept."""
        if isinstance(answer, Accepted):
            if self.is_accepted:
                return
            self.is_accepted = True
        else:
            self.is_underway = True
            self.n_decoded += isinstance(answer, Step)
        now = time.monotonic()
        self.times[type(answer)] = (self.times.get(type(answer), (now,))[0], now)
        if isinstance(answer, Progress):
            self.progress = answer
        self.is_over = self.is_over or isinstance(answer, (Done, Failure))
        self._arrived.append(answer)
        _wake(self._waiter)

    def timings_so_far(self) -> Timings:
        """What the engine has done for a request that has not ended, as far as its answers tell."""
        n_done, n_cached = (0, 0) if self.progress is None else (self.progress.n_done, self.progress.n_cached)
        read, wrote = (1000 * (last - first) for first, last in map(self._when, (Progress, Step)))
        return Timings(max(0, n_done - n_cached), read, self.n_decoded, wrote, n_cached)

    def _when(self, kind: type) -> tuple[float, float]:
        return self.times.get(kind, (0.0, 0.0))

    async def next(self, patience: float | None = None) -> list[Answer]:
        """Waits for answers and returns all that arrived; an empty list after `patience` seconds without any.

        Raises EngineFailure once all answers before the failure were handed out.
        """
        if not self._arrived:
            loop = asyncio.get_running_loop()
            self._waiter = loop.create_future()
            timer = None if patience is None else loop.call_later(patience, _wake, self._waiter)
            try:
                await self._waiter
            finally:
                if timer is not None:
                    timer.cancel()
        answers, self._arrived = self._arrived, []
        if answers and isinstance(answers[-1], Failure):
            failure = answers.pop()
            assert isinstance(failure, Failure)
            if not answers:
                raise EngineFailure(failure)
            self._arrived = [failure]
        return answers

    def close(self) -> None:
        """Releases the request, and cancels it if its answer is not complete."""
        self._on_close(self)


class Slots:
    """Which requests the engine works on at once: each takes the first free place when it begins."""

    def __init__(self, n_slots: int) -> None:
        self.handles: list[RequestHandle | None] = [None] * n_slots

    def note(self, handle: RequestHandle, answer: Answer) -> None:
        """Gives a request a place when its answer says that it begins."""
        if isinstance(answer, Progress) and handle.slot is None and None in self.handles:
            handle.slot = self.handles.index(None)
            self.handles[handle.slot] = handle

    def leave(self, handle: RequestHandle) -> None:
        """Frees a request's place."""
        if handle.slot is not None:
            self.handles[handle.slot] = None


def _wake(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)
