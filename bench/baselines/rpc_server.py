"""A device on loopback: ggml's RPC server over the CPU, in a process of its own. The GPU of machines without one.

Run as `python -m bench.baselines.rpc_server PORT THREADS`, it serves until standard input ends.
"""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from slimoe.offload.errors import DeviceError
from slimoe.offload.ggml import ggml_rpc
from slimoe.offload.ggml.rpc_endpoint import check_answers, parse_endpoint

ROOT = Path(__file__).parents[2]
DEADLINE = 30.0


@dataclass(frozen=True, slots=True)
class RpcServer:
    """A server that answers at `endpoint`, HOST:PORT; its device's name depends on how many were used before."""

    endpoint: str
    process: "subprocess.Popen[bytes]"

    def kill(self) -> None:
        """Ends the server as a crash would."""
        self.process.kill()
        self.process.wait()

    @property
    def port(self) -> int:
        """The port at which it listens."""
        return int(self.endpoint.rpartition(":")[2])


@contextmanager
def rpc_server(port: int = 0, n_threads: int = 1) -> Iterator[RpcServer]:
    """Starts a server on a port, or on a free one, waits until it answers, and ends it."""
    if not port:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
    command = [sys.executable, "-m", "bench.baselines.rpc_server", str(port), str(n_threads)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        try:
            server = RpcServer(f"127.0.0.1:{port}", process)
            _wait_until_it_answers(server)
            yield server
        finally:
            server.kill()


def _wait_until_it_answers(server: RpcServer) -> None:
    deadline = time.monotonic() + DEADLINE
    while True:
        try:
            return check_answers(parse_endpoint(server.endpoint), ggml_rpc.PROTOCOL_VERSION)
        except DeviceError:
            if server.process.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def main() -> None:
    """Serves on the port and with the threads that the command line names; never returns."""
    threading.Thread(target=_end_with_input, daemon=True).start()
    ggml_rpc.serve(*map(int, sys.argv[1:]))


def _end_with_input() -> None:
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
