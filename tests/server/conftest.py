"""A tiny model, the application that serves it over the scripted engine, and OpenAI's client of that."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from openai import AsyncOpenAI

from tests.models.live_server import LiveServer, live_server


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Path:
    return tiny_model


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(model: Path) -> AsyncIterator[LiveServer]:
    async with live_server(model) as server:
        yield server


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(server: LiveServer) -> AsyncIterator[AsyncOpenAI]:
    async with server.client() as client:
        yield client
