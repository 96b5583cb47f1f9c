"""The engine process's end of its pipes, on standard input and output. Apart: it takes the streams for itself."""

import os
import sys
import threading
from collections.abc import Iterator

from slimoe.server.messages import Message, ToEngine, decode_to_engine, pack
from slimoe.server.process.child_life import leave
from slimoe.server.process.message_buffer import MessageBuffer

_READ_BYTES = 1 << 16


class Pipe:
    """The two ends of the pipes to the server; one thread reads, any thread may write."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self._read_fd = read_fd
        self._write_fd = write_fd
        self._lock = threading.Lock()

    @classmethod
    def over_stdio(cls) -> "Pipe":
        """Takes the process's standard streams for itself.

        Whatever prints to standard output from here on, C code included, reaches standard error instead.
        """
        read_fd, write_fd = os.dup(0), os.dup(1)
        with open(os.devnull, "rb") as nothing:
            os.dup2(nothing.fileno(), 0)
        sys.stdout.flush()
        os.dup2(2, 1)
        return cls(read_fd, write_fd)

    def messages(self) -> Iterator[ToEngine]:
        """Yields every message until the server closes the pipe."""
        buffer = MessageBuffer()
        while data := os.read(self._read_fd, _READ_BYTES):
            for body in buffer.feed(data):
                yield decode_to_engine(body)

    def send(self, message: Message) -> None:
        """Writes one message; ends the process if the server has closed the pipe."""
        data = memoryview(pack(message))
        try:
            with self._lock:
                while data:
                    data = data[os.write(self._write_fd, data) :]
        except OSError:
            leave()
