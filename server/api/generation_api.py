"""Answers a generating endpoint: sends the choices to the engine and writes their text whole or as a stream."""

import logging
from collections.abc import Sequence
from contextlib import aclosing

import msgspec
from aiohttp import web

from slimoe.server import messages
from slimoe.server.api import wire
from slimoe.server.api.arrivals import Arrival, arrivals
from slimoe.server.api.choice import Choice, ChoiceState, Shape, usage_of, with_figures
from slimoe.server.api.metrics import Metrics
from slimoe.server.api.request_body import StreamOptions
from slimoe.server.api.scored_text import Piece
from slimoe.server.api.unkept_fields import UnkeptFields
from slimoe.server.api_error import from_failure, queue_full, server_failed
from slimoe.server.http.event_stream import EventStream
from slimoe.server.process.request_handle import EngineFailure
from slimoe.server.process.supervisor import QueueFullError, Supervisor

PING_SECONDS = 15.0
_encode = msgspec.json.Encoder().encode
_log = logging.getLogger(__name__)


class GenerationApi:
    """The part of generating that chat and plain completions share."""

    def __init__(self, supervisor: Supervisor, metrics: Metrics, ping_seconds: float = PING_SECONDS) -> None:
        self.supervisor = supervisor
        self.unkept = UnkeptFields()
        self._metrics = metrics
        self._ping_seconds = ping_seconds

    async def whole(self, choices: Sequence[Choice], shape: Shape) -> web.Response:
        """All choices in one document; raises ApiError."""
        states = [ChoiceState(choice) for choice in choices]
        try:
            with self.supervisor.admit():
                async with aclosing(arrivals(self.supervisor, self._metrics, choices)) as arriving:
                    async for arrival in arriving:
                        assert arrival is not None, "nobody asked to be told of silence"
                        for answer in arrival.answers:
                            states[arrival.choice_index].add(answer)
        except QueueFullError as error:
            raise queue_full(error.n_waiting) from None
        except EngineFailure as error:
            raise from_failure(error.failure, shape.prompt_param) from None
        return web.Response(body=_encode(shape.whole(states)), content_type="application/json")

    async def stream(
        self, request: web.Request, choices: Sequence[Choice], shape: Shape, options: StreamOptions
    ) -> web.StreamResponse:
        """All choices as server-sent events; raises ApiError as long as nothing is written."""
        writer = _StreamWriter(EventStream(request), choices, shape, options)
        try:
            with self.supervisor.admit():
                async with aclosing(arrivals(self.supervisor, self._metrics, choices, self._ping_seconds)) as arriving:
                    async for arrival in arriving:
                        await writer.write(arrival)
            return await writer.finish()
        except QueueFullError as error:
            failure = queue_full(error.n_waiting)
        except EngineFailure as error:
            failure = from_failure(error.failure, shape.prompt_param)
        except ConnectionError:
            raise
        except Exception:
            _log.exception("A streamed answer failed.")
            failure = server_failed()
        if not writer.events.is_open:
            raise failure
        return await writer.events.fail(failure)


class _StreamWriter:
    """Turns the engine's answers into chunks, and chunks into events."""

    def __init__(self, events: EventStream, choices: Sequence[Choice], shape: Shape, options: StreamOptions) -> None:
        self.events = events
        self._shape = shape
        self._with_usage = bool(options.include_usage)
        self._keeps_counting = bool(options.include_usage and options.continuous_usage_stats)
        self._states = [ChoiceState(choice) for choice in choices]

    async def write(self, arrival: Arrival | None) -> None:
        """Writes all new answers in one go, and a ping when there are none."""
        if arrival is None:
            await self.events.ping()
            return
        documents: list[bytes] = []
        for answer in arrival.answers:
            piece = self._states[arrival.choice_index].add(answer)
            documents += [self._encoded(document) for document in self._documents(arrival.choice_index, answer, piece)]
        if documents:
            await self.events.send(documents)

    async def finish(self) -> web.StreamResponse:
        """Writes the figures and the end of the stream, after the last choice."""
        if self._with_usage:
            usage = self._shape.envelope.document([], usage_of(self._states))
            await self.events.send([_encode(usage)])
        return await self.events.finish()

    def _documents(self, index: int, answer: messages.Answer, piece: Piece) -> list[wire.Document]:
        written = [self._shape.piece(index, piece.text, piece.scores)] if piece.text else []
        match answer:
            case messages.Accepted():
                return self._shape.opening(index)
            case messages.PromptScores(tokens=tokens):
                return self._shape.prompt_scores(index, list(tokens))
            case messages.Done(reason=reason):
                closing = self._shape.closing(index, reason, [] if written else piece.scores)
                return [*written, with_figures(closing, answer)]
        return written

    def _encoded(self, document: wire.Document) -> bytes:
        if self._with_usage:
            usage = usage_of(self._states) if self._keeps_counting else None
            document = msgspec.structs.replace(document, usage=usage)
        return _encode(document)
