"""`POST /v1/chat/completions`."""

from typing import Any, Literal

import msgspec
from aiohttp import web

from slimoe.server.api import wire
from slimoe.server.api.choice import choices_of
from slimoe.server.api.endpoint import Endpoint
from slimoe.server.api.generation_api import GenerationApi
from slimoe.server.api.request_body import MAX_CHAT_VALUES, LogprobCount, read_body
from slimoe.server.api.shape import Envelope
from slimoe.server.api.unsupported_fields import CHAT, extended
from slimoe.server.api_error import invalid, unsupported
from slimoe.server.chat.history import Message, turns
from slimoe.server.dialects.chat_shape import ChatShape
from slimoe.server.dialects.chat_tools import ToolsBody, tools_of
from slimoe.server.dialects.conversation import reasoning_values
from slimoe.server.messages import ChatPrompt

MAX_DEPTH = 32
_OWN_VALUES = ("messages", "tools", "documents")


class Reasoning(msgspec.Struct):
    """`reasoning`: how much the model reasons before it answers, and whether at all."""

    effort: str | None = None
    enabled: bool | None = None


class ChatBody(ToolsBody, kw_only=True):
    """`POST /v1/chat/completions`."""

    messages: list[Message]
    logprobs: bool | None = None
    top_logprobs: LogprobCount | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    reasoning: Reasoning | None = None
    reasoning_format: Literal["none", "auto", "deepseek"] | None = None
    enable_thinking: bool | None = None


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
        shape = ChatShape(envelope, body.extras, is_scored=n_logprobs is not None, is_older=body.is_older)
        return await self._generation.answer(request, backend, choices, shape, stream=body.stream)


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
    reasoning = body.reasoning or Reasoning()
    effort, thinks = body.reasoning_effort or reasoning.effort, body.enable_thinking
    thinks = reasoning.enabled if thinks is None and effort != "none" else thinks
    values = {**reasoning_values(effort, thinks), **values}
    tools, choice = tools_of(body)
    return ChatPrompt(messages, values, tools, choice, keeps_reasoning=body.reasoning_format == "none")


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
    if body.top_logprobs and not body.logprobs:
        raise invalid("top_logprobs is for answers with logprobs. Set logprobs to true, too.", "top_logprobs")
