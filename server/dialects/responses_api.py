"""OpenAI's `POST /v1/responses`, whole or streamed, of which nothing is kept, and `/v1/responses/input_tokens`."""

import time
import uuid

from aiohttp import web

from slimoe.offload.text.generation import GenerationRequest
from slimoe.server.api.choice import Choice
from slimoe.server.api.endpoint import Endpoint, json_answer
from slimoe.server.api.generation_api import GenerationApi
from slimoe.server.api.request_body import DEFAULTS, MAX_CHAT_VALUES, read_body, stop_strings
from slimoe.server.api.unsupported_fields import extended
from slimoe.server.dialects.responses_body import (
    UNSUPPORTED,
    InputBody,
    ReasoningConfig,
    ResponsesBody,
    TextConfig,
    TextFormat,
    chat_prompt,
)
from slimoe.server.dialects.responses_shape import ResponsesShape
from slimoe.server.dialects.responses_wire import Response, ResponseInputTokens

ResponsesRequest = extended(ResponsesBody, UNSUPPORTED)
InputRequest = extended(InputBody, UNSUPPORTED)


class ResponsesApi:
    """The endpoints' handlers."""

    def __init__(self, generation: GenerationApi) -> None:
        self._generation = generation

    def endpoints(self) -> list[Endpoint]:
        """The endpoints."""
        path = "/v1/responses"
        return [
            Endpoint("POST", path, self.handle, ResponsesRequest, Response, streams=True, aliases=("/responses",)),
            Endpoint(
                "POST",
                f"{path}/input_tokens",
                self.count,
                InputRequest,
                ResponseInputTokens,
                aliases=("/responses/input_tokens",),
            ),
        ]

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answers a conversation of items as OpenAI's Responses do; raises ApiError."""
        body = await read_body(request, ResponsesRequest, MAX_CHAT_VALUES)
        self._generation.unsupported.refuse(body, UNSUPPORTED)
        backend = self._generation.backends.named(body.model)
        wanted = GenerationRequest(
            prompt_ids=(),
            max_tokens=body.max_output_tokens or request.app[DEFAULTS].max_tokens,
            sampling=body.sampling(),
            stop=stop_strings(body.stop),
            ignore_eos=bool(body.ignore_eos),
            n_logprobs=body.n_logprobs,
            constraint=body.constraint(),
        )
        choices = [Choice(chat_prompt(body), wanted)]
        shape = ResponsesShape(
            _response(body, wanted, backend.model.id),
            body.callable_tools(),
            is_scored=body.n_logprobs is not None,
            with_progress=bool(body.return_progress),
            with_timings=bool(body.timings_per_token),
        )
        return await self._generation.answer(request, backend, choices, shape, stream=body.stream)

    async def count(self, request: web.Request) -> web.Response:
        """Counts the tokens of a conversation of items without answering it; raises ApiError."""
        body = await read_body(request, InputRequest, MAX_CHAT_VALUES)
        self._generation.unsupported.refuse(body, UNSUPPORTED)
        backend = self._generation.backends.named(body.model)
        n_tokens = await self._generation.count(backend, chat_prompt(body), "input")
        return json_answer(ResponseInputTokens(n_tokens))


def _response(body: ResponsesBody, wanted: GenerationRequest, model: str) -> Response:
    """The answer before anything has come, with what it was asked for by."""
    return Response(
        id=f"resp_{uuid.uuid4().hex}",
        created_at=int(time.time()),
        model=model,
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        metadata=body.metadata or {},
        parallel_tool_calls=body.parallel_tool_calls is not False,
        reasoning=body.reasoning or ReasoningConfig(),
        temperature=wanted.sampling.temperature,
        text=body.text if body.text is not None and body.text.format is not None else TextConfig(TextFormat("text")),
        tool_choice=body.tool_choice or "auto",
        tools=body.tools or [],
        top_logprobs=body.top_logprobs or 0,
        top_p=wanted.sampling.top_p,
        user=body.user,
    )
