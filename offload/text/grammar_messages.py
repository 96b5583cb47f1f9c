"""What a grammar's process and the engine say to each other over their sockets.

The process loads nothing that only the engine needs.
"""

import socket
from typing import TypeVar

import msgspec

TOKEN_BYTES = HEADER_BYTES = 4
GOES_ON, COMPLETE, FAILED = b"g", b"c", b"f"
"""Behind each token: whether the answer goes on, is complete, or cannot be held, for a reason that stands behind it.

Where it goes on a second such mark follows, which says whether the mask comes or a reason why not.
"""
T = TypeVar("T")


class Setup(msgspec.Struct):
    """The vocabulary, and what a grammar may take of the machine."""

    pieces: list[bytes]
    control: list[int]
    ends: list[int]
    memory_bytes: int
    compile_seconds: float
    step_seconds: float

    @property
    def n_mask_bytes(self) -> int:
        """Bytes of one bit for each token."""
        return -(-len(self.pieces) // 8)


class GrammarRequest(msgspec.Struct):
    """The first message about an answer: a constraint, and whether the answer's first space is left out."""

    kind: str
    text: str
    strips_space: bool
    before: str = ""
    instead: str = ""


def send(to: socket.socket, message: object) -> None:
    """Sends a message behind its length."""
    body = msgspec.msgpack.encode(message)
    to.sendall(len(body).to_bytes(HEADER_BYTES, "little") + body)


def receive(of: socket.socket, kind: type[T]) -> T:
    """The next message; raises EOFError when there is none."""
    n_bytes = int.from_bytes(receive_exactly(of, HEADER_BYTES), "little")
    return msgspec.msgpack.decode(receive_exactly(of, n_bytes), type=kind)


def receive_exactly(of: socket.socket, n_bytes: int) -> bytearray:
    """So many bytes; raises EOFError when the other side has gone."""
    data = bytearray(n_bytes)
    view, n_done = memoryview(data), 0
    while n_done < n_bytes:
        n = of.recv_into(view[n_done:])
        if n == 0:
            raise EOFError
        n_done += n
    return data
