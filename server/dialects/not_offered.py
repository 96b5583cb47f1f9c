"""Endpoints that clients look for and this server does not offer. Apart: one table of what is missing, and why."""

from aiohttp import web

from slimoe.server.api.endpoint import Endpoint, Handler
from slimoe.server.api_error import UNSUPPORTED, ApiError, ErrorInfo

_EMBEDDINGS = "This server makes no embeddings: models with a mixture of experts write text. Use an embedding model."
_RERANK = "This server does not rank documents. Use a model that was made for it."
_AUDIO = "This server reads and writes text only."
_LORA = "This server loads no adapters."
REASONS = {
    ("POST", "/v1/embeddings"): (_EMBEDDINGS, ("/embeddings", "/embedding")),
    ("POST", "/v1/rerank"): (_RERANK, ("/rerank", "/reranking", "/v1/reranking")),
    ("POST", "/v1/audio/transcriptions"): (_AUDIO, ("/audio/transcriptions",)),
    ("POST", "/v1/audio/speech"): (_AUDIO, ()),
    ("POST", "/v1/images/generations"): (_AUDIO, ()),
    ("GET", "/lora-adapters"): (_LORA, ()),
    ("POST", "/lora-adapters"): (_LORA, ()),
}
"""Why there is no such endpoint, and its further paths."""


class NotOfferedApi:
    """The endpoints' handlers."""

    def endpoints(self) -> list[Endpoint]:
        """The endpoints."""
        return [
            Endpoint(method, path, refusing(reason), aliases=aliases, statuses=(501,))
            for (method, path), (reason, aliases) in REASONS.items()
        ]


def refusing(reason: str) -> Handler:
    """A handler that refuses with the reason."""

    async def refuse(request: web.Request) -> web.StreamResponse:
        """Not offered: answers status 501 and says why."""
        raise ApiError(501, ErrorInfo(reason, UNSUPPORTED, None, "not_offered"))

    return refuse
