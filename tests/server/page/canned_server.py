"""A server that gives out the page and, instead of a model's answers, what a test has put down."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from slimoe.server.page.page import Page

CARD = {"object": "model", "created": 0, "owned_by": "slimoe", "max_model_len": 4096}


@dataclass(slots=True)
class Canned:
    """What is answered next, and what was asked."""

    models: tuple[str, ...] = ("canned",)
    cards: dict[str, dict[str, Any]] = field(default_factory=dict)
    deltas: list[dict[str, Any]] = field(default_factory=list)
    finish: str | None = "stop"
    error: tuple[int, dict[str, Any]] | None = None
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """Streams the deltas, or refuses."""
        self.asked.append(await request.json())
        if self.error is not None:
            status, info = self.error
            return web.json_response({"error": info}, status=status)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for delta in self.deltas:
            await self._send(response, {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
        if self.finish is not None:
            await self._send(response, {"choices": [{"index": 0, "delta": {}, "finish_reason": self.finish}]})
            await response.write(b"data: [DONE]\n\n")
        return response

    async def _send(self, response: web.StreamResponse, document: dict[str, Any]) -> None:
        await response.write(f"data: {json.dumps({'model': self.models[0], **document})}\n\n".encode())
        await asyncio.sleep(0)

    async def listen(self, request: web.Request) -> web.StreamResponse:
        """Streams the events, and then nothing."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        sent = 0
        while True:
            for name, data in self.events[sent:]:
                await response.write(f"event: {name}\ndata: {json.dumps(data)}\n\n".encode())
            sent = len(self.events)
            await asyncio.sleep(0.02)

    async def list_models(self, request: web.Request) -> web.Response:
        """The models."""
        return web.json_response(
            {"object": "list", "data": [{"id": name, **CARD, **self.cards.get(name, {})} for name in self.models]}
        )

    async def health(self, request: web.Request) -> web.Response:
        """All is well."""
        return web.json_response({"status": "ok"})


@asynccontextmanager
async def canned_server(canned: Canned) -> AsyncIterator[Canned]:
    """The server at `canned.url`."""
    app = web.Application()
    app.add_routes(
        [
            *Page().routes(),
            web.post("/v1/chat/completions", canned.chat),
            web.get("/v1/events", canned.listen),
            web.get("/v1/models", canned.list_models),
            web.get("/health", canned.health),
        ]
    )
    runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0]
    canned.url = f"http://{host}:{port}"
    try:
        yield canned
    finally:
        await runner.cleanup()
