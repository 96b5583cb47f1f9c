"""The choices of one request, as many of them at once as the engine has places."""

import asyncio
import itertools
from collections.abc import AsyncGenerator, Sequence
from typing import NamedTuple

from slimoe.server.api.answer import Order
from slimoe.server.api.metrics import Metrics
from slimoe.server.messages import Answer, Done
from slimoe.server.process.supervisor import Supervisor
from slimoe.server.process.ticket import Ticket

_Waiting = dict[asyncio.Task[list[Answer]], tuple[int, Ticket]]


class Arrival(NamedTuple):
    """What the engine said of one choice, named by its index."""

    choice: int
    answers: Sequence[Answer]


async def arrivals(
    supervisor: Supervisor, metrics: Metrics, orders: Sequence[Order], patience: float | None = None
) -> AsyncGenerator[Arrival | None, None]:
    """What the engine says of all `orders` until they are done, and None after each `patience` seconds of silence.

    Raises EngineFailure when one of them fails. Close the iterator to give the others up.
    """
    to_come = iter(enumerate(orders))
    waiting: _Waiting = {}
    try:
        while True:
            for index, order in itertools.islice(to_come, supervisor.n_parallel - len(waiting)):
                _wait(waiting, index, supervisor.submit(order.prompt, order.request))
            if not waiting:
                return
            done, _ = await asyncio.wait(waiting, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                yield None
            for task in sorted(done, key=lambda task: waiting[task][0]):
                answers = task.result()
                index, ticket = waiting.pop(task)
                if any(isinstance(answer, Done) for answer in answers):
                    ticket.close()
                else:
                    _wait(waiting, index, ticket)
                for answer in answers:
                    metrics.note(ticket, answer)
                yield Arrival(index, answers)
    finally:
        for task, (_, ticket) in waiting.items():
            # A failure that nobody asks for would be logged.
            _ = task.cancel() or task.cancelled() or task.exception()
            ticket.close()


def _wait(waiting: _Waiting, index: int, ticket: Ticket) -> None:
    waiting[asyncio.create_task(ticket.next())] = index, ticket
