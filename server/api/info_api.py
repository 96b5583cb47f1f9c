"""The endpoints that tell about the server and its model without generating."""

from collections.abc import Callable
from typing import Literal

import msgspec
from aiohttp import web
from msgspec import UNSET, UnsetType

from slimoe.server import messages
from slimoe.server.api.backends import Backend, Backends
from slimoe.server.api.endpoint import Endpoint, json_answer
from slimoe.server.api.metrics import Metrics
from slimoe.server.api.request_body import read_body
from slimoe.server.api_error import ErrorInfo, from_failure, invalid
from slimoe.server.process.request_handle import EngineFailure
from slimoe.server.process.supervisor import Supervisor

MAX_CHARS, MAX_PIECED_CHARS = 1 << 20, 1 << 17
"""Of a text to tokenize; each may be a token, and with pieces an object of the answer."""
Question = Callable[[int], messages.Question]


class TokenizeBody(msgspec.Struct):
    """`POST /tokenize`, in llama.cpp's spelling (`content`) or vLLM's (`prompt`)."""

    content: str | None = None
    prompt: str | None = None
    add_special: bool | None = None
    add_special_tokens: bool | None = None
    parse_special: bool = True
    with_pieces: bool = False
    model: str | None = None


class DetokenizeBody(msgspec.Struct):
    """`POST /detokenize`."""

    tokens: list[int]
    model: str | None = None


class Health(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """The answer of `/health`; while the model is being loaded `done_bytes` of `total_bytes` are there."""

    status: Literal["ok", "loading", "unavailable", "error"]
    is_sleeping: bool = False
    phase: str | None = None
    done_bytes: int | UnsetType = UNSET
    total_bytes: int | UnsetType = UNSET
    error: ErrorInfo | None = None


class ModelStatus(msgspec.Struct, frozen=True):
    """Whether a model is loaded."""

    value: str


class ModelSizes(msgspec.Struct, frozen=True):
    """What is known of a model; all but the bytes of its files once it has been opened."""

    size: int
    n_vocab: int | UnsetType = UNSET
    n_ctx_train: int | UnsetType = UNSET
    n_params: int | UnsetType = UNSET


class ModelCard(msgspec.Struct, frozen=True):
    """A model that is offered; its sizes are known once it has been opened.

    Of a model in a folder the plan tells whether it `fits`, and the `problem` if it does not or cannot be opened.
    """

    id: str
    object: str
    created: int
    owned_by: str
    status: ModelStatus
    max_model_len: int | UnsetType = UNSET
    meta: ModelSizes | UnsetType = UNSET
    fits: bool | UnsetType = UNSET
    required_bytes: int | UnsetType | None = UNSET
    problem: str | UnsetType | None = UNSET


class OfferedModels(msgspec.Struct, frozen=True):
    """The models that are offered."""

    object: str
    data: list[ModelCard]


class TokenizerInfo(msgspec.Struct, frozen=True):
    """What evaluation harnesses need of the tokenizer."""

    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    chat_template: str | None


class TokenPiece(msgspec.Struct, frozen=True):
    """A token with its text, or with its bytes where they are no whole text."""

    id: int
    piece: str | list[int]


class Tokenized(msgspec.Struct, frozen=True):
    """A text's tokens; the model's window holds `max_model_len`."""

    tokens: list[int | TokenPiece]
    count: int
    max_model_len: int | None


class Detokenized(msgspec.Struct, frozen=True):
    """The text of tokens, by the two names that clients look for."""

    content: str
    prompt: str


class InfoApi:
    """The endpoints' handlers."""

    def __init__(self, backends: Backends, metrics: Metrics) -> None:
        self._backends = backends
        self._metrics = metrics

    def endpoints(self) -> list[Endpoint]:
        """The endpoints."""
        return [
            Endpoint("GET", "/health", self.health, answer=Health, aliases=("/v1/health",), statuses=(503,)),
            Endpoint("GET", "/v1/models", self.models, answer=OfferedModels, aliases=("/models",)),
            Endpoint("GET", "/v1/models/{id:.+}", self.model, answer=ModelCard, statuses=(404,)),
            Endpoint("GET", "/metrics", self.metrics, content_type="text/plain"),
            Endpoint(
                "GET",
                "/tokenizer_info",
                self.tokenizer_info,
                answer=TokenizerInfo,
                aliases=("/v1/tokenizer_info",),
                statuses=(503,),
            ),
            Endpoint("POST", "/tokenize", self.tokenize, TokenizeBody, Tokenized, aliases=("/v1/tokenize",)),
            Endpoint("POST", "/detokenize", self.detokenize, DetokenizeBody, Detokenized, aliases=("/v1/detokenize",)),
        ]

    async def health(self, request: web.Request) -> web.Response:
        """200 when requests are answered; 503 with progress while loading or why not now, 500 when loading failed."""
        supervisor = self._supervisor
        trouble = supervisor.trouble
        if trouble is not None:
            info = ErrorInfo(trouble, "unavailable_error", None, "engine_unavailable")
            return json_answer(Health(status="unavailable", error=info), 503, {"Retry-After": "1"})
        if supervisor.phase == "ready":
            return json_answer(Health(status="ok"))
        if supervisor.phase == "asleep":
            # The next request wakes it: those who ask whether they may send one hear yes.
            return json_answer(Health(status="ok", is_sleeping=True))
        if supervisor.phase == "failed" and supervisor.failure is not None:
            error = from_failure(supervisor.failure)
            return json_answer(Health(status="error", error=error.info), 500)
        progress = supervisor.progress
        error_info = ErrorInfo("Loading model", "unavailable_error", None, "model_loading")
        body = Health(
            status="loading",
            phase=supervisor.phase,
            done_bytes=progress.done_bytes,
            total_bytes=progress.total_bytes,
            error=error_info,
        )
        return json_answer(body, 503, {"Retry-After": "1"})

    async def models(self, request: web.Request) -> web.Response:
        """The models, also while none is loaded."""
        return json_answer(OfferedModels("list", [_card(backend) for backend in self._backends.all()]))

    async def model(self, request: web.Request) -> web.Response:
        """The model by its id; raises ApiError for another."""
        id = request.match_info["id"]
        found = next((backend for backend in self._backends.all() if backend.model.id == id), None)
        if found is None:
            raise self._backends.unknown(id)
        return json_answer(_card(found))

    async def tokenizer_info(self, request: web.Request) -> web.Response:
        """What evaluation harnesses need of the tokenizer; waits for the model."""
        try:
            info = await self._supervisor.wait_ready()
        except EngineFailure as error:
            raise from_failure(error.failure) from None
        return json_answer(TokenizerInfo(info.bos or None, info.eos or None, None, info.chat_template))

    async def tokenize(self, request: web.Request) -> web.Response:
        """A text's token ids; raises ApiError."""
        body = await read_body(request, TokenizeBody)
        text = body.prompt if body.content is None else body.content
        if text is None:
            raise invalid("There is nothing to tokenize. Send `content` or `prompt`.", "content")
        # llama.cpp leaves BOS out unless asked, vLLM puts it in unless asked.
        default = body.content is None
        chosen = body.add_special if body.add_special_tokens is None else body.add_special_tokens
        add_special = default if chosen is None else chosen
        param = "prompt" if body.content is None else "content"
        most = MAX_PIECED_CHARS if body.with_pieces else MAX_CHARS
        if len(text) > most:
            raise invalid(f"The text has {len(text):,} characters, but may have {most:,}. Send it in parts.", param)
        question = messages.Encode(0, text, add_special, body.parse_special, body.with_pieces)
        backend = self._backends.named(body.model)
        answer = await backend.ask(lambda id: msgspec.structs.replace(question, id=id), param)
        assert isinstance(answer, messages.Encoded)
        tokens: list[int | TokenPiece] = [*answer.ids]
        if body.with_pieces:
            tokens = [_piece(id, piece) for id, piece in zip(answer.ids, answer.pieces, strict=True)]
        info = backend.supervisor.info
        n_ctx = None if info is None else info.n_ctx
        return json_answer(Tokenized(tokens, len(tokens), n_ctx))

    async def detokenize(self, request: web.Request) -> web.Response:
        """Token ids' text with the names of control tokens, under both names that clients look for; raises ApiError."""
        body = await read_body(request, DetokenizeBody)
        if any(not 0 <= token < 2**31 for token in body.tokens):
            raise invalid("A token id is a number from 0 to the vocabulary's size.", "tokens")
        backend = self._backends.named(body.model)
        answer = await backend.ask(lambda id: messages.Decode(id, tuple(body.tokens), shows_control=True), "tokens")
        assert isinstance(answer, messages.Text)
        return json_answer(Detokenized(answer.text, answer.text))

    async def metrics(self, request: web.Request) -> web.Response:
        """The counters in Prometheus' text format."""
        metrics = self._metrics
        headers = {"Content-Type": metrics.content_type, metrics.start_header: str(metrics.started_at)}
        return web.Response(body=metrics.text(), headers=headers)

    @property
    def _supervisor(self) -> Supervisor:
        return self._backends.current.supervisor


_STATUS = {"ready": "loaded", "loading": "loading", "failed": "failed"}
"""A model's status in llama-server's words, by the phase of its supervisor."""


def _card(backend: Backend) -> ModelCard:
    """A model as clients list it."""
    model, supervisor, info = backend.model, backend.supervisor, backend.supervisor.info
    sizes: ModelSizes | UnsetType = UNSET
    if info is not None:
        sizes = ModelSizes(info.n_bytes, info.n_vocab, info.n_ctx_train, info.n_params)
    elif model.n_bytes is not None:
        sizes = ModelSizes(model.n_bytes)
    card = ModelCard(
        model.id,
        "model",
        model.created,
        "slimoe",
        ModelStatus(_STATUS.get(supervisor.phase, "unloaded")),
        UNSET if info is None else info.n_ctx,
        sizes,
    )
    plan = model.plan
    if plan is None:
        return card
    n_ctx = card.max_model_len or plan.n_ctx or UNSET
    return msgspec.structs.replace(
        card, max_model_len=n_ctx, fits=plan.fits, required_bytes=plan.required_bytes or None, problem=plan.problem
    )


def _piece(id: int, piece: bytes) -> TokenPiece:
    try:
        return TokenPiece(id, piece.decode())
    except UnicodeDecodeError:
        return TokenPiece(id, list(piece))
