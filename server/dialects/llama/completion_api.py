"""`POST /completion` and `/infill`, as llama-server has them."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

import msgspec
from aiohttp import web

from slimoe.offload.text.infill import InfillTokens
from slimoe.server import messages
from slimoe.server.api.backends import Backend
from slimoe.server.api.choice import choices_of
from slimoe.server.api.endpoint import Endpoint
from slimoe.server.api.generation_api import GenerationApi
from slimoe.server.api.request_body import MAX_PROMPTS, read_body
from slimoe.server.api.unsupported_fields import extended
from slimoe.server.api_error import UNSUPPORTED, ApiError, ErrorInfo, from_failure, invalid
from slimoe.server.dialects.llama.completion_body import (
    LLAMA,
    LlamaCompletionBody,
    LlamaCompletionRequest,
    Part,
    biases_of,
    check_texts,
    prompts_of,
)
from slimoe.server.dialects.llama.completion_shape import LlamaCompletion, LlamaOptions, LlamaShape
from slimoe.server.messages import ModelInfo, PromptSource, TextPrompt, TokenPrompt
from slimoe.server.process.request_handle import EngineFailure

_REPOSITORY, _FILE = "myproject\n", "filename\n"
"""What a repository and the file in hand are called where clients do not tell, as llama-server calls them."""
_SNIPPET = "\n\n--- snippet ---\n\n"


class ExtraFile(msgspec.Struct):
    """A file that is not the one in hand, but may help."""

    text: str
    filename: str = "tmp"


class InfillBody(LlamaCompletionBody, kw_only=True):
    """`POST /infill`; `prompt` is what is written already behind the prefix."""

    input_prefix: str
    input_suffix: str
    input_extra: list[ExtraFile] | None = None
    prompt: str = ""


InfillRequest = extended(InfillBody, LLAMA)

ChosenFields = Annotated[
    dict[str, Any], msgspec.Meta(description="The fields that `response_fields` named, as far as the answer has them.")
]
"""What stands in place of a `LlamaCompletion` when a request names fields."""


class LlamaCompletionApi:
    """The endpoints' handlers."""

    def __init__(self, generation: GenerationApi) -> None:
        self._generation = generation

    def endpoints(self) -> list[Endpoint]:
        """The endpoints."""
        answer = LlamaCompletion | list[LlamaCompletion] | ChosenFields | list[ChosenFields]
        return [
            Endpoint("POST", "/completion", self.complete, LlamaCompletionRequest, answer, True, ("/completions",)),
            Endpoint("POST", "/infill", self.fill, InfillRequest, answer, streams=True),
        ]

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """Continues one or many prompts in llama-server's form; raises ApiError."""
        body = await read_body(request, LlamaCompletionRequest)
        self._generation.unsupported.refuse(body, LLAMA)
        prompts = prompts_of(body.prompt)
        backend = self._generation.backends.named(body.model, body.keep)
        info = await _info(backend)
        sources = [await _source(backend, prompt) for prompt in prompts]
        return await self._answer(request, body, backend, info, sources)

    async def fill(self, request: web.Request) -> web.StreamResponse:
        """Fills the gap between two texts, where the model has tokens for that; raises ApiError."""
        body = await read_body(request, InfillRequest)
        self._generation.unsupported.refuse(body, LLAMA)
        backend = self._generation.backends.named(body.model, body.keep)
        info = await _info(backend)
        if info.infill is None:
            message = (
                "This model cannot fill in the middle: its vocabulary has no tokens for prefix, suffix and middle. "
                "Use a model that was trained for it, or /completion."
            )
            raise ApiError(501, ErrorInfo(message, UNSUPPORTED, None, "unsupported_by_model"))
        source = await _infill_source(backend, info.infill, info.n_ctx, body)
        return await self._answer(request, body, backend, info, [source])

    async def _answer(
        self,
        request: web.Request,
        body: LlamaCompletionBody,
        backend: Backend,
        info: ModelInfo,
        sources: Sequence[PromptSource],
    ) -> web.StreamResponse:
        n_choices = body.n_choices if body.n_cmpl is None else body.n_cmpl
        if len(sources) * n_choices > MAX_PROMPTS:
            raise invalid(f"n times the number of prompts may be at most {MAX_PROMPTS:,}.", "n")
        body.logit_bias = await _token_biases(backend, bytes(body.logit_bias))
        wanted = body.request(body.limit(), body.n_probs or None, prompt_logprobs=False)
        wanted = replace(wanted, is_read_whole=body.cache_prompt is False)
        fields = tuple(body.response_fields or ())
        shows_prompt = not fields or "prompt" in fields
        choices = choices_of(sources, wanted, n_choices, shows_prompt=shows_prompt)
        options = LlamaOptions(
            model=backend.model.id,
            eog=info.eog,
            extras=body.extras,
            stream=bool(body.stream),
            with_tokens=bool(body.return_tokens),
            fields=fields,
        )
        shape = LlamaShape(options, len(choices))
        return await self._generation.answer(request, backend, choices, shape, stream=body.stream)


async def _info(backend: Backend) -> ModelInfo:
    try:
        return await backend.supervisor.wait_ready()
    except EngineFailure as error:
        raise from_failure(error.failure, "prompt") from None


async def _source(backend: Backend, prompt: str | list[Part]) -> PromptSource:
    """A prompt as the engine takes it; texts among ids are tokenized, with the model's first token if they begin."""
    if isinstance(prompt, str):
        return TextPrompt(prompt)
    ids: list[int] = []
    for n, part in enumerate(prompt):
        ids += [part] if isinstance(part, int) else await _encoded(backend, part, add_special=n == 0)
    return TokenPrompt(tuple(ids))


async def _infill_source(backend: Backend, marks: InfillTokens, n_ctx: int, body: InfillBody) -> PromptSource:
    """The prompt that asks for what is missing; of further files the last tokens that fit into half the window."""
    extras = body.input_extra or []
    check_texts([extra.text for extra in extras], "input_extra")
    further: list[int] = []
    if marks.repository is not None:
        further += [marks.repository, *await _encoded(backend, _REPOSITORY, parse_special=False)]
    for extra in extras:
        name = _SNIPPET if marks.file is None else f"{extra.filename}\n"
        further += [] if marks.file is None else [marks.file]
        further += await _encoded(backend, name, parse_special=False)
        further += await _encoded(backend, extra.text, parse_special=False)
    if marks.file is not None:
        further += [marks.file, *await _encoded(backend, _FILE, parse_special=False)]
    # With the model's first token, if it has one.
    first = await _encoded(backend, "", add_special=True)
    before = await _encoded(backend, body.input_prefix, parse_special=False)
    written = await _encoded(backend, body.prompt, parse_special=False)
    behind = await _encoded(backend, body.input_suffix, parse_special=False)
    own = [*first, marks.prefix, *before, *written, marks.suffix, *behind, marks.middle]
    n_further = max(0, n_ctx // 2 - len(own))
    return TokenPrompt((*further[len(further) - n_further :], *own) if n_further < len(further) else (*further, *own))


async def _token_biases(backend: Backend, data: bytes) -> msgspec.Raw:
    """The biases by token id, as every dialect has them; a text's bias is that of each of its tokens."""
    found: dict[str, Any] = {}
    for part, bias in biases_of(data):
        tokens = (part,) if isinstance(part, int) else await _inner(backend, part)
        found |= dict.fromkeys(map(str, tokens), False if bias == -math.inf else bias)
    return msgspec.Raw(msgspec.json.encode(found))


async def _inner(backend: Backend, text: str) -> tuple[int, ...]:
    """The tokens of a text that stands within another: a tokenizer that puts a space first must not double it."""
    encoded = await _asked(backend, messages.Encode(0, text, False, False, with_pieces=True))
    if text.startswith(" ") and b"".join(encoded.pieces).startswith(b" " + text.encode("utf-8", "replace")):
        return await _encoded(backend, text[1:], parse_special=False)
    return encoded.ids


async def _encoded(
    backend: Backend, text: str, *, add_special: bool = False, parse_special: bool = True
) -> tuple[int, ...]:
    return (await _asked(backend, messages.Encode(0, text, add_special, parse_special))).ids


async def _asked(backend: Backend, question: messages.Encode) -> messages.Encoded:
    answer = await backend.ask(lambda id: msgspec.structs.replace(question, id=id), "prompt")
    assert isinstance(answer, messages.Encoded)
    return answer
