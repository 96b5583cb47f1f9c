"""One run of the engine's process, seen from the server: its pipes and its end."""

import asyncio
import os
import signal
from collections.abc import Callable, Sequence

import msgspec

from slimoe.server.child_python import module_command
from slimoe.server.log_format import JOURNAL
from slimoe.server.messages import FromEngine, Message, decode_from_engine, pack
from slimoe.server.process.message_buffer import MessageBuffer

LONGEST_LINE = 1 << 16
COMMAND = module_command("slimoe.server.process.engine_start")


class EngineChild(asyncio.SubprocessProtocol):
    """A running engine process; calls `on_message` for each message and then `on_exit` with the exit status."""

    def __init__(self, on_message: Callable[[FromEngine], None], on_exit: Callable[[int], None]) -> None:
        self._on_message = on_message
        self._on_exit = on_exit
        self._buffer = MessageBuffer()
        self._rest = b""
        self._transport: asyncio.SubprocessTransport | None = None

    async def start(self, command: Sequence[str] = COMMAND) -> None:
        """Starts the process, which shares this process's standard error unless that is to hold JSON only.

        It searches for modules where this program lies and not in the working directory, and gets a session of
        its own, so that Ctrl-C in the terminal reaches this side only.
        """
        await asyncio.get_running_loop().subprocess_exec(
            lambda: self,
            *command,
            str(os.getpid()),
            stderr=asyncio.subprocess.PIPE if JOURNAL.is_json else None,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        """The process's id."""
        assert self._transport is not None
        return self._transport.get_pid()

    def send(self, message: Message) -> None:
        """Sends one message, which is lost if the process has ended; `on_exit` is called then."""
        assert self._transport is not None
        pipe = self._transport.get_pipe_transport(0)
        assert isinstance(pipe, asyncio.WriteTransport)
        if not pipe.is_closing():
            pipe.write(pack(message))

    def kill(self) -> None:
        """Ends the process at once; its memory goes back to the machine."""
        if self._transport is not None and self._transport.get_returncode() is None:
            self._transport.kill()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio when the process runs."""
        assert isinstance(transport, asyncio.SubprocessTransport)
        self._transport = transport

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        """Called by asyncio for every piece of output."""
        if fd == 2:
            self._log(data)
            return
        try:
            for body in self._buffer.feed(data):
                self._on_message(decode_from_engine(body))
        except msgspec.MsgspecError as error:
            problem = f"The engine's process sent a message that cannot be read ({error}). Ending it."
            JOURNAL.tell(problem, "error", shown=problem)
            self.kill()

    def _log(self, data: bytes) -> None:
        """Passes on what the process and its libraries write, line by line."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > LONGEST_LINE:
            lines, self._rest = [*lines, self._rest], b""
        for line in lines:
            text = line.decode("utf-8", "replace")
            JOURNAL.tell_later(text, "info", text, {"source": "engine"})

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio when the process has ended and its last output was read."""
        assert self._transport is not None
        if self._rest:  # a last line that nothing has ended
            self._log(b"\n")
        returncode = self._transport.get_returncode()
        self._on_exit(0 if returncode is None else returncode)


def how_it_ended(returncode: int) -> str:
    """What to tell of a process that ended with this status, or by a signal if it is negative."""
    if returncode >= 0:
        return f"The engine's process ended with status {returncode}. The log says more; try again."
    name = signal.Signals(-returncode).name
    cause = " (the system may have run out of memory)" if name == "SIGKILL" else ""
    return f"The engine's process was ended by {name}{cause}. The log may say more; try again."
