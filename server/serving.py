"""A server's life: binds, opens the model, says that it is ready, and ends cleanly on a signal."""

import asyncio
import contextlib
import ipaddress
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass

from aiohttp import web

from slimoe.offload.errors import SlimoeError
from slimoe.server.api.backends import Backends
from slimoe.server.app import AppConfig, init_app
from slimoe.server.http.accepting import AcceptFailures
from slimoe.server.http.connection import USUAL_LIMITS, ApiRunner, ConnectionLimits
from slimoe.server.log_format import JOURNAL
from slimoe.server.messages import ModelInfo
from slimoe.server.process.supervisor import Supervisor

GRACE_SECONDS = 3.0
FLUSH_SECONDS = 1.0
SEND_BYTES = 128 << 10
BACKLOG, RECEIVED_BYTES = 128, 64 << 10


class PortInUseError(SlimoeError):
    """Another program listens where the server should."""

    exit_code = 69


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen; port 0 takes a free one."""

    host: str
    port: int


async def serve(
    config: AppConfig,
    backends: Backends,
    address: Address,
    on_ready: Callable[[Address, ModelInfo | None], None],
    *,
    starts_asleep: bool = False,
    exits_with_parent: bool = False,
    grace: float = GRACE_SECONDS,
    limits: ConnectionLimits = USUAL_LIMITS,
) -> None:
    """Serves until SIGINT or SIGTERM, or with `exits_with_parent` until standard input ends.

    The default model is loaded first, unless the server `starts_asleep`. Running answers get `grace` seconds to end.
    Raises PortInUseError, or EngineFailure when the model cannot be opened, before `on_ready` is called.
    """
    stop = asyncio.Event()
    _stop_on_signals(stop)
    if exits_with_parent:
        _stop_at_end_of_input(stop)
    asyncio.get_running_loop().set_exception_handler(AcceptFailures())
    runner = ApiRunner(init_app(config, backends), FLUSH_SECONDS, limits)
    await runner.setup()
    try:
        bound = await _listen(runner, address, min(BACKLOG, limits.n_most))
        first = None if starts_asleep else backends.default.supervisor
        backends.pool.start(first)
        ready = asyncio.create_task(_ready(first))
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait((ready, stopped), return_when=asyncio.FIRST_COMPLETED)
        if not stop.is_set():
            on_ready(bound, ready.result())
            await stopped
        ready.cancel()
    finally:
        await backends.pool.stop(grace)
        await runner.cleanup()
        JOURNAL.flush()


async def _ready(supervisor: Supervisor | None) -> ModelInfo | None:
    return None if supervisor is None else await supervisor.wait_ready()


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens on `host`; a name that is unknown reaches nobody."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    try:
        found = socket.getaddrinfo(host or None, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        return True
    return all(ipaddress.ip_address(place[0]).is_loopback for *_, place in found)


async def _listen(runner: web.AppRunner, address: Address, backlog: int) -> Address:
    where = f"{address.host}:{address.port}"
    try:
        # Bound here and not by aiohttp, so that one port is chosen for a name with several addresses.
        family, *_, place = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise PortInUseError(f"{where} is no address to listen on ({error.strerror}).") from None
    try:
        if sys.platform != "win32":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # What has arrived and is not yet read lies in the system's memory: little of it for each connection.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVED_BYTES)
        # What the system keeps of an answer that nobody reads is bounded too: accepted connections inherit it.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
        listener.bind(place)
        listener.listen(backlog)
    except OSError as error:
        listener.close()
        problem = f"Cannot listen on {where}: {error.strerror}. Choose another --port, or 0 for any free one."
        raise PortInUseError(problem) from None
    await web.SockSite(runner, listener, backlog=backlog).start()
    return Address(address.host, listener.getsockname()[1])


def _stop_on_signals(stop: asyncio.Event) -> None:
    """The first signal asks, the second does not."""
    loop = asyncio.get_running_loop()

    def handle(number: int) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError):
            loop.add_signal_handler(number, handle, number)


def _stop_at_end_of_input(stop: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()

    def wait() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(stop.set)

    threading.Thread(target=wait, name="parent", daemon=True).start()
