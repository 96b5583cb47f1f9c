"""`POST /v1/chat/completions`."""

from collections.abc import Sequence

from aiohttp import web

from slimoe.server.api import wire
from slimoe.server.api.choice import ChoiceState, Envelope, choices_of, usage_of
from slimoe.server.api.generation_api import GenerationApi
from slimoe.server.api.request_body import MAX_CHAT_VALUES, ChatBody, StreamOptions, read_body, refuse_unsupported
from slimoe.server.api.served_model import ServedModel
from slimoe.server.api.unkept_fields import CHAT, extended
from slimoe.server.api_error import invalid, unsupported
from slimoe.server.chat.history import turns
from slimoe.server.messages import ChatPrompt, ScoredToken

ChatRequest = extended(ChatBody, CHAT)
MAX_DEPTH = 32
_OWN_VALUES = ("messages", "tools", "documents")


class ChatApi:
    """The endpoint's handler."""

    def __init__(self, model: ServedModel, generation: GenerationApi) -> None:
        self._model = model
        self._generation = generation

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answers one conversation; raises ApiError."""
        body = await read_body(request, ChatRequest, MAX_CHAT_VALUES)
        self._generation.unkept.refuse(body, CHAT)
        refuse_unsupported(body)
        prompt = chat_prompt(body)
        _check_beginning(body)
        max_tokens = body.limit()
        n_logprobs = (body.top_logprobs or 0) if body.logprobs else None
        choices = choices_of([prompt], body.request(max_tokens, n_logprobs, False), body.n_choices)
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        shape = ChatShape(Envelope.new("chatcmpl", kind, self._model.id, self._model.fingerprint), n_logprobs)
        if body.stream:
            return await self._generation.stream(request, choices, shape, body.stream_options or StreamOptions())
        return await self._generation.whole(choices, shape)


class ChatShape:
    """Writes chat answers as OpenAI's documents."""

    prompt_param = "messages"

    def __init__(self, envelope: Envelope, n_logprobs: int | None) -> None:
        self.envelope = envelope
        self._is_scored = n_logprobs is not None

    def opening(self, index: int) -> list[wire.Document]:
        """The first chunk, which holds the role and no text."""
        return [self._chunk(index, wire.Delta(role="assistant", content=""), [], None)]

    def prompt_scores(self, index: int, scores: list[ScoredToken]) -> list[wire.Document]:
        """No chunks: a chat does not return its prompt."""
        return []

    def piece(self, index: int, text: str, scores: list[ScoredToken]) -> wire.Document:
        """The chunk for a piece of the message."""
        return self._chunk(index, wire.Delta(content=text), scores, None)

    def closing(self, index: int, reason: str, scores: list[ScoredToken]) -> wire.Document:
        """The last chunk, which says why the answer ended."""
        return self._chunk(index, wire.Delta(), scores, reason)

    def whole(self, states: Sequence[ChoiceState]) -> wire.Document:
        """The document of a whole answer."""
        choices = []
        for index, state in enumerate(states):
            assert state.done is not None
            logprobs = wire.chat_logprobs(state.scores) if self._is_scored else None
            choices.append(wire.ChatChoice(index, wire.ChatMessage(state.text), logprobs, state.done.reason))
        return self.envelope.document(choices, usage_of(states), states[0])

    def _chunk(self, index: int, delta: wire.Delta, scores: list[ScoredToken], reason: str | None) -> wire.Document:
        logprobs = wire.chat_logprobs(scores) if self._is_scored and scores else None
        return self.envelope.document([wire.ChatChunkChoice(index, delta, logprobs, reason)])


def chat_prompt(body: ChatBody) -> ChatPrompt:
    """The conversation as the engine's side takes it; raises ApiError for one that cannot be answered."""
    messages = turns(body.messages)
    values = dict(body.chat_template_kwargs or {})
    _check_values(values, MAX_DEPTH)
    own = next((name for name in _OWN_VALUES if values.get(name)), None)
    if own is not None:
        raise unsupported(f"{own} is not for clients to set.", f"chat_template_kwargs.{own}")
    if body.reasoning_effort is not None:
        values.setdefault("reasoning_effort", body.reasoning_effort)
    return ChatPrompt(messages, values)


def _check_beginning(body: ChatBody) -> None:
    """Raises ApiError unless the answer begins where the client wants it to: after the last message, or in it."""
    goes_on = body.messages[-1].role == "assistant"
    if body.continue_final_message and not goes_on:
        raise invalid("Only an assistant message can be continued. Let it be the last.", "continue_final_message")
    if body.continue_final_message is False and goes_on:
        raise unsupported("An assistant message that comes last is always continued.", "continue_final_message")
    if body.add_generation_prompt is False and not goes_on:
        raise unsupported("An answer is always the assistant's next message.", "add_generation_prompt")


def _check_values(value: object, depth: int) -> None:
    """Raises ApiError for a value that cannot be passed on to the template."""
    if depth == 0:
        raise invalid("It is nested too deeply.", "chat_template_kwargs")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise invalid(f"{value} is too large a number.", "chat_template_kwargs")
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for element in inner:
        _check_values(element, depth - 1)
