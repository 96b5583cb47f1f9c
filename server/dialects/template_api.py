"""`POST /apply-template`: the text that a conversation becomes. Apart: no answer is generated."""

import msgspec
from aiohttp import web

from slimoe.server import messages
from slimoe.server.api.endpoint import Endpoint
from slimoe.server.api.generation_api import GenerationApi
from slimoe.server.api.request_body import MAX_CHAT_VALUES, read_body
from slimoe.server.api.unsupported_fields import CHAT
from slimoe.server.api_error import from_failure
from slimoe.server.dialects.chat_api import ChatRequest, chat_prompt, refuse_unsupported
from slimoe.server.process.request_handle import EngineFailure


class AppliedTemplate(msgspec.Struct, frozen=True):
    """The answer: the prompt's text."""

    prompt: str


class TemplateApi:
    """The endpoint's handler."""

    def __init__(self, generation: GenerationApi) -> None:
        self._generation = generation

    def endpoints(self) -> list[Endpoint]:
        """The endpoint."""
        return [Endpoint("POST", "/apply-template", self.handle, ChatRequest, AppliedTemplate)]

    async def handle(self, request: web.Request) -> web.Response:
        """Renders a conversation by the model's chat template; raises ApiError."""
        body = await read_body(request, ChatRequest, MAX_CHAT_VALUES)
        self._generation.unsupported.refuse(body, CHAT)
        refuse_unsupported(body)
        prompt = chat_prompt(body)
        generate = body.add_generation_prompt is not False
        try:
            supervisor = self._generation.backends.named(body.model).supervisor
            answer = await supervisor.ask(lambda id: messages.Render(id, prompt, generate))
        except EngineFailure as error:
            raise from_failure(error.failure, "messages") from None
        assert isinstance(answer, messages.Text)
        return web.Response(body=msgspec.json.encode(AppliedTemplate(answer.text)), content_type="application/json")
