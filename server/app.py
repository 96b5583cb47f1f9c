"""The HTTP application: every route in one place."""

from dataclasses import dataclass, field

from aiohttp import web

from slimoe.server.api.chat_api import ChatApi
from slimoe.server.api.completion_api import CompletionApi
from slimoe.server.api.generation_api import PING_SECONDS, GenerationApi
from slimoe.server.api.info_api import InfoApi
from slimoe.server.api.metrics import Metrics
from slimoe.server.api.served_model import ServedModel
from slimoe.server.http.access import RULES, AccessRules, access_middleware, add_cors_headers
from slimoe.server.http.body_intake import INTAKE, BodyIntake
from slimoe.server.process.supervisor import Supervisor


@dataclass(frozen=True, slots=True)
class AppConfig:
    """What an application needs besides its engine."""

    model: ServedModel
    rules: AccessRules = field(default_factory=AccessRules)
    ping_seconds: float = PING_SECONDS


def init_app(config: AppConfig, supervisor: Supervisor) -> web.Application:
    """The application over a started supervisor, which it neither starts nor stops."""
    app = web.Application(middlewares=[access_middleware])
    app[RULES] = config.rules
    app[INTAKE] = BodyIntake()
    app.on_response_prepare.append(add_cors_headers)
    metrics = Metrics(supervisor)
    info = InfoApi(config.model, supervisor, metrics)
    generation = GenerationApi(supervisor, metrics, config.ping_seconds)
    routes = [
        web.post("/v1/chat/completions", ChatApi(config.model, generation).handle),
        web.post("/v1/completions", CompletionApi(config.model, generation).handle),
        web.get("/health", info.health),
        web.get("/v1/health", info.health),
        web.get("/v1/models", info.models),
        web.get("/v1/models/{id:.+}", info.model),
        web.get("/props", info.props),
        web.get("/metrics", info.metrics),
        web.get("/tokenizer_info", info.tokenizer_info),
        web.get("/v1/tokenizer_info", info.tokenizer_info),
        web.post("/tokenize", info.tokenize),
        web.post("/v1/tokenize", info.tokenize),
        web.post("/detokenize", info.detokenize),
        web.post("/v1/detokenize", info.detokenize),
        web.post("/apply-template", info.apply_template),
    ]
    app.router.add_routes(routes)
    return app
