"""The HTTP application: every route in one place, and errors as JSON."""

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from aiohttp import web

from server.access import RULES, AccessRules, access_middleware, add_cors_headers
from server.api_error import INVALID, SERVER, ApiError, ErrorInfo, not_found
from server.chat_api import ChatApi
from server.completion_api import CompletionApi
from server.generation_api import PING_SECONDS, GenerationApi
from server.info_api import InfoApi
from server.metrics import Metrics
from server.served_model import ServedModel
from server.supervisor import Supervisor

MAX_BODY = 64 * 1024 * 1024
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AppConfig:
    """What an application needs besides its engine."""

    model: ServedModel
    rules: AccessRules = field(default_factory=AccessRules)
    ping_seconds: float = PING_SECONDS


def init_app(config: AppConfig, supervisor: Supervisor) -> web.Application:
    """The application over a started supervisor, which it neither starts nor stops."""
    app = web.Application(middlewares=[error_middleware, access_middleware], client_max_size=MAX_BODY)
    app[RULES] = config.rules
    app.on_response_prepare.append(add_cors_headers)
    metrics = Metrics(supervisor)
    info = InfoApi(config.model, supervisor, metrics)
    generation = GenerationApi(supervisor, metrics, config.ping_seconds)
    app.router.add_routes(_info_routes(info))
    app.router.add_routes(
        [
            web.post("/v1/chat/completions", ChatApi(config.model, generation).handle),
            web.post("/v1/completions", CompletionApi(config.model, generation).handle),
        ]
    )
    return app


def _info_routes(info: InfoApi) -> list[web.RouteDef]:
    return [
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


@web.middleware
async def error_middleware(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Answers every error with the JSON that clients parse; a bug of ours also leaves its traceback in the log."""
    try:
        return await handler(request)
    except ApiError as error:
        return error.response()
    except web.HTTPException as error:
        return _from_http(request, error).response()
    except ConnectionError:
        raise
    except Exception:
        _log.exception("%s %s failed.", request.method, request.path)
        return ApiError(500, ErrorInfo("The server failed. Its log says more.", SERVER, None, "internal")).response()


def _from_http(request: web.Request, error: web.HTTPException) -> ApiError:
    if isinstance(error, web.HTTPNotFound):
        return not_found(f"There is no {request.path}. See GET /v1/models and POST /v1/chat/completions.")
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        info = ErrorInfo(f"{request.path} takes {allowed}, not {request.method}.", "not_found_error")
        return ApiError(405, info, headers={"Allow": allowed})
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        message = f"The body is larger than {MAX_BODY // 2**20} MiB."
        return ApiError(413, ErrorInfo(message, "request_too_large"))
    return ApiError(error.status, ErrorInfo(error.reason, INVALID))
