"""`GET /openapi.json` and `/docs`. Apart: it is made of all other endpoints."""

import functools
from collections.abc import Sequence
from typing import Any

from aiohttp import web

from slimoe.server.api.endpoint import Endpoint, json_answer
from slimoe.server.description.docs_page import HEADERS, docs_page
from slimoe.server.description.document import openapi_document


class DescriptionApi:
    """The endpoints' handlers."""

    def __init__(self, described: Sequence[Endpoint], version: str, *, asks_for_key: bool) -> None:
        self._described = [*described, *self.endpoints()]
        self._version = version
        self._asks_for_key = asks_for_key

    def endpoints(self) -> list[Endpoint]:
        """The endpoints."""
        return [
            Endpoint("GET", "/openapi.json", self.document, answer=dict[str, Any]),
            Endpoint("GET", "/docs", self.page, content_type="text/html"),
        ]

    @functools.cached_property
    def _document(self) -> dict[str, Any]:
        return openapi_document(self._described, self._version, asks_for_key=self._asks_for_key)

    async def document(self, request: web.Request) -> web.Response:
        """What every endpoint takes and answers, as OpenAPI 3.1."""
        return json_answer(self._document)

    async def page(self, request: web.Request) -> web.Response:
        """The same as a page to read."""
        return web.Response(body=docs_page(self._document).encode(), headers=HEADERS)
