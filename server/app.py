"""The HTTP application: every group of endpoints in one place."""

from dataclasses import dataclass, field
from pathlib import Path

from aiohttp import web

from slimoe.server.api.backends import Backends
from slimoe.server.api.events_api import EventsApi
from slimoe.server.api.generation_api import PING_SECONDS, GenerationApi
from slimoe.server.api.info_api import InfoApi
from slimoe.server.api.loading_api import LoadingApi
from slimoe.server.api.memory_api import MemoryApi
from slimoe.server.api.metrics import Metrics
from slimoe.server.api.request_body import DEFAULTS, Defaults
from slimoe.server.description.description_api import DescriptionApi
from slimoe.server.dialects.chat_api import ChatApi
from slimoe.server.dialects.completion_api import CompletionApi
from slimoe.server.dialects.llama.completion_api import LlamaCompletionApi
from slimoe.server.dialects.llama.properties_api import PropertiesApi
from slimoe.server.dialects.llama.slots_api import SlotsApi
from slimoe.server.dialects.messages_api import MessagesApi
from slimoe.server.dialects.not_offered import NotOfferedApi
from slimoe.server.dialects.ollama_api import OllamaApi
from slimoe.server.dialects.responses_api import ResponsesApi
from slimoe.server.dialects.template_api import TemplateApi
from slimoe.server.http.access import RULES, AccessRules, access_middleware, add_cors_headers
from slimoe.server.http.body_intake import INTAKE, BodyIntake
from slimoe.server.http.connection import ERROR_BODIES
from slimoe.server.page.page import Page
from slimoe.server.watch.feed import Feed
from slimoe.server.watch.prompt_log import PromptLog
from slimoe.server.watch.record import FEED, LOG, add_request_id, record_middleware
from slimoe.server.watch.request_log import log_request


@dataclass(frozen=True, slots=True)
class AppConfig:
    """What an application needs besides its models."""

    rules: AccessRules = field(default_factory=AccessRules)
    ping_seconds: float = PING_SECONDS
    has_page: bool = True
    defaults: Defaults = field(default_factory=Defaults)
    shows_slots: bool = True
    prompt_log: PromptLog | None = None
    slot_directory: Path | None = None
    logs_requests: bool = True


def init_app(config: AppConfig, backends: Backends) -> web.Application:
    """The application over models, which it neither starts nor stops."""
    app = web.Application(middlewares=[record_middleware, access_middleware])
    app[RULES] = config.rules
    app[INTAKE] = BodyIntake()
    app[DEFAULTS] = config.defaults
    feed = app[FEED] = Feed()
    app[LOG] = log_request if config.logs_requests else lambda record: None
    app.on_response_prepare.append(add_cors_headers)
    app.on_response_prepare.append(add_request_id)
    metrics = Metrics(backends)
    generation = GenerationApi(backends, metrics, config.ping_seconds, config.prompt_log)
    groups = (
        ChatApi(generation),
        CompletionApi(generation),
        MessagesApi(generation),
        ResponsesApi(generation),
        OllamaApi(generation),
        TemplateApi(generation),
        InfoApi(backends, metrics),
        MemoryApi(backends),
        LoadingApi(backends),
        LlamaCompletionApi(generation),
        PropertiesApi(backends, config.defaults, shows_slots=config.shows_slots),
        SlotsApi(backends, config.slot_directory),
        NotOfferedApi(),
        EventsApi(backends, feed, config.ping_seconds),
    )
    endpoints = [endpoint for group in groups for endpoint in group.endpoints()]
    version, is_keyed = backends.default.model.version, config.rules.key is not None
    endpoints += DescriptionApi(endpoints, version, asks_for_key=is_keyed).endpoints()
    app[ERROR_BODIES] = {path: one.error_body for one in endpoints for path in (one.path, *one.aliases)}
    for endpoint in endpoints:
        app.router.add_routes(endpoint.routes())
    if config.has_page:
        app.router.add_routes(Page().routes())
    return app
