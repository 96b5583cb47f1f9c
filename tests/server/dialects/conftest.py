"""What the dialects' tests have in common: requests, events, and a reader that finds marks in an echoed prompt."""

import json
import re
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import pytest

from slimoe.server.api import choice
from slimoe.server.formats.answer_reader import CallDelta, Parts
from tests.models.live_server import LiveServer

_MARKS = re.compile(r"<(think|call \w+)>(.*?)</>", re.DOTALL)
Post = Callable[..., Awaitable[tuple[int, Any]]]
Events = Callable[..., Awaitable[list[tuple[str, Any]]]]


class MarkReader:
    """Reads `<think>...</>` as reasoning and `<call NAME>ARGUMENTS</>` as a call, a word at a time."""

    def __init__(self) -> None:
        self._text = ""
        self._n_calls = 0

    def feed(self, text: str) -> Parts:
        self._text += text
        parts = Parts()
        while match := _MARKS.search(self._text):
            before, kind, inner = self._text[: match.start()], match[1], match[2]
            self._text = self._text[match.end() :]
            if kind == "think":
                parts = Parts(parts.text + before, parts.reasoning + inner, parts.calls)
                continue
            number, self._n_calls = self._n_calls, self._n_calls + 1
            head = CallDelta(number, f"call_{number}", kind.removeprefix("call "))
            pieces = [CallDelta(number, arguments=piece) for piece in (inner[:3], inner[3:]) if piece]
            parts = Parts(parts.text + before, parts.reasoning, (*parts.calls, head, *pieces))
        keep = self._text.find("<")
        said = self._text if keep < 0 else self._text[:keep]
        self._text = self._text[len(said) :]
        return Parts(parts.text + said, parts.reasoning, parts.calls)

    def finish(self) -> Parts:
        return Parts(self._text)


@pytest.fixture
def marks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are read by `MarkReader`."""
    monkeypatch.setattr(choice, "reader_of", lambda reading: MarkReader())


@pytest.fixture
def post(server: LiveServer) -> Post:
    """Posts a body to a path and returns the status and document."""

    async def send(path: str, body: object, **headers: str) -> tuple[int, Any]:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        async with (
            aiohttp.ClientSession() as session,
            session.post(server.url + path, data=json.dumps(body), headers=named) as response,
        ):
            return response.status, await response.json()

    return send


@pytest.fixture
def events(server: LiveServer) -> Events:
    """Posts a body with `stream` and returns the events by name."""

    async def send(path: str, body: dict[str, Any]) -> list[tuple[str, Any]]:
        data = json.dumps({**body, "stream": True})
        async with aiohttp.ClientSession() as session, session.post(server.url + path, data=data) as response:
            text = (await response.read()).decode()
            assert response.status == 200, text
            assert response.content_type == "text/event-stream"
        blocks = [block.split("\n") for block in text.split("\n\n") if block and not block.startswith(":")]
        assert all(len(block) == 2 for block in blocks)
        named = [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in blocks]
        assert all(name == document["type"] for name, document in named)
        return named

    return send
