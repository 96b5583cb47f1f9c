"""An evaluation's life: tasks first, then a server of its own for them, and lm-eval in a process beside it."""

import asyncio
import contextlib
import os
import secrets
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import IO

import msgspec
from aiohttp import web

from slimoe.offload.errors import SlimoeError, UsageError
from slimoe.offload.plan.engine_config import EngineConfig
from slimoe.server.api.backends import Backend, Backends
from slimoe.server.api.served_model import ServedModel
from slimoe.server.app import AppConfig, init_app
from slimoe.server.child_python import module_command
from slimoe.server.http.access import AccessRules
from slimoe.server.http.connection import ApiRunner
from slimoe.server.jobs.harness_messages import (
    KEY_VARIABLE,
    Answered,
    Evaluated,
    HarnessEvent,
    HarnessFailed,
    HarnessRequest,
    HarnessServer,
    Loaded,
    Planned,
)
from slimoe.server.jobs.memory_peaks import MemoryPeaks
from slimoe.server.messages import ModelInfo
from slimoe.server.process.supervisor import Supervisor

HARNESS = module_command("slimoe.server.jobs.harness_child")
SAMPLE_SECONDS = 0.2
_LONGEST_LINE = 1 << 30
_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_EVALUATE_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TQDM_DISABLE": "1",
}
"""Nothing is downloaded, and progress is told by events."""


@dataclass(slots=True)
class Evaluation:
    """What came of it: lm-eval's result, facts of the model, and what serving it took.

    `answer_seconds` are from the first request that counts to the last answer.
    """

    info: ModelInfo | None = None
    evaluated: Evaluated | None = None
    counters: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    load_seconds: float = 0.0
    answer_seconds: float = 0.0


class Harness:
    """lm-eval's process, seen from this one."""

    def __init__(self, process: asyncio.subprocess.Process, errors: IO[bytes]) -> None:
        self.process = process
        self._errors = errors

    def send(self, message: msgspec.Struct) -> None:
        """Sends one message."""
        assert self.process.stdin is not None
        self.process.stdin.write(msgspec.json.encode(message) + b"\n")

    async def events(self) -> AsyncIterator[HarnessEvent]:
        """What the process tells, until it ends; raises SlimoeError when it fails."""
        assert self.process.stdout is not None
        while line := await self.process.stdout.readline():
            event = msgspec.json.decode(line, type=HarnessEvent)
            if isinstance(event, HarnessFailed):
                raise (UsageError if event.is_usage else SlimoeError)(event.message)
            yield event
        status = await self.process.wait()
        if status:
            self._errors.seek(0)
            last = self._errors.read().decode("utf-8", "replace").strip().rpartition("\n")[2]
            raise SlimoeError(f"lm-eval's process ended with status {status}: {last or 'it said nothing'}")


async def evaluate(
    model: ServedModel,
    engine: EngineConfig,
    request: HarnessRequest,
    on_event: Callable[[HarnessEvent], None],
    harness_command: Sequence[str] = HARNESS,
) -> Evaluation:
    """Evaluates a model; `on_event` gets what lm-eval's process tells as it comes.

    Raises UsageError for tasks that cannot be used, before the model is opened, EngineFailure when that cannot be, and
    SlimoeError when lm-eval fails.
    """
    # Only lm-eval gets answers, so that nobody else's requests are measured.
    key = secrets.token_urlsafe(32)
    evaluation = Evaluation()
    async with _harness(harness_command, request, key) as harness:
        async for event in harness.events():
            on_event(event)
            if isinstance(event, Loaded):
                break
        supervisor = Supervisor(engine)
        config = AppConfig(AccessRules(key), has_page=False, logs_requests=False)
        backends = Backends([Backend(model, supervisor)])
        runner = ApiRunner(init_app(config, backends), 0.0)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            begin = time.monotonic()
            backends.pool.start(supervisor)
            evaluation.info = await supervisor.wait_ready()
            evaluation.load_seconds = time.monotonic() - begin
            url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            harness.send(HarnessServer(url, model.id, evaluation.info.n_ctx))
            await _watch(harness, supervisor, evaluation, on_event)
        finally:
            await backends.pool.stop()
            await runner.cleanup()
    return evaluation


async def _watch(
    harness: Harness, supervisor: Supervisor, evaluation: Evaluation, on_event: Callable[[HarnessEvent], None]
) -> None:
    """Passes events on until the end, and looks at memory meanwhile."""
    assert evaluation.info is not None
    names = {os.getpid(): "server", supervisor.pid or 0: "engine", harness.process.pid: "harness"}
    peaks = MemoryPeaks(names)
    before, begin = evaluation.info.counters, time.monotonic()

    async def sample() -> None:
        while True:
            peaks.sample()
            await asyncio.sleep(SAMPLE_SECONDS)

    sampling = asyncio.create_task(sample())
    try:
        async for event in harness.events():
            if isinstance(event, Planned):
                begin = time.monotonic()
            elif isinstance(event, Answered):
                evaluation.answer_seconds = time.monotonic() - begin
            elif isinstance(event, Evaluated):
                evaluation.evaluated = event
            on_event(event)
    finally:
        sampling.cancel()
    peaks.sample()
    evaluation.peaks = peaks.as_json()
    if supervisor.info is not None:
        evaluation.info = supervisor.info
        after = supervisor.info.counters
        evaluation.counters = {name: total - before.get(name, 0.0) for name, total in after.items()}


@contextlib.asynccontextmanager
async def _harness(command: Sequence[str], request: HarnessRequest, key: str) -> AsyncIterator[Harness]:
    """Starts lm-eval's process and ends it with the block."""
    with tempfile.TemporaryFile() as errors:
        process = await asyncio.create_subprocess_exec(
            *command,
            str(os.getpid()),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
            env={**os.environ, **_OFFLINE, KEY_VARIABLE: key},
            limit=_LONGEST_LINE,
            start_new_session=True,
        )
        harness = Harness(process, errors)
        try:
            harness.send(request)
            yield harness
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
