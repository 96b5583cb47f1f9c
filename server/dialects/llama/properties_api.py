"""`GET /props` and `/slots`: what the server was started with, and what it works on."""

import os

import msgspec
from aiohttp import web
from msgspec import UNSET, UnsetType

from slimoe.offload.text.generation import GenerationRequest
from slimoe.server.api.backends import Backends
from slimoe.server.api.endpoint import Endpoint, json_answer
from slimoe.server.api.request_body import Defaults
from slimoe.server.api_error import UNSUPPORTED, ApiError, ErrorInfo
from slimoe.server.dialects.llama.settings import GenerationSettings, settings_of
from slimoe.server.process.request_handle import RequestHandle

_QUERY = {"fail_on_no_slot": "With any value the status is 503 when no slot is free."}


class DefaultSettings(msgspec.Struct, frozen=True):
    """How an answer is generated when its request does not say."""

    params: GenerationSettings
    n_ctx: int | None


class Modalities(msgspec.Struct, frozen=True):
    """What the model reads besides text."""

    vision: bool = False
    audio: bool = False
    video: bool = False


class Properties(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of `/props`; what is null is known once the model is open."""

    default_generation_settings: DefaultSettings
    total_slots: int
    model_alias: str
    model_path: str
    modalities: Modalities = Modalities()
    endpoint_slots: bool
    endpoint_props: bool = False
    endpoint_metrics: bool = True
    chat_template: str | None
    bos_token: str | None
    eos_token: str | None
    build_info: str
    is_sleeping: bool
    n_ctx: int | None
    n_ctx_train: int | None
    pid: int
    engine_pid: int | None
    memory: dict[str, int]


class NextToken(msgspec.Struct, frozen=True):
    """How far an answer is."""

    has_next_token: bool
    n_decoded: int


class Slot(msgspec.Struct, frozen=True, kw_only=True):
    """One of the requests that are answered at once; the later fields are there while it is worked on."""

    id: int
    n_ctx: int | None
    speculative: bool = False
    is_processing: bool
    id_task: int | UnsetType = UNSET
    n_prompt_tokens: int | UnsetType = UNSET
    n_prompt_tokens_processed: int | UnsetType = UNSET
    n_prompt_tokens_cache: int | UnsetType = UNSET
    next_token: list[NextToken] | UnsetType = UNSET


class PropertiesApi:
    """The endpoints' handlers; without `shows_slots` nobody is told of slots."""

    def __init__(self, backends: Backends, defaults: Defaults, *, shows_slots: bool) -> None:
        self._backends = backends
        self._defaults = defaults
        self._shows_slots = shows_slots

    def endpoints(self) -> list[Endpoint]:
        """The endpoints."""
        return [
            Endpoint("GET", "/props", self.props, answer=Properties, aliases=("/v1/props",)),
            Endpoint("GET", "/slots", self.slots, answer=list[Slot], statuses=(501, 503), query=_QUERY),
        ]

    async def props(self, request: web.Request) -> web.Response:
        """What the server was started with and what the model is, once it is open."""
        model, supervisor = self._backends.current.model, self._backends.current.supervisor
        info, defaults = supervisor.info, self._defaults
        wanted = GenerationRequest((), defaults.max_tokens, defaults.sampling)
        n_ctx = None if info is None else info.n_ctx
        document = Properties(
            default_generation_settings=DefaultSettings(settings_of(wanted), n_ctx),
            total_slots=supervisor.n_parallel,
            model_alias=model.id,
            model_path=str(model.path),
            endpoint_slots=self._shows_slots,
            chat_template=None if info is None else info.chat_template,
            bos_token=None if info is None else info.bos,
            eos_token=None if info is None else info.eos,
            build_info=f"slimoe {model.version}",
            is_sleeping=supervisor.phase == "asleep",
            n_ctx=n_ctx,
            n_ctx_train=None if info is None else info.n_ctx_train,
            pid=os.getpid(),
            engine_pid=supervisor.pid,
            memory={} if info is None else info.memory,
        )
        return json_answer(document)

    async def slots(self, request: web.Request) -> web.Response:
        """What each slot works on; with `fail_on_no_slot` status 503 when none is free. Raises ApiError."""
        if not self._shows_slots:
            message = "This server tells nobody of its slots. Start it without --no-slots."
            raise ApiError(501, ErrorInfo(message, UNSUPPORTED, None, "endpoint_off"))
        supervisor = self._backends.current.supervisor
        if request.query.get("fail_on_no_slot") and None not in supervisor.slots.handles:
            message = "No slot is free: as many requests are answered as may be at once."
            raise ApiError(503, ErrorInfo(message, "unavailable_error", None, "no_slot"), headers={"Retry-After": "1"})
        n_ctx = None if supervisor.info is None else supervisor.info.n_ctx
        slots = [_slot(number, handle, n_ctx) for number, handle in enumerate(supervisor.slots.handles)]
        return json_answer(slots)


def _slot(number: int, handle: RequestHandle | None, n_ctx: int | None) -> Slot:
    if handle is None or handle.progress is None:
        return Slot(id=number, n_ctx=n_ctx, is_processing=False)
    progress = handle.progress
    return Slot(
        id=number,
        n_ctx=n_ctx,
        is_processing=True,
        id_task=handle.id,
        n_prompt_tokens=progress.n_total,
        n_prompt_tokens_processed=progress.n_done - progress.n_cached,
        n_prompt_tokens_cache=progress.n_cached,
        next_token=[NextToken(has_next_token=not handle.is_over, n_decoded=handle.n_decoded)],
    )
