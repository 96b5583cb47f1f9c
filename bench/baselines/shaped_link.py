"""A link between two programs of one machine with a bandwidth and a delay: a proxy before a server, in its own process.

Run as `python -m bench.baselines.shaped_link PORT HOST:PORT 1Gbit,0.2ms`, it serves until standard input ends; a line
read there is what the link is from then on, and is answered by one. Bytes of either direction share nothing with those
of the other, as on Ethernet and PCIe; all connections through one proxy share its two directions. Threads carry them,
since an event loop wakes on whole milliseconds only.
"""

import contextlib
import ctypes
import os
import queue
import re
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from slimoe.offload.errors import UsageError

ROOT = Path(__file__).parents[2]
_LINK = re.compile(r"(\d+(?:\.\d+)?)(G|M)bit,(\d+(?:\.\d+)?)(ms|us)")
_DEADLINE = 30.0
_PIECE = 128 << 10
_AHEAD_SECONDS = 1e-3
"""How far the proxy reads ahead of what the link has carried: what lies beyond waits with the sender."""
_OWN_SECONDS = 5e-5
"""What passing through the proxy takes by itself, on a machine with free cores: so much earlier it hands on."""
_PR_SET_TIMERSLACK = 29
_N_PINGS, _N_BYTES = 101, 64 << 20


@dataclass(frozen=True, slots=True)
class Link:
    """A link's bytes per second in each direction, and the seconds that each byte travels one way."""

    bytes_per_second: float
    seconds: float

    def __str__(self) -> str:
        """The link as `parse_link` reads it."""
        return f"{8 * self.bytes_per_second / 1e9:g}Gbit,{1e3 * self.seconds:g}ms"


def parse_link(text: str) -> Link:
    """The link that a person wrote as BANDWIDTH,DELAY, such as 10Gbit,0.2ms; raises UsageError for anything else."""
    match = _LINK.fullmatch(text)
    if match is None or not float(match[1]):
        raise UsageError(f"--link is {text!r}, which is no bandwidth and one-way delay. Write them as 10Gbit,0.2ms.")
    bits = float(match[1]) * {"G": 1e9, "M": 1e6}[match[2]]
    return Link(bits / 8, float(match[3]) * {"ms": 1e-3, "us": 1e-6}[match[4]])


class Direction:
    """One direction of a link: says when what is sent arrives. The clock is the caller's."""

    def __init__(self, link: Link) -> None:
        self.link, self._lock = link, threading.Lock()
        self.free_at = 0.0
        """When the link has carried all that it was given."""

    def arrival(self, now: float, n_bytes: int) -> float:
        """When the last of `n_bytes` arrives that are given to the link now, behind all that it was given before."""
        with self._lock:
            self.free_at = max(now, self.free_at) + n_bytes / self.link.bytes_per_second
            return self.free_at + self.link.seconds


@dataclass(frozen=True, slots=True)
class ShapedLink:
    """A proxy that runs: programs reach the server at its `endpoint`, HOST:PORT."""

    endpoint: str
    process: "subprocess.Popen[bytes]"

    def change(self, link: Link) -> None:
        """Lets the link be another one for all bytes from now on; those under way arrive as they would have."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{link}\n".encode())
        self.process.stdin.flush()
        self.process.stdout.readline()


@contextmanager
def shaped_link(endpoint: str, link: Link) -> Iterator[ShapedLink]:
    """Starts a proxy that leads over the link to the server at HOST:PORT, and ends it."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    command = [sys.executable, "-m", "bench.baselines.shaped_link", str(port), endpoint, str(link)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            if not process.stdout.readline():
                raise UsageError(f"The proxy before {endpoint} did not start: see the lines above.")
            yield ShapedLink(f"127.0.0.1:{port}", process)
        finally:
            process.kill()


def measured_link(link: Link, n_bytes: int = _N_BYTES) -> Link:
    """The link as bytes find it: half of the median round trip of a byte, and the speed of `n_bytes` one way."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        threading.Thread(target=_answer, args=(server, n_bytes), daemon=True).start()
        with shaped_link(f"127.0.0.1:{port}", link) as near, _connected(near.endpoint) as connection:
            trips = []
            for _ in range(_N_PINGS):
                begin = time.perf_counter()
                connection.sendall(b"x")
                _received(connection, 1)
                trips.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            connection.sendall(bytes(n_bytes))
            _received(connection, 1)
            trip = statistics.median(trips)
            return Link(n_bytes / (time.perf_counter() - begin - trip), trip / 2)


def _answer(server: socket.socket, n_bytes: int) -> None:
    """Answers each of the pings, and then all of the bytes at once."""
    connection, _ = server.accept()
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for n in [1] * _N_PINGS + [n_bytes]:
            _received(connection, n)
            connection.sendall(b"x")


def _received(connection: socket.socket, n_bytes: int) -> None:
    while n_bytes:
        piece = connection.recv(min(n_bytes, _PIECE))
        if not piece:
            raise ConnectionError("the connection ended early")
        n_bytes -= len(piece)


def _connected(endpoint: str) -> socket.socket:
    host, _, port = endpoint.rpartition(":")
    connection = socket.create_connection((host, int(port)), _DEADLINE)
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


# --- the proxy ---------------------------------------------------------------------------------------------

_Pieces = queue.SimpleQueue[tuple[float, bytes]]


def _carry(source: socket.socket, sink: socket.socket, direction: Direction) -> None:
    """Lets bytes through until either side ends; the other one is then ended too."""
    pieces: _Pieces = queue.SimpleQueue()
    threading.Thread(target=_deliver, args=(sink, pieces), daemon=True).start()
    with contextlib.suppress(OSError):
        while piece := source.recv(_PIECE):
            pieces.put((direction.arrival(time.perf_counter(), len(piece)), piece))
            _sleep_until(direction.free_at - _AHEAD_SECONDS)
    pieces.put((direction.arrival(time.perf_counter(), 0), b""))


def _deliver(sink: socket.socket, pieces: _Pieces) -> None:
    with contextlib.suppress(OSError):
        while True:
            due, piece = pieces.get()
            _sleep_until(due - _OWN_SECONDS)
            if not piece:
                break
            sink.sendall(piece)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_RDWR)


def _sleep_until(due: float) -> None:
    left = due - time.perf_counter()
    if left > 0:
        time.sleep(left)


def main() -> None:
    """Serves as the command line says; never returns."""
    port, endpoint, link = int(sys.argv[1]), sys.argv[2], parse_link(sys.argv[3])
    there, back = Direction(link), Direction(link)
    threading.Thread(target=_obey, args=(there, back), daemon=True).start()
    # Linux lets sleepers wake 50 us late, which is half of the shortest delay; threads take this over.
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1)
    with socket.create_server(("127.0.0.1", port)) as server:
        print("ready", flush=True)
        while True:
            near, _ = server.accept()
            near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                far = _connected(endpoint)
            except OSError:
                near.close()
                continue
            threading.Thread(target=_carry, args=(near, far, there), daemon=True).start()
            threading.Thread(target=_carry, args=(far, near, back), daemon=True).start()


def _obey(*directions: Direction) -> None:
    """Takes the links that standard input names until it ends, and the process with it."""
    for line in sys.stdin:
        link = parse_link(line.strip())
        for direction in directions:
            direction.link = link
        print("changed", flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
