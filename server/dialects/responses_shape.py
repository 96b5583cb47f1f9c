"""Writes answers as OpenAI's Responses: a document of items, or the events by which they come to be."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
from msgspec import UNSET

from slimoe.server import messages
from slimoe.server.api.choice import ChoiceState, Piece
from slimoe.server.api.shape import progress_info, usage_of
from slimoe.server.api.wire import TokenLogprobInfo, chat_logprobs, tiers_info, timings_info
from slimoe.server.api_error import ApiError
from slimoe.server.dialects.responses_body import Function
from slimoe.server.dialects.responses_wire import (
    FunctionCallItem,
    IncompleteDetails,
    InputDetails,
    ItemStatus,
    OutputDetails,
    OutputItem,
    OutputMessage,
    OutputText,
    ReasoningItem,
    ReasoningText,
    Response,
    ResponseError,
    ResponseUsage,
)
from slimoe.server.http.event_stream import NAMED_EVENTS, named_event

_CREATED, _IN_PROGRESS = "response.created", "response.in_progress"
_PREFIXES = {"text": "msg", "reasoning": "rs", "call": "fc"}


@dataclass(slots=True)
class _Item:
    """An item that is being written; `number`, `call_id`, `name` and `namespace` are those of a call."""

    kind: Literal["text", "reasoning", "call"]
    index: int
    number: int = 0
    call_id: str = ""
    name: str = ""
    namespace: str = ""
    text: str = ""
    logprobs: list[TokenLogprobInfo] = field(default_factory=list)
    id: str = ""

    def __post_init__(self) -> None:
        self.id = f"{_PREFIXES[self.kind]}_{uuid.uuid4().hex}"

    def document(self, status: ItemStatus) -> OutputItem:
        """The item as it is now; before its first part it has no content."""
        has_part = status != "in_progress"
        match self.kind:
            case "text":
                return OutputMessage(self.id, [OutputText(self.text, self.logprobs)] if has_part else [], status)
            case "reasoning":
                return ReasoningItem(self.id, [ReasoningText(self.text)] if has_part else [], status)
            case "call":
                namespace = self.namespace or UNSET
                return FunctionCallItem(self.id, self.call_id, self.name, self.text, status, namespace)


class ResponsesShape:
    """Writes the answer that `response` begins; with `is_scored` tokens have their scores.

    As in llama-server, the stream tells how far the prompt is read `with_progress`, and times in every piece
    `with_timings`. `functions` tells those in namespaces by the names that the model calls them by.
    """

    prompt_param = "input"
    framing = NAMED_EVENTS

    def __init__(
        self,
        response: Response,
        functions: Sequence[Function] = (),
        *,
        is_scored: bool,
        with_progress: bool = False,
        with_timings: bool = False,
    ) -> None:
        self._response = response
        self._is_scored = is_scored
        self._functions = {function.name: function for function in functions}
        self._with_progress, self._with_timings = with_progress, with_timings
        self._n_events = 0
        self._items: list[OutputItem] = []
        self._open: _Item | None = None

    def chunks(
        self, states: Sequence[ChoiceState], index: int, answer: messages.Answer, piece: Piece
    ) -> Sequence[bytes]:
        """The events for an engine's `answer`: items begin and end where the kind of what is written changes."""
        state = states[index]
        timings = {"timings": timings_info(state.timings_so_far)} if self._with_timings else {}
        events: list[bytes] = []
        match answer:
            case messages.Accepted():
                events += [self._event(name, {"response": self._response}) for name in (_CREATED, _IN_PROGRESS)]
            case messages.Progress(n_done=n_done) if n_done and self._with_progress:
                progress = {"response": self._response, "prompt_progress": progress_info(state, n_done)}
                events.append(self._event(_IN_PROGRESS, progress))
        if piece.reasoning:
            events += self._into("reasoning")
            events.append(self._delta("response.reasoning_text.delta", piece.reasoning, timings))
        if piece.text:
            events += self._into("text")
            logprobs = self._scores(piece.scores)
            events.append(self._delta("response.output_text.delta", piece.text, {"logprobs": logprobs, **timings}))
            assert self._open is not None
            self._open.logprobs += logprobs
        for call in piece.calls:
            events += self._into("call", call.number, call.id, call.name)
            if call.arguments:
                events.append(self._delta("response.function_call_arguments.delta", call.arguments, timings))
        if isinstance(answer, messages.Done):
            events += self._ended(state, timings)
        return events

    def ending(self, states: Sequence[ChoiceState]) -> Sequence[bytes]:
        """Nothing: the answer's last event has been written."""
        return []

    def failure(self, states: Sequence[ChoiceState], error: ApiError) -> Sequence[bytes]:
        """The error as an event, in both of the forms that clients look for, and the answer that failed."""
        info = error.info
        told = {"code": info.code, "message": error.message, "param": info.param}
        code: Literal["server_error", "rate_limit_exceeded", "invalid_prompt"] = "server_error"
        if error.status < 500:
            code = "rate_limit_exceeded" if error.status == 429 else "invalid_prompt"
        failed = msgspec.structs.replace(
            self._response, status="failed", output=self._items, error=ResponseError(code, error.message)
        )
        return [
            self._event("error", {**told, "error": {**told, "type": info.type}}),
            self._event("response.failed", {"response": failed}),
        ]

    def whole(self, states: Sequence[ChoiceState]) -> bytes:
        """The document."""
        (state,) = states
        assert state.done is not None
        items = [_Item("reasoning", 0, text=state.reasoning)] if state.reasoning else []
        if state.text or not state.calls:
            items.append(_Item("text", 0, text=state.text, logprobs=self._scores(state.scores)))
        for call in state.calls:
            name, namespace = self._named(call.name)
            items.append(_Item("call", 0, 0, call.id, name, namespace, call.arguments))
        is_cut = state.done.reason == "length"
        self._items = [item.document("incomplete" if is_cut and item is items[-1] else "completed") for item in items]
        return msgspec.json.encode(self._complete(state))

    def _complete(self, state: ChoiceState) -> Response:
        """The answer with all that came."""
        assert state.done is not None
        is_cut = state.done.reason == "length"
        usage = usage_of([state])
        return msgspec.structs.replace(
            self._response,
            status="incomplete" if is_cut else "completed",
            incomplete_details=IncompleteDetails() if is_cut else None,
            output=self._items,
            usage=ResponseUsage(
                usage.prompt_tokens,
                InputDetails(usage.prompt_tokens_details.cached_tokens),
                usage.completion_tokens,
                OutputDetails(state.n_reasoning),
                usage.total_tokens,
            ),
            timings=timings_info(state.done.timings),
            tiers=tiers_info(state.done.tiers) or UNSET,
            memory=state.done.memory,
        )

    def _ended(self, state: ChoiceState, timings: dict[str, Any]) -> list[bytes]:
        """The events that end the answer; one in which nothing was said is an empty message."""
        assert state.done is not None
        events = [] if self._items or self._open else self._into("text")
        events += self._close("incomplete" if state.done.reason == "length" else "completed")
        complete = self._complete(state)
        return [*events, self._event(f"response.{complete.status}", {"response": complete, **timings})]

    def _into(
        self, kind: Literal["text", "reasoning", "call"], number: int = 0, call_id: str = "", name: str = ""
    ) -> list[bytes]:
        """The events that end another item and begin this one."""
        if self._open is not None and (self._open.kind, self._open.number) == (kind, number):
            return []
        events = self._close("completed")
        item = self._open = _Item(kind, len(self._items), number, call_id, *self._named(name))
        added = {"output_index": item.index, "item": item.document("in_progress")}
        events.append(self._event("response.output_item.added", added))
        if kind != "call":
            part = OutputText("") if kind == "text" else ReasoningText("")
            events.append(self._event("response.content_part.added", {**_place(item), "part": part}))
        return events

    def _close(self, status: ItemStatus) -> list[bytes]:
        """The events that end the item that is being written, if there is one."""
        item, self._open = self._open, None
        if item is None:
            return []
        document = item.document(status)
        self._items.append(document)
        place, events = _place(item), []
        match document:
            case FunctionCallItem():
                done = {"item_id": item.id, "output_index": item.index, "name": item.name, "arguments": item.text}
                events.append(self._event("response.function_call_arguments.done", done))
            case OutputMessage(content=[part]):
                text = {**place, "text": item.text, "logprobs": item.logprobs}
                events.append(self._event("response.output_text.done", text))
                events.append(self._event("response.content_part.done", {**place, "part": part}))
            case ReasoningItem(content=[thought]):
                events.append(self._event("response.reasoning_text.done", {**place, "text": item.text}))
                events.append(self._event("response.content_part.done", {**place, "part": thought}))
        done = {"output_index": item.index, "item": document}
        return [*events, self._event("response.output_item.done", done)]

    def _delta(self, name: str, text: str, more: dict[str, Any]) -> bytes:
        assert self._open is not None
        self._open.text += text
        place = _place(self._open)
        if self._open.kind == "call":
            del place["content_index"]
        return self._event(name, {**place, "delta": text, **more})

    def _named(self, name: str) -> tuple[str, str]:
        """The name and namespace of the function that the model calls so."""
        function = self._functions.get(name)
        return (name, "") if function is None else (function.tool.name, function.namespace)

    def _scores(self, scores: list[messages.ScoredToken]) -> list[TokenLogprobInfo]:
        return chat_logprobs(scores).content if self._is_scored else []

    def _event(self, name: str, fields: dict[str, Any]) -> bytes:
        document = {"type": name, "sequence_number": self._n_events, **fields}
        self._n_events += 1
        return named_event(name, msgspec.json.encode(document))


def _place(item: _Item) -> dict[str, Any]:
    """The fields by which events name the item's only part."""
    return {"item_id": item.id, "output_index": item.index, "content_index": 0}
