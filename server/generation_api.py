"""Answers a generating endpoint: orders the choices from the engine and writes them whole or as a stream."""

import logging
from collections.abc import Sequence

import msgspec
from aiohttp import web

from server import frames, wire
from server.answer import Draft, Order, Shape, usage_of, with_figures
from server.api_error import from_failure, queue_full, server_failed
from server.event_stream import EventStream
from server.metrics import Metrics
from server.request_body import StreamOptions
from server.supervisor import QueueFullError, Supervisor
from server.ticket import EngineFailure, Ticket

PING_SECONDS = 15.0
_encode = msgspec.json.Encoder().encode
_log = logging.getLogger(__name__)


class GenerationApi:
    """What chat and plain completions share."""

    def __init__(self, supervisor: Supervisor, metrics: Metrics, ping_seconds: float = PING_SECONDS) -> None:
        self.supervisor = supervisor
        self._metrics = metrics
        self._ping_seconds = ping_seconds

    async def whole(self, orders: Sequence[Order], shape: Shape) -> web.Response:
        """All choices in one document; raises ApiError."""
        drafts = []
        try:
            with self.supervisor.admit():
                for order in orders:
                    drafts.append(await self._draft(order))
        except QueueFullError as error:
            raise queue_full(error.n_waiting) from None
        except EngineFailure as error:
            raise from_failure(error.failure, shape.prompt_param) from None
        return web.Response(body=_encode(shape.whole(drafts)), content_type="application/json")

    async def stream(
        self, request: web.Request, orders: Sequence[Order], shape: Shape, options: StreamOptions
    ) -> web.StreamResponse:
        """All choices as server-sent events; raises ApiError as long as nothing is written."""
        writer = _StreamWriter(EventStream(request), shape, options)
        try:
            with self.supervisor.admit():
                for index, order in enumerate(orders):
                    await self._stream_choice(index, order, writer)
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

    async def _draft(self, order: Order) -> Draft:
        draft = Draft(order)
        ticket = self.supervisor.submit(order.prompt, order.request)
        try:
            while draft.done is None:
                for answer in await ticket.next():
                    self._metrics.note(ticket, answer)
                    draft.add(answer)
        finally:
            ticket.close()
        return draft

    async def _stream_choice(self, index: int, order: Order, writer: "_StreamWriter") -> None:
        ticket: Ticket = self.supervisor.submit(order.prompt, order.request)
        draft = writer.begin(order)
        try:
            while draft.done is None:
                answers = await ticket.next(self._ping_seconds)
                for answer in answers:
                    self._metrics.note(ticket, answer)
                await writer.write(index, answers)
        finally:
            ticket.close()


class _StreamWriter:
    """Turns the engine's answers into chunks, and chunks into events."""

    def __init__(self, events: EventStream, shape: Shape, options: StreamOptions) -> None:
        self.events = events
        self._shape = shape
        self._with_usage = bool(options.include_usage)
        self._keeps_counting = bool(options.include_usage and options.continuous_usage_stats)
        self._drafts: list[Draft] = []
        self._unwritten: list[frames.ScoredToken] = []

    def begin(self, order: Order) -> Draft:
        """Starts the next choice."""
        self._unwritten = []
        self._drafts.append(Draft(order))
        return self._drafts[-1]

    async def write(self, index: int, answers: Sequence[frames.Answer]) -> None:
        """Writes what `answers` amount to, in one go; no answers at all are worth a ping."""
        documents: list[bytes] = []
        for answer in answers:
            self._drafts[-1].add(answer)
            documents += [self._encoded(document) for document in self._documents(index, answer)]
        if documents:
            await self.events.send(documents)
        elif not answers:
            await self.events.ping()

    async def finish(self) -> web.StreamResponse:
        """Writes what comes after the last choice."""
        if self._with_usage:
            usage = self._shape.head.document([], usage_of(self._drafts))
            await self.events.send([_encode(usage)])
        return await self.events.finish()

    def _documents(self, index: int, answer: frames.Answer) -> list[wire.Document]:
        match answer:
            case frames.Accepted():
                return self._shape.opening(index)
            case frames.PromptScores(tokens=tokens):
                return self._shape.prompt_scores(index, list(tokens))
            case frames.Step(text=text, scored=scored):
                self._unwritten += [] if scored is None else [scored]
                return self._piece(index, text)
            case frames.Done(reason=reason, text=text):
                pieces = self._piece(index, text)
                closing = self._shape.closing(index, reason, self._unwritten)
                return [*pieces, with_figures(closing, answer)]
        return []

    def _piece(self, index: int, text: str) -> list[wire.Document]:
        """The chunk of a text with the scores of all tokens since the last text, which was held back for them."""
        if not text:
            return []
        scores, self._unwritten = self._unwritten, []
        return [self._shape.piece(index, text, scores)]

    def _encoded(self, document: wire.Document) -> bytes:
        if self._with_usage:
            usage = usage_of(self._drafts) if self._keeps_counting else None
            document = msgspec.structs.replace(document, usage=usage)
        return _encode(document)
