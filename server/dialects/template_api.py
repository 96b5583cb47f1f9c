"""`POST /apply-template` and `/v1/chat/completions/input_tokens`: what a conversation becomes, without an answer."""

import msgspec
from aiohttp import web

from slimoe.server import messages
from slimoe.server.api.endpoint import Endpoint, json_answer
from slimoe.server.api.generation_api import GenerationApi
from slimoe.server.api.request_body import MAX_CHAT_VALUES, read_body
from slimoe.server.api.unsupported_fields import CHAT
from slimoe.server.dialects.chat_api import ChatBody, ChatRequest, chat_prompt, refuse_unsupported


class AppliedTemplate(msgspec.Struct, frozen=True):
    """The answer: the prompt's text."""

    prompt: str


class ChatInputTokens(msgspec.Struct, frozen=True):
    """The answer: how many tokens the prompt is."""

    input_tokens: int
    object: str = "response.input_tokens"


class TemplateApi:
    """The endpoints' handlers."""

    def __init__(self, generation: GenerationApi) -> None:
        self._generation = generation

    def endpoints(self) -> list[Endpoint]:
        """The endpoints."""
        path, alias = "/v1/chat/completions/input_tokens", "/chat/completions/input_tokens"
        return [
            Endpoint("POST", "/apply-template", self.handle, ChatRequest, AppliedTemplate),
            Endpoint("POST", path, self.count, ChatRequest, ChatInputTokens, aliases=(alias,)),
        ]

    async def handle(self, request: web.Request) -> web.Response:
        """Renders a conversation by the model's chat template; raises ApiError."""
        body, prompt = await self._read(request)
        generate = body.add_generation_prompt is not False
        backend = self._generation.backends.named(body.model)
        answer = await backend.ask(lambda id: messages.Render(id, prompt, generate), "messages")
        assert isinstance(answer, messages.Text)
        return json_answer(AppliedTemplate(answer.text))

    async def count(self, request: web.Request) -> web.Response:
        """Counts the tokens that a conversation comes to; raises ApiError."""
        body, prompt = await self._read(request)
        backend = self._generation.backends.named(body.model)
        return json_answer(ChatInputTokens(await self._generation.count(backend, prompt, "messages")))

    async def _read(self, request: web.Request) -> tuple[ChatBody, messages.ChatPrompt]:
        body = await read_body(request, ChatRequest, MAX_CHAT_VALUES)
        self._generation.unsupported.refuse(body, CHAT)
        refuse_unsupported(body)
        return body, chat_prompt(body)
