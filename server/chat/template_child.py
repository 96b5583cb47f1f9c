"""A chat template in a process of its own, from the side of those who have conversations rendered."""

import contextlib
import os
import select
import subprocess
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from signal import SIGPROF, Signals
from types import MappingProxyType
from typing import Any

from slimoe.offload.resources.process_limits import kept_environment
from slimoe.server.chat.template_error import ChatTemplateError, TemplateLimitError, UnusableTemplateError
from slimoe.server.chat.template_messages import HEADER_BYTES, NO_TOOLS, Rendered, TemplateCaps, packed, unpacked
from slimoe.server.child_python import module_command

COMMAND = module_command("slimoe.server.chat.template_process")
START_SECONDS = 30.0
MAX_OUTPUT = 16 << 20
_READ_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class TemplateLimits:
    """What one conversation may take: its process's time, a wait by the clock, memory, and characters of output.

    A conversation of one megabyte takes some tens of milliseconds and ten megabytes; compiling 20 kB of nothing but
    tags half a second and forty. The clock is for a machine that is busy, or a process that was stopped.
    """

    cpu_seconds: float = 0.5
    compile_seconds: float = 3.0
    wall_seconds: float = 1.0
    memory_bytes: int = 48 << 20
    max_output: int = MAX_OUTPUT


class TemplateChild:
    """Renders conversations in a process that is started when it is needed, and killed when it takes too much.

    Threads wait for each other. A process that is gone is replaced for the next conversation.
    """

    def __init__(
        self, source: str, limits: TemplateLimits = TemplateLimits(), values: Mapping[str, Any] = MappingProxyType({})
    ) -> None:
        """The template may use the names in `values`, such as `bos_token`, in every conversation."""
        self._source, self._limits, self._values = source, limits, dict(values)
        self._lock = threading.Lock()
        self._process: _Process | None = None
        self._unusable: UnusableTemplateError | None = None
        self._caps: TemplateCaps | None = None

    @property
    def pid(self) -> int | None:
        """The process's id while there is one."""
        return None if self._process is None else self._process.pid

    def check(self) -> None:
        """Compiles and tries the template; raises UnusableTemplateError when it cannot be used at all."""
        self.caps()

    def caps(self) -> TemplateCaps:
        """What the template does with tools, which is tried once; none for one that is stopped over it.

        Raises ChatTemplateError.
        """
        with self._lock:
            if self._caps is None:
                try:
                    self._caps = TemplateCaps(**self._asked({"probed": self._values}))
                except TemplateLimitError:
                    self._caps = NO_TOOLS
            return self._caps

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        values: Mapping[str, Any],
        generate: bool,
        tools: Sequence[Mapping[str, Any]] = (),
        caps: TemplateCaps = NO_TOOLS,
    ) -> Rendered:
        """The text of a conversation in the first form that the template takes, knowing its `caps`.

        Raises ChatTemplateError when it refuses them all, or cannot be used, and TemplateLimitError.
        """
        request = {
            "messages": list(messages),
            "values": {**values, **self._values},
            "generate": generate,
            "tools": list(tools),
            "caps": asdict(caps),
        }
        with self._lock:
            answer = self._asked(request)
        if "refused" in answer:
            raise ChatTemplateError(answer["refused"])
        return Rendered(answer["text"], answer["has_plain_tools"])

    def close(self) -> None:
        """Ends the process; the next conversation starts another."""
        if self._process is not None:
            self._process.end()
            self._process = None

    def _started(self) -> "_Process":
        if self._unusable is not None:
            raise self._unusable
        if self._process is not None and not self._process.is_alive:
            self.close()
        if self._process is not None:
            return self._process
        process = _Process()
        setup = packed({"source": self._source, **asdict(self._limits)})
        try:
            answer = self._ask(process, setup, START_SECONDS, self._limits.compile_seconds)
        except TemplateLimitError as error:
            reason = f"compiling it takes more than {error.limit}"
        else:
            if "unusable" not in answer:
                self._process = process
                return process
            process.end()
            reason = answer["unusable"]
        self._unusable = UnusableTemplateError(reason)
        raise self._unusable

    def _asked(self, request: dict[str, Any]) -> dict[str, Any]:
        return self._ask(self._started(), packed(request), self._limits.wall_seconds, self._limits.cpu_seconds)

    def _ask(self, process: "_Process", request: bytes, seconds: float, cpu_seconds: float) -> dict[str, Any]:
        """The process's answer; ends the process when there is none, or it says that it had too little."""
        try:
            answer = process.ask(request, seconds)
        except BaseException as error:
            # What comes later would be taken for the answer to the next question.
            self.close()
            process.end()
            if isinstance(error, _GoneError) and error.returncode == -SIGPROF:
                raise TemplateLimitError(f"{cpu_seconds:g} seconds of processor time") from None
            if isinstance(error, _GoneError):
                how = (
                    f"by {Signals(-error.returncode).name}"
                    if error.returncode < 0
                    else f"with status {error.returncode}"
                )
                problem = f"The process that renders the model's chat template ended {how}."
                raise ChatTemplateError(f"{problem} Try again.") from None
            if isinstance(error, TimeoutError):
                raise TemplateLimitError(f"{seconds:g} seconds") from None
            raise
        if "limit" in answer:
            self.close()
            process.end()
            raise TemplateLimitError(answer["limit"])
        return answer


class _GoneError(Exception):
    """The process has ended in place of answering."""

    def __init__(self, returncode: int) -> None:
        self.returncode = returncode
        super().__init__(returncode)


class _Process:
    """One run of the process."""

    def __init__(self) -> None:
        """Starts it; raises ChatTemplateError when the system has none to give."""
        try:
            self._popen = subprocess.Popen(
                COMMAND,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=kept_environment(),
                start_new_session=True,
            )
        except OSError as error:
            problem = f"The process that renders the model's chat template cannot be started ({error.strerror})."
            raise ChatTemplateError(f"{problem} Try again later.") from None
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        self._stdin, self._stdout = self._popen.stdin, self._popen.stdout
        os.set_blocking(self._stdin.fileno(), False)
        self.end = weakref.finalize(self, _end, self._popen)

    @property
    def pid(self) -> int:
        """Its id."""
        return self._popen.pid

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return self._popen.poll() is None

    def ask(self, request: bytes, seconds: float) -> dict[str, Any]:
        """Sends a message and returns the answer; raises TimeoutError and _GoneError."""
        deadline = time.monotonic() + seconds
        unsent, data = memoryview(request), bytearray()
        while len(data) < HEADER_BYTES or len(data) < HEADER_BYTES + int.from_bytes(data[:HEADER_BYTES], "big"):
            wanted = [self._stdin] if unsent else []
            left = max(0.0, deadline - time.monotonic())
            readable, writable, _ = select.select([self._stdout], wanted, [], left)
            if not readable and not writable:
                raise TimeoutError
            if writable:
                try:
                    unsent = unsent[os.write(self._stdin.fileno(), unsent) :]
                except BlockingIOError:
                    continue
                except BrokenPipeError:
                    raise _GoneError(self._popen.wait()) from None
            if readable:
                piece = os.read(self._stdout.fileno(), _READ_BYTES)
                if not piece:
                    raise _GoneError(self._popen.wait())
                data += piece
        return unpacked(bytes(data[HEADER_BYTES:]))


def _end(popen: "subprocess.Popen[bytes]") -> None:
    popen.kill()
    popen.wait()
    for pipe in (popen.stdin, popen.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
