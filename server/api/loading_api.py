"""`POST /models/load` and `/models/unload`, as llama-server's router has them. Apart: nothing is generated."""

import asyncio
import contextlib

import msgspec
from aiohttp import web

from slimoe.server.api.backends import Backends
from slimoe.server.api.endpoint import Endpoint, json_answer
from slimoe.server.api.request_body import read_body
from slimoe.server.api_error import INVALID, ApiError, ErrorInfo
from slimoe.server.process.request_handle import EngineFailure
from slimoe.server.process.supervisor import Supervisor


class ModelName(msgspec.Struct):
    """The body: which model."""

    model: str


class Success(msgspec.Struct, frozen=True):
    """The answer."""

    success: bool = True


class LoadingApi:
    """The endpoints' handlers."""

    def __init__(self, backends: Backends) -> None:
        self._backends = backends
        self._loading: set[asyncio.Task[None]] = set()

    def endpoints(self) -> list[Endpoint]:
        """The endpoints."""
        return [
            Endpoint("POST", "/models/load", self.load, ModelName, Success, statuses=(404,)),
            Endpoint("POST", "/models/unload", self.unload, ModelName, Success, statuses=(404, 409)),
        ]

    async def load(self, request: web.Request) -> web.Response:
        """Begins to load a model; `/v1/models` and `/v1/events` tell when it is loaded. Raises ApiError."""
        backend = self._backends.named((await read_body(request, ModelName)).model)
        task = asyncio.create_task(_load(backend.supervisor))
        self._loading.add(task)
        task.add_done_callback(self._loading.discard)
        return json_answer(Success())

    async def unload(self, request: web.Request) -> web.Response:
        """Gives the memory of a model back; raises ApiError while somebody uses it."""
        backend = self._backends.named((await read_body(request, ModelName)).model)
        if not await self._backends.pool.unload(backend.supervisor):
            message = f"The model {backend.model.id!r} is being used. Try again when its answers are complete."
            raise ApiError(409, ErrorInfo(message, INVALID, "model", "model_busy"))
        return json_answer(Success())


async def _load(supervisor: Supervisor) -> None:
    # Whoever asks for the model, or looks at its state, is told of a failure.
    with contextlib.suppress(EngineFailure):
        await supervisor.wait_ready()
