"""`POST /v1/chat/completions`."""

from collections.abc import Sequence
from typing import Any

from aiohttp import web

from slimoe.server.api import wire
from slimoe.server.api.choice import ChoiceState, choices_of
from slimoe.server.api.endpoint import Endpoint
from slimoe.server.api.generation_api import GenerationApi
from slimoe.server.api.request_body import MAX_CHAT_VALUES, Extras, GenerationBody, LogprobCount, read_body
from slimoe.server.api.shape import Envelope, OpenAIShape
from slimoe.server.api.unsupported_fields import CHAT, extended
from slimoe.server.api_error import invalid, unsupported
from slimoe.server.chat.history import Message, turns
from slimoe.server.messages import ChatPrompt, ScoredToken

MAX_DEPTH = 32
_OWN_VALUES = ("messages", "tools", "documents")
_NO_TOOLS = "This server does not call tools. Leave the field out, or send tool_choice none."


class ChatBody(GenerationBody, kw_only=True):
    """`POST /v1/chat/completions`."""

    messages: list[Message]
    logprobs: bool | None = None
    top_logprobs: LogprobCount | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    function_call: Any = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None


ChatRequest = extended(ChatBody, CHAT)


class ChatApi:
    """The endpoint's handler."""

    def __init__(self, generation: GenerationApi) -> None:
        self._generation = generation

    def endpoints(self) -> list[Endpoint]:
        """The endpoint."""
        path, alias = "/v1/chat/completions", "/chat/completions"
        return [Endpoint("POST", path, self.handle, ChatRequest, wire.ChatDocument, streams=True, aliases=(alias,))]

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answers one conversation; raises ApiError."""
        body = await read_body(request, ChatRequest, MAX_CHAT_VALUES)
        self._generation.unsupported.refuse(body, CHAT)
        refuse_unsupported(body)
        backend = self._generation.backends.named(body.model, body.keep)
        prompt = chat_prompt(body)
        _check_beginning(body)
        max_tokens = body.limit()
        n_logprobs = (body.top_logprobs or 0) if body.logprobs else None
        wanted = body.request(max_tokens, n_logprobs, False)
        choices = choices_of([prompt], wanted, body.n_choices, shows_prompt=body.extras.prompt)
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        envelope = Envelope.new("chatcmpl", kind, backend.model.id, backend.model.fingerprint)
        shape = ChatShape(envelope, body.extras, is_scored=n_logprobs is not None)
        if body.stream:
            return await self._generation.stream(request, backend, choices, shape)
        return await self._generation.whole(backend, choices, shape)


class ChatShape(OpenAIShape):
    """Writes chat answers as OpenAI's documents."""

    prompt_param = "messages"

    def __init__(self, envelope: Envelope, extras: Extras, *, is_scored: bool) -> None:
        super().__init__(envelope, extras)
        self._is_scored = is_scored

    def opening(self, index: int) -> list[wire.Document]:
        """The first chunk, which holds the role and no text."""
        opening = wire.ChatChunkChoice(index, wire.Delta(role="assistant", content=None))
        return [self.envelope.document([opening])]

    def prompt_scores(self, index: int, scores: list[ScoredToken]) -> list[wire.Document]:
        """No chunks: a chat does not return its prompt."""
        return []

    def chunk(self, index: int, text: str, scores: list[ScoredToken], reason: str | None = None) -> wire.Document:
        """The chunk for a piece of the message, or the last one, which says why the answer ended."""
        delta = wire.Delta(content=text) if reason is None else wire.Delta()
        logprobs = wire.chat_logprobs(scores) if self._is_scored and scores else None
        return self.envelope.document([wire.ChatChunkChoice(index, delta, logprobs, reason)])

    def document(self, states: Sequence[ChoiceState], usage: wire.Usage) -> wire.Document:
        """The document of all answers."""
        choices = []
        for index, state in enumerate(states):
            assert state.done is not None
            logprobs = wire.chat_logprobs(state.scores) if self._is_scored else None
            choices.append(wire.ChatChoice(index, wire.ChatMessage(state.text), logprobs, state.done.reason))
        return self.envelope.document(choices, usage)


def chat_prompt(body: ChatBody) -> ChatPrompt:
    """The conversation as the engine's side takes it; raises ApiError for one that cannot be answered."""
    messages = turns(body.messages)
    values = dict(body.chat_template_kwargs or {})
    _check_values(values, MAX_DEPTH)
    own = next((name for name in _OWN_VALUES if values.get(name)), None)
    if own is not None:
        raise unsupported(
            f"{own} is set by the server. Leave it out of chat_template_kwargs.", f"chat_template_kwargs.{own}"
        )
    if body.reasoning_effort is not None:
        values.setdefault("reasoning_effort", body.reasoning_effort)
    return ChatPrompt(messages, values)


def _check_beginning(body: ChatBody) -> None:
    """Raises ApiError unless the answer begins where the client wants it to: after the last message, or in it."""
    goes_on = body.messages[-1].role == "assistant"
    if body.continue_final_message and not goes_on:
        raise invalid("Only an assistant message can be continued. Let it be the last.", "continue_final_message")
    if body.continue_final_message and body.add_generation_prompt:
        raise invalid("An answer is a new message or continues the last one, not both.", "add_generation_prompt")
    if body.continue_final_message is False and goes_on:
        raise unsupported("An assistant message that comes last is always continued.", "continue_final_message")
    if body.add_generation_prompt is False and not goes_on:
        raise unsupported("An answer is always the assistant's next message.", "add_generation_prompt")


def _check_values(value: object, depth: int) -> None:
    """Raises ApiError for a value that cannot be passed on to the template."""
    if depth == 0:
        raise invalid(f"chat_template_kwargs is nested more than {MAX_DEPTH} deep.", "chat_template_kwargs")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise invalid(f"chat_template_kwargs holds {value}, which is no 64-bit integer.", "chat_template_kwargs")
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for element in inner:
        _check_values(element, depth - 1)


def refuse_unsupported(body: ChatBody) -> None:
    """Raises ApiError for what a chat client may ask for and this server does not do."""
    names_tool = body.tool_choice not in (None, "none", "auto")
    if (body.tools and body.tool_choice != "none") or names_tool:
        raise unsupported(_NO_TOOLS, "tools" if body.tools else "tool_choice")
    if (body.functions and body.function_call != "none") or body.function_call not in (None, "none", "auto"):
        raise unsupported(_NO_TOOLS, "functions" if body.functions else "function_call")
    if body.top_logprobs and not body.logprobs:
        raise invalid("top_logprobs is for answers with logprobs. Set logprobs to true, too.", "top_logprobs")
