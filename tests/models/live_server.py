"""Servers for tests: the application over a real socket, and `slimoe serve` as a child process."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

from aiohttp import web
from openai import AsyncOpenAI

from slimoe.offload.plan.engine_config import EngineConfig
from slimoe.offload.resources.memory import private_bytes
from slimoe.server.api.backends import Backend, Backends
from slimoe.server.api.request_body import Defaults
from slimoe.server.api.served_model import ServedModel
from slimoe.server.app import AppConfig, init_app
from slimoe.server.http.access import AccessRules
from slimoe.server.http.connection import USUAL_LIMITS, ApiRunner, ConnectionLimits
from slimoe.server.process.pool import Pool
from slimoe.server.process.supervisor import Supervisor
from slimoe.server.process.watchdog import Patience
from slimoe.server.watch.prompt_log import PromptLog

SCRIPTED = (sys.executable, str(Path(__file__).with_name("scripted_engine.py")))
DEADLINE = 30.0


@dataclass(frozen=True, slots=True)
class LiveServer:
    """An application that answers at `url`, and its models' engines: `supervisor` is the first one's."""

    url: str
    backends: Backends

    @property
    def supervisor(self) -> Supervisor:
        return self.backends.default.supervisor

    @property
    def n_underway(self) -> int:
        """Requests that the first model's engine has begun."""
        return sum(handle is not None for handle in self.supervisor.slots.handles)

    def client(self) -> AsyncOpenAI:
        """OpenAI's own client, which never repeats a failed request and does not wait for ever."""
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0, timeout=DEADLINE)


@dataclass(frozen=True, slots=True)
class LiveOptions:
    """What a test wants otherwise."""

    n_queue: int = 64
    rules: AccessRules = field(default_factory=AccessRules)
    ping_seconds: float = 15.0
    waits: bool = True
    has_page: bool = True
    patience: Patience = field(default_factory=Patience)
    limits: ConnectionLimits = USUAL_LIMITS
    held_bytes: Callable[[], int] = private_bytes
    idle_seconds: float | None = None
    n_most: int = 1
    needs: Mapping[str, int] = field(default_factory=dict)
    total_bytes: int | None = None
    prompt_log: PromptLog | None = None
    engine: EngineConfig = field(default_factory=lambda: EngineConfig(Path()))
    chat_template: str | None = None
    defaults: Defaults = field(default_factory=Defaults)
    shows_slots: bool = True
    slot_directory: Path | None = None


@asynccontextmanager
async def live_server(
    path: Path, options: LiveOptions = LiveOptions(), others: Mapping[str, Path] = MappingProxyType({})
) -> AsyncIterator[LiveServer]:
    """The application over the scripted engine; with `others` it serves several models, and `tiny` is loaded first."""
    served = []
    for name, place in {"tiny": path, **others}.items():
        engine = replace(options.engine, model=place)
        held, template = options.held_bytes, options.chat_template
        supervisor = Supervisor(engine, options.n_queue, SCRIPTED, options.patience, held, template)
        served.append(Backend(ServedModel(name, place, "1.2.3"), supervisor))
    needs = {one.supervisor: options.needs.get(one.model.id, 0) for one in served}
    pool = Pool(needs, options.n_most, options.idle_seconds, options.total_bytes)
    backends = Backends(served, pool, are_named=bool(others))
    config = AppConfig(
        options.rules,
        options.ping_seconds,
        options.has_page,
        options.defaults,
        shows_slots=options.shows_slots,
        prompt_log=options.prompt_log,
        slot_directory=options.slot_directory,
    )
    runner = ApiRunner(init_app(config, backends), 1.0, options.limits)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    first = backends.default.supervisor
    pool.start(first)
    host, port = runner.addresses[0]
    try:
        if options.waits:
            await asyncio.wait_for(first.wait_ready(), DEADLINE)
        yield LiveServer(f"http://{host}:{port}", backends)
    finally:
        await pool.stop()
        await runner.cleanup()


async def until(is_true: Callable[[], bool]) -> None:
    """Waits for a condition that is asked for again and again; fails when it never comes."""
    async with asyncio.timeout(DEADLINE):
        while not is_true():
            await asyncio.sleep(0.005)


def slimoe(*arguments: str | Path, stdin: int | None = None) -> "subprocess.Popen[str]":
    """The command as a child, from a working directory that is not the project's."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "slimoe.server.cli", *map(str, arguments)],
        stdin=subprocess.DEVNULL if stdin is None else stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=os.path.expanduser("~"),
    )


@contextmanager
def serving(*arguments: str | Path, stdin: int | None = None) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """`slimoe serve` on a free port, and its address once it has said that it is ready."""
    process = slimoe("serve", "--port", "0", "--threads", "1", *arguments, stdin=stdin)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        yield process, json.loads(line)["url"]
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
