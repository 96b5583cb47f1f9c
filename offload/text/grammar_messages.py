"""What a grammar's process and the engine say to each other over their sockets.

The process loads nothing that only the engine needs.
"""

import socket
from typing import TypeVar

import msgspec

HEADER_BYTES = 4
T = TypeVar("T")


class Setup(msgspec.Struct):
    """The vocabulary's control tokens, and what a grammar may take of the machine."""

    n_vocab: int
    control: list[int]
    names: list[bytes]
    ends: list[int]
    memory_bytes: int
    stack_bytes: int
    cpu_seconds: float


class Verdict(msgspec.Struct):
    """Why the constraint cannot be held, and which field is to blame, or the memory that it takes."""

    problem: str | None
    n_bytes: int = 0
    param: str | None = None


def send(to: socket.socket, message: object) -> None:
    """Sends a message behind its length."""
    body = msgspec.msgpack.encode(message)
    to.sendall(len(body).to_bytes(HEADER_BYTES, "little") + body)


def receive(of: socket.socket, kind: type[T]) -> T:
    """The next message; raises EOFError when there is none."""
    n_bytes = int.from_bytes(_receive_exactly(of, HEADER_BYTES), "little")
    return msgspec.msgpack.decode(_receive_exactly(of, n_bytes), type=kind)


def _receive_exactly(of: socket.socket, n_bytes: int) -> bytearray:
    """So many bytes; raises EOFError when the other side has gone."""
    data = bytearray(n_bytes)
    view, n_done = memoryview(data), 0
    while n_done < n_bytes:
        n = of.recv_into(view[n_done:])
        if n == 0:
            raise EOFError
        n_done += n
    return data
