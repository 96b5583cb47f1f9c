"""A request's place at the engine, seen from the HTTP side: what it answered so far, and waiting for more."""

import asyncio
import time
from collections.abc import Callable

from slimoe.offload.errors import SlimoeError
from slimoe.server.messages import Accepted, Answer, Done, Failure


class EngineFailure(SlimoeError):
    """The engine's process could not carry a request out; `failure` is what it said."""

    def __init__(self, failure: Failure) -> None:
        self.failure = failure
        super().__init__(failure.message)

    @property
    def exit_code(self) -> int:  # type: ignore[override]
        """What the command returns when the failure is its own."""
        return self.failure.exit_code


class Ticket:
    """The answers to one request, in order; `close` tells the engine when nobody waits for the rest."""

    def __init__(self, id: int, on_close: Callable[["Ticket"], None]) -> None:
        self.id = id
        self.is_over = False
        self.has_begun = False
        self.is_underway = self.is_accepted = False
        self.n_tries = 1
        self.submitted_at = time.monotonic()
        self._on_close = on_close
        self._arrived: list[Answer] = []
        self._waiter: asyncio.Future[None] | None = None

    def push(self, answer: Answer) -> None:
        """Adds an answer and wakes whoever waits; that the prompt is sound is told once, however often it is sent."""
        if isinstance(answer, Accepted):
            if self.is_accepted:
                return
            self.is_accepted = True
        else:
            self.is_underway = True
        self.is_over = self.is_over or isinstance(answer, (Done, Failure))
        self._arrived.append(answer)
        _wake(self._waiter)

    async def next(self, patience: float | None = None) -> list[Answer]:
        """Everything that has arrived, at least one answer; nothing after `patience` seconds of silence.

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
        """Gives the place up, whether or not the answer is complete."""
        self._on_close(self)


def _wake(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)
