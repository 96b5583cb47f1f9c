"""Answers a generating endpoint: sends the choices to the engine and writes their text whole or as a stream."""

import logging
from collections.abc import Sequence
from contextlib import aclosing

from aiohttp import web

from slimoe.server import messages
from slimoe.server.api.arrivals import arrivals
from slimoe.server.api.backends import Backend, Backends
from slimoe.server.api.choice import Choice, ChoiceState
from slimoe.server.api.metrics import Metrics
from slimoe.server.api.shape import Shape
from slimoe.server.api.unsupported_fields import UnsupportedFields
from slimoe.server.api_error import from_failure, invalid, queue_full, server_failed
from slimoe.server.http.event_stream import EventStream
from slimoe.server.process.request_handle import EngineFailure, QueueFullError
from slimoe.server.watch.prompt_log import PromptLog
from slimoe.server.watch.record import current_record

PING_SECONDS = 15.0
_log = logging.getLogger(__name__)


class GenerationApi:
    """Generates for every endpoint that answers with text, whatever dialect its `Shape` writes."""

    def __init__(
        self,
        backends: Backends,
        metrics: Metrics,
        ping_seconds: float = PING_SECONDS,
        prompt_log: PromptLog | None = None,
    ) -> None:
        self.backends = backends
        self.unsupported = UnsupportedFields()
        self._metrics = metrics
        self._ping_seconds = ping_seconds
        self._prompt_log = prompt_log

    async def count(self, backend: Backend, prompt: messages.ChatPrompt, param: str) -> int:
        """The tokens of a conversation, which the field `param` holds, with its answer begun; raises ApiError."""
        answer = await backend.ask(lambda id: messages.Count(id, prompt), param)
        assert isinstance(answer, messages.Counted)
        return answer.n_tokens

    async def answer(
        self, request: web.Request, backend: Backend, choices: Sequence[Choice], shape: Shape, *, stream: bool | None
    ) -> web.StreamResponse:
        """All choices, as a stream if that is asked for; raises ApiError."""
        if stream:
            return await self.stream(request, backend, choices, shape)
        return await self.whole(backend, choices, shape)

    async def whole(self, backend: Backend, choices: Sequence[Choice], shape: Shape) -> web.Response:
        """All choices in one document; raises ApiError."""
        _check_slots(backend, choices)
        states = [ChoiceState(choice) for choice in choices]
        current_record().generate(backend.model.id)
        try:
            async with aclosing(arrivals(backend, self._metrics, choices)) as arriving:
                async for arrival in arriving:
                    assert arrival is not None, "nobody asked to be told of silence"
                    states[arrival.choice_index].slot = arrival.slot
                    for answer in arrival.answers:
                        states[arrival.choice_index].add(answer)
        except QueueFullError as error:
            raise queue_full(error.n_waiting) from None
        except EngineFailure as error:
            raise from_failure(error.failure, shape.prompt_param) from None
        finally:
            self._write_down(states)
        return web.Response(body=shape.whole(states), content_type="application/json")

    async def stream(
        self, request: web.Request, backend: Backend, choices: Sequence[Choice], shape: Shape
    ) -> web.StreamResponse:
        """All choices as a stream; raises ApiError as long as nothing is written."""
        _check_slots(backend, choices)
        states = [ChoiceState(choice) for choice in choices]
        current_record().generate(backend.model.id)
        events = EventStream(request, shape.framing)
        try:
            async with aclosing(arrivals(backend, self._metrics, choices, self._ping_seconds)) as arriving:
                async for arrival in arriving:
                    if arrival is None:
                        await events.ping()
                        continue
                    chunks: list[bytes] = []
                    states[arrival.choice_index].slot = arrival.slot
                    for answer in arrival.answers:
                        piece = states[arrival.choice_index].add(answer)
                        chunks += shape.chunks(states, arrival.choice_index, answer, piece)
                    await events.send(chunks)
            await events.send(shape.ending(states))
            return await events.finish()
        except QueueFullError as error:
            failure = queue_full(error.n_waiting)
        except EngineFailure as error:
            failure = from_failure(error.failure, shape.prompt_param)
        except ConnectionError:
            raise
        except Exception:
            _log.exception("A streamed answer failed.")
            failure = server_failed()
        finally:
            self._write_down(states)
        if not events.is_open:
            raise failure
        current_record().error = failure.info.code or failure.info.type
        return await events.fail(shape.failure(states, failure))

    def _write_down(self, states: Sequence[ChoiceState]) -> None:
        """Keeps prompts and answers, if that is asked for."""
        if self._prompt_log is not None:
            answers = [{"text": one.text, "reasoning": one.reasoning, "calls": one.calls} for one in states]
            self._prompt_log.write(current_record(), [one.choice.prompt for one in states], answers)


def _check_slots(backend: Backend, choices: Sequence[Choice]) -> None:
    """Raises ApiError for a slot that the model does not have."""
    n_slots = backend.supervisor.n_parallel
    for choice in choices:
        slot = choice.request.id_slot
        if slot is not None and slot >= n_slots:
            raise invalid(f"id_slot is {slot}, but the slots are 0 to {n_slots - 1}; -1 is any of them.", "id_slot")
