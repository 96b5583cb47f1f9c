"""Generates the choices of one request, as many at once as the engine runs in parallel."""

import asyncio
import itertools
from collections.abc import AsyncGenerator, Sequence
from typing import NamedTuple

from slimoe.server.api.backends import Backend
from slimoe.server.api.choice import Choice
from slimoe.server.api.metrics import Metrics
from slimoe.server.messages import Answer, Done
from slimoe.server.process.request_handle import RequestHandle
from slimoe.server.watch.record import current_record

_Waiting = dict[asyncio.Task[list[Answer]], tuple[int, RequestHandle]]


class Arrival(NamedTuple):
    """The engine's latest answers about the choice of this index."""

    choice_index: int
    answers: Sequence[Answer]
    slot: int


async def arrivals(
    backend: Backend, metrics: Metrics, choices: Sequence[Choice], patience: float | None = None
) -> AsyncGenerator[Arrival | None, None]:
    """Yields the engine's answers about all `choices` until they are done, None after `patience` seconds of silence.

    Raises QueueFullError when too many requests wait already, and EngineFailure when one of the choices fails. Close
    the iterator to give the others up.
    """
    to_come = iter(enumerate(choices))
    waiting: _Waiting = {}
    record, supervisor = current_record(), backend.supervisor
    with supervisor.admit(backend.keep) as is_on:
        while not is_on.done():
            await asyncio.wait((is_on,), timeout=patience)
            if not is_on.done():
                yield None
        is_on.result()
        try:
            while True:
                for index, choice in itertools.islice(to_come, supervisor.n_parallel - len(waiting)):
                    handle = supervisor.submit(choice.prompt, choice.request, shows_prompt=choice.shows_prompt)
                    _wait(waiting, index, handle)
                if not waiting:
                    return
                done, _ = await asyncio.wait(waiting, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    yield None
                for task in sorted(done, key=lambda task: waiting[task][0]):
                    answers = task.result()
                    index, handle = waiting.pop(task)
                    if any(isinstance(answer, Done) for answer in answers):
                        handle.close()
                    else:
                        _wait(waiting, index, handle)
                    for answer in answers:
                        metrics.note(handle, answer, backend.model.id)
                        record.note(answer)
                    yield Arrival(index, answers, handle.slot or 0)
        finally:
            for task, (_, handle) in waiting.items():
                # A failure that nobody asks for would be logged.
                _ = task.cancel() or task.cancelled() or task.exception()
                handle.close()
                metrics.note_left(handle)


def _wait(waiting: _Waiting, index: int, handle: RequestHandle) -> None:
    waiting[asyncio.create_task(handle.next())] = index, handle
