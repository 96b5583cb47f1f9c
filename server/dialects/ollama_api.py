"""Ollama's API: chats and texts as lines of JSON, and what its clients ask about models."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec
from aiohttp import web

from slimoe.server.api.backends import Backend
from slimoe.server.api.choice import Choice
from slimoe.server.api.endpoint import Endpoint, json_answer
from slimoe.server.api.generation_api import GenerationApi
from slimoe.server.api.request_body import DEFAULTS, MAX_CHAT_VALUES, read_body
from slimoe.server.api.unsupported_fields import extended
from slimoe.server.api_error import UNSUPPORTED, ApiError, ErrorInfo, from_failure
from slimoe.server.dialects.ollama_body import CHAT, GENERATE, OllamaBody, OllamaChatBody, OllamaGenerateBody
from slimoe.server.dialects.ollama_shape import ChatAnswer, GenerateAnswer, OllamaError, OllamaShape, error_body
from slimoe.server.formats.families import think_of
from slimoe.server.http.event_stream import LINES
from slimoe.server.messages import ModelInfo, PromptSource
from slimoe.server.process.request_handle import EngineFailure

VERSION = "0.12.0"
"""The version of Ollama whose API is spoken: clients compare it with the oldest that they know."""
_NEVER = "9999-12-31T23:59:59Z"
_ABSENT = ("/api/push", "/api/create", "/api/copy", "/api/embed", "/api/embeddings")
ChatRequest = extended(OllamaChatBody, CHAT)
GenerateRequest = extended(OllamaGenerateBody, GENERATE)


class VersionAnswer(msgspec.Struct, frozen=True):
    """`GET /api/version`; `slimoe` is this program's own."""

    version: str
    slimoe: str


class ModelDetails(msgspec.Struct, frozen=True):
    """What a model is."""

    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str
    format: str = "gguf"
    parent_model: str = ""


class ModelEntry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A model in a list; the last three fields are those of one that is loaded."""

    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: ModelDetails
    expires_at: str | None = None
    size_vram: int | None = None
    context_length: int | None = None


class ModelList(msgspec.Struct, frozen=True):
    """`GET /api/tags` and `GET /api/ps`."""

    models: list[ModelEntry]


class ShowBody(msgspec.Struct):
    """`POST /api/show`; `name` is the older name of `model`."""

    model: str | None = None
    name: str | None = None


class ShowAnswer(msgspec.Struct, frozen=True):
    """`POST /api/show`."""

    template: str
    details: ModelDetails
    model_info: dict[str, Any]
    capabilities: list[str]
    modified_at: str
    modelfile: str = ""
    parameters: str = ""
    license: str = ""


class OllamaApi:
    """The endpoints' handlers."""

    def __init__(self, generation: GenerationApi) -> None:
        self._generation = generation

    def endpoints(self) -> list[Endpoint]:
        """The endpoints."""
        endpoints = [
            Endpoint("POST", "/api/chat", self.chat, ChatRequest, ChatAnswer, streams=True),
            Endpoint("POST", "/api/generate", self.generate, GenerateRequest, GenerateAnswer, streams=True),
            Endpoint("GET", "/api/version", self.version, answer=VersionAnswer),
            Endpoint("GET", "/api/tags", self.tags, answer=ModelList),
            Endpoint("GET", "/api/ps", self.ps, answer=ModelList),
            Endpoint("POST", "/api/show", self.show, ShowBody, ShowAnswer),
            Endpoint("POST", "/api/pull", self.absent, aliases=_ABSENT, statuses=(501,)),
            Endpoint("DELETE", "/api/delete", self.absent, statuses=(501,)),
        ]
        return [
            replace(endpoint, error_body=error_body, error=OllamaError, stream_type=LINES.content_type)
            for endpoint in endpoints
        ]

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """Answers a chat as Ollama does; raises ApiError."""
        body = await read_body(request, ChatRequest, MAX_CHAT_VALUES)
        self._generation.unsupported.refuse(body, CHAT)
        return await self._answer(request, body, body.source(), is_chat=True)

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """Answers a text as Ollama does; raises ApiError."""
        body = await read_body(request, GenerateRequest, MAX_CHAT_VALUES)
        self._generation.unsupported.refuse(body, GENERATE)
        return await self._answer(request, body, body.source(), is_chat=False)

    async def version(self, request: web.Request) -> web.Response:
        """The version of Ollama's API, and of this program."""
        return json_answer(VersionAnswer(VERSION, self._generation.backends.current.model.version))

    async def tags(self, request: web.Request) -> web.Response:
        """The models that are offered."""
        return json_answer(ModelList([_entry(backend) for backend in self._generation.backends.all()]))

    async def ps(self, request: web.Request) -> web.Response:
        """The models that are loaded."""
        entries = []
        for backend in self._generation.backends.all():
            info = backend.supervisor.info
            if info is not None and backend.supervisor.phase == "ready":
                loaded = {"expires_at": _NEVER, "size_vram": _on_devices(info.memory), "context_length": info.n_ctx}
                entries.append(msgspec.structs.replace(_entry(backend), **loaded))
        return json_answer(ModelList(entries))

    async def show(self, request: web.Request) -> web.Response:
        """What a model is; waits until it is open, raises ApiError."""
        body = await read_body(request, ShowBody)
        backend = self._generation.backends.named(_without_tag(body.model or body.name))
        info = await _load(backend)
        facts = {
            "general.architecture": info.architecture,
            "general.basename": backend.model.id,
            "general.parameter_count": info.n_params,
            f"{info.architecture}.context_length": info.n_ctx,
        }
        template = info.chat_template or ""
        capabilities = ["completion", "tools", *(["thinking"] if think_of(template) else [])]
        return json_answer(ShowAnswer(template, _details(info), facts, capabilities, _entry(backend).modified_at))

    async def absent(self, request: web.Request) -> web.Response:
        """Says that models are neither fetched, made nor embedded with here."""
        message = f"This server does not do {request.path}: it answers with the models that it was started with."
        raise ApiError(501, ErrorInfo(message, UNSUPPORTED))

    async def _answer(
        self, request: web.Request, body: OllamaBody, source: PromptSource | None, *, is_chat: bool
    ) -> web.StreamResponse:
        wanted = body.request(self._generation.unsupported, request.app[DEFAULTS])
        backend = self._generation.backends.named(_without_tag(body.model), body.keep)
        shape = OllamaShape(backend.model.id, is_chat=is_chat, is_scored=body.n_logprobs is not None)
        if source is None:
            # Nobody loads a model to have it unloaded.
            is_unwanted = body.keep == 0 and backend.supervisor.phase != "ready"
            if not is_unwanted:
                await _load(backend)
            reason: Literal["load", "unload"] = "unload" if body.keep == 0 else "load"
            return web.Response(body=shape.without_answer(reason), content_type="application/json")
        choices = [Choice(source, wanted)]
        return await self._generation.answer(request, backend, choices, shape, stream=body.stream is not False)


def _without_tag(name: str | None) -> str | None:
    """The name without the tag that Ollama's clients put behind one that has none."""
    return name and name.removesuffix(":latest")


async def _load(backend: Backend) -> ModelInfo:
    """Waits until the model is open, which is held as its backend says; raises ApiError."""
    try:
        with backend.supervisor.hold(backend.keep) as is_on:
            await is_on
            return await backend.supervisor.wait_ready()
    except EngineFailure as error:
        raise from_failure(error.failure) from None


def _entry(backend: Backend) -> ModelEntry:
    """The model as lists have it; what its file says is known once it was open."""
    model, info = backend.model, backend.supervisor.info
    return ModelEntry(
        name=model.id,
        model=model.id,
        modified_at=datetime.fromtimestamp(model.created, UTC).isoformat().replace("+00:00", "Z"),
        size=(model.n_bytes or 0) if info is None else info.n_bytes,
        digest=hashlib.sha256(model.fingerprint.encode()).hexdigest(),
        details=ModelDetails("", [], "", "") if info is None else _details(info),
    )


def _details(info: ModelInfo) -> ModelDetails:
    n_params = info.n_params
    size = f"{n_params / 1e9:.1f}B" if n_params >= 1e9 else f"{n_params / 1e6:.2f}M"
    return ModelDetails(info.architecture, [info.architecture], size, info.quantization)


def _on_devices(memory: Mapping[str, int]) -> int:
    """The bytes of `memory` that lie on devices, whose names are such as CUDA0; uses of host memory are lower case."""
    return sum(n_bytes for name, n_bytes in memory.items() if name[:1].isupper())
