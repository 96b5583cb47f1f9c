"""Anthropic's `POST /v1/messages`, whole or streamed, and `/v1/messages/count_tokens`."""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import msgspec
from aiohttp import web

from slimoe.offload.text.generation import GenerationRequest
from slimoe.server import messages
from slimoe.server.api.choice import Choice, ChoiceState, Piece
from slimoe.server.api.endpoint import Endpoint, json_answer
from slimoe.server.api.generation_api import GenerationApi
from slimoe.server.api.request_body import MAX_CHAT_VALUES, read_body, stop_strings
from slimoe.server.api.shape import usage_of
from slimoe.server.api.unsupported_fields import extended
from slimoe.server.api_error import ApiError
from slimoe.server.dialects.conversation import json_object, told
from slimoe.server.dialects.messages_body import UNSUPPORTED, ConversationBody, MessagesBody, chat_prompt
from slimoe.server.http.event_stream import NAMED_EVENTS, named_event

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
_ERRORS: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}
_FRAMING = replace(NAMED_EVENTS, ping=named_event("ping", b'{"type":"ping"}\n\n'))


class TextBlock(msgspec.Struct, frozen=True, tag="text", tag_field="type"):
    """What is said."""

    text: str


class ThinkingBlock(msgspec.Struct, frozen=True, tag="thinking", tag_field="type"):
    """What was thought before; nobody signs it."""

    thinking: str
    signature: str = ""


class ToolUseBlock(msgspec.Struct, frozen=True, tag="tool_use", tag_field="type"):
    """A call of a tool."""

    id: str
    name: str
    input: dict[str, Any]


class MessagesUsage(msgspec.Struct, frozen=True):
    """`usage`: `input_tokens` are those that were computed, besides what the KV cache held."""

    input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int


class MessageDocument(msgspec.Struct, frozen=True):
    """A whole answer, or with no content the beginning of a streamed one."""

    id: str
    model: str
    content: list[TextBlock | ThinkingBlock | ToolUseBlock]
    usage: MessagesUsage
    stop_reason: StopReason | None = None
    stop_sequence: str | None = None
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"


class InputTokens(msgspec.Struct, frozen=True):
    """The answer of `count_tokens`."""

    input_tokens: int


MessagesRequest = extended(MessagesBody, UNSUPPORTED)
CountRequest = extended(ConversationBody, UNSUPPORTED)


class MessagesErrorInfo(msgspec.Struct, frozen=True):
    """What went wrong, in Anthropic's words."""

    type: str
    message: str


class MessagesError(msgspec.Struct, frozen=True):
    """An error as Anthropic writes it."""

    type: str
    error: MessagesErrorInfo


class MessagesApi:
    """The endpoints' handlers."""

    def __init__(self, generation: GenerationApi) -> None:
        self._generation = generation

    def endpoints(self) -> list[Endpoint]:
        """The endpoints."""
        path = "/v1/messages"
        endpoints = [
            Endpoint("POST", path, self.handle, MessagesRequest, MessageDocument, streams=True),
            Endpoint("POST", f"{path}/count_tokens", self.count, CountRequest, InputTokens),
        ]
        return [replace(endpoint, error_body=error_body, error=MessagesError) for endpoint in endpoints]

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answers a conversation as Anthropic's API does; raises ApiError."""
        body = await read_body(request, MessagesRequest, MAX_CHAT_VALUES)
        self._generation.unsupported.refuse(body, UNSUPPORTED)
        stops = stop_strings(body.stop_sequences, "stop_sequences")
        backend = self._generation.backends.named(body.model)
        wanted = GenerationRequest(
            prompt_ids=(),
            max_tokens=body.max_tokens,
            sampling=body.sampling(),
            stop=stops,
            ignore_eos=bool(body.ignore_eos),
            constraint=body.constraint(),
        )
        choices = [Choice(chat_prompt(body), wanted)]
        shape = MessagesShape(backend.model.id, stops)
        return await self._generation.answer(request, backend, choices, shape, stream=body.stream)

    async def count(self, request: web.Request) -> web.Response:
        """Counts the tokens of a conversation without answering it; raises ApiError."""
        body = await read_body(request, CountRequest, MAX_CHAT_VALUES)
        self._generation.unsupported.refuse(body, UNSUPPORTED)
        backend = self._generation.backends.named(body.model)
        n_tokens = await self._generation.count(backend, chat_prompt(body), "messages")
        return json_answer(InputTokens(n_tokens))


class MessagesShape:
    """Writes an answer as Anthropic's message or events; `stops` are the strings that the client knows to end it."""

    prompt_param = "messages"
    framing = _FRAMING

    def __init__(self, model: str, stops: Sequence[str]) -> None:
        self._id = f"msg_{uuid.uuid4().hex}"
        self._model = model
        self._stops = stops
        self._kind = ""
        self._n_blocks = 0

    def chunks(
        self, states: Sequence[ChoiceState], index: int, answer: messages.Answer, piece: Piece
    ) -> Sequence[bytes]:
        """The events for an engine's `answer`: blocks begin and end where the kind of what is written changes."""
        events: list[bytes] = []
        if isinstance(answer, messages.Accepted):
            start = MessageDocument(self._id, self._model, [], _usage(states))
            events.append(_event("message_start", {"message": start}))
        if piece.reasoning:
            events += self._into("thinking", ThinkingBlock(""))
            events.append(self._delta({"type": "thinking_delta", "thinking": piece.reasoning}))
        if piece.text:
            events += self._into("text", TextBlock(""))
            events.append(self._delta({"type": "text_delta", "text": piece.text}))
        for call in piece.calls:
            events += self._into(f"call {call.number}", ToolUseBlock(call.id, call.name, {}))
            if call.arguments:
                events.append(self._delta({"type": "input_json_delta", "partial_json": call.arguments}))
        if isinstance(answer, messages.Done):
            reason, stop = self._stop(states[index])
            events += self._into("", None)
            delta = {"stop_reason": reason, "stop_sequence": stop}
            events.append(_event("message_delta", {"delta": delta, "usage": _usage(states)}))
            events.append(_event("message_stop", {}))
        return events

    def ending(self, states: Sequence[ChoiceState]) -> Sequence[bytes]:
        """Nothing: the answer's last event has been written."""
        return []

    def failure(self, states: Sequence[ChoiceState], error: ApiError) -> Sequence[bytes]:
        """The error as an event."""
        return [named_event("error", error_body(error))]

    def whole(self, states: Sequence[ChoiceState]) -> bytes:
        """The message."""
        (state,) = states
        content: list[TextBlock | ThinkingBlock | ToolUseBlock] = []
        if state.reasoning:
            content.append(ThinkingBlock(state.reasoning))
        if state.text:
            content.append(TextBlock(state.text))
        content += [ToolUseBlock(call.id, call.name, json_object(call.arguments)) for call in state.calls]
        return msgspec.json.encode(MessageDocument(self._id, self._model, content, _usage(states), *self._stop(state)))

    def _into(self, kind: str, block: TextBlock | ThinkingBlock | ToolUseBlock | None) -> list[bytes]:
        """The events that end a block of another kind and begin this one."""
        if kind == self._kind:
            return []
        events = []
        if self._kind == "thinking":
            events.append(self._delta({"type": "signature_delta", "signature": ""}))
        if self._kind:
            events.append(_event("content_block_stop", {"index": self._n_blocks - 1}))
        self._kind = kind
        if block is not None:
            events.append(_event("content_block_start", {"index": self._n_blocks, "content_block": block}))
            self._n_blocks += 1
        return events

    def _delta(self, delta: dict[str, str]) -> bytes:
        return _event("content_block_delta", {"index": self._n_blocks - 1, "delta": delta})

    def _stop(self, state: ChoiceState) -> tuple[StopReason, str | None]:
        """Why the answer ended, and the client's string that ended it."""
        assert state.done is not None
        if state.done.reason == "length":
            return "max_tokens", None
        if state.done.stop_text in self._stops:
            return "stop_sequence", state.done.stop_text
        return "tool_use" if state.calls else "end_turn", None


def error_body(error: ApiError) -> bytes:
    """An error as Anthropic writes it."""
    message = told(error)
    if error.info.code == "context_length_exceeded":
        # The words by which Anthropic's clients know that they must shorten the conversation.
        message = f"prompt is too long. {message}"
    kind = _ERRORS.get(error.status, "invalid_request_error")
    return msgspec.json.encode(MessagesError("error", MessagesErrorInfo(kind, message)))


def _usage(states: Sequence[ChoiceState]) -> MessagesUsage:
    usage = usage_of(states)
    cached = usage.prompt_tokens_details.cached_tokens
    return MessagesUsage(usage.prompt_tokens - cached, usage.completion_tokens, 0, cached)


def _event(name: str, fields: dict[str, Any]) -> bytes:
    return named_event(name, msgspec.json.encode({"type": name, **fields}))
