"""Holds answers to the forms that clients ask for: JSON schemas, regular expressions and grammars.

llguidance says which tokens may follow, in processes of their own, see `grammar_process`: while the model computes
what it would like to say next, a process works out what it may.
"""

import contextlib
import hashlib
import select
import socket
import subprocess
import sys
import threading
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slimoe.offload.errors import SlimoeError, UsageError
from slimoe.offload.resources.process_limits import kept_environment
from slimoe.offload.text.generation import Constraint
from slimoe.offload.text.grammar_messages import (
    COMPLETE,
    FAILED,
    GOES_ON,
    TOKEN_BYTES,
    GrammarRequest,
    Setup,
    receive,
    receive_exactly,
    send,
)
from slimoe.offload.text.tokenizer import Tokenizer

_COMMAND = (sys.executable, "-P", "-m", "slimoe.offload.text.grammar_process")
_PATIENCE = 30.0
"""Seconds by the clock, for a machine that is busy; the processor time that a grammar may take is far less."""
_MOST_VERDICTS = 256
MAX_CHARS = 1 << 20
"""Of a constraint's text."""

Allowed = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class GrammarLimits:
    """What one grammar may take of the machine: processor time to be compiled and for each token, and memory.

    A schema of 100 kB takes a tenth of a second and some megabytes.
    """

    compile_seconds: float = 1.0
    step_seconds: float = 0.5
    memory_bytes: int = 48 << 20


class ConstraintError(UsageError):
    """An answer cannot be held to the form that was asked for, by the field `param`."""

    def __init__(self, constraint: Constraint, reason: str) -> None:
        self.param = constraint.param
        super().__init__(f"{constraint.param} cannot be followed: {reason.rstrip('.')}.")


class Held:
    """One answer that is held to a form, from the side of whoever draws its tokens. `close` gives it up."""

    def __init__(self, answers: socket.socket, constraint: Constraint, n_vocab: int, limits: GrammarLimits) -> None:
        self._answers, self._constraint, self._limits = answers, constraint, limits
        self._n_vocab = n_vocab
        self._mark: bytes | None = None
        self._is_compiled = False

    def allowed(self) -> Allowed | None:
        """Which tokens may come next, [n_vocab], among them those that end the answer; None where it is complete.

        Waits until that is known. Raises ConstraintError when it cannot be known.
        """
        if self.is_complete(_PATIENCE):
            return None
        try:
            if self._mark == GOES_ON:
                self._mark = self._receive_mark()
            if self._mark == FAILED:
                raise ConstraintError(self._constraint, receive(self._answers, str))
            if self._mark != GOES_ON:
                raise self._stopped()
            mask = receive_exactly(self._answers, -(-self._n_vocab // 8))
        except (EOFError, OSError):
            raise self._stopped() from None
        self._is_compiled = True
        return np.unpackbits(np.frombuffer(mask, np.uint8), count=self._n_vocab, bitorder="little").view(np.bool_)

    def is_complete(self, seconds: float) -> bool:
        """Whether nothing can follow the last token, if that is known after so many seconds."""
        if self._mark is None and select.select([self._answers], [], [], seconds)[0]:
            self._mark = self._receive_mark()
        return self._mark == COMPLETE

    def take(self, token: int) -> None:
        """Goes on behind `token`, one of those allowed."""
        self._mark = None
        with contextlib.suppress(OSError):  # whose reason is told when the next token is asked for
            self._answers.sendall(token.to_bytes(TOKEN_BYTES, "little"))

    def close(self) -> None:
        """Ends the process that holds the answer."""
        self._answers.close()

    def _receive_mark(self) -> bytes:
        """The next mark; empty when the process has ended."""
        with contextlib.suppress(EOFError, OSError):
            return bytes(receive_exactly(self._answers, 1))
        return b""

    def _stopped(self) -> ConstraintError:
        limits = self._limits
        seconds = limits.step_seconds if self._is_compiled else limits.compile_seconds
        work = "finding what may come next" if self._is_compiled else "compiling it"
        most = f"{seconds:g} seconds of processor time or {limits.memory_bytes >> 20} MiB of memory"
        return ConstraintError(self._constraint, f"{work} takes more than {most}. Ask for a simpler form")


class Grammars:
    """The forms that answers of one model are held to. Any thread may call it; `close` ends its process.

    The process starts with the first constraint. The verdicts on the latest constraints are remembered.
    """

    def __init__(self, tokenizer: Tokenizer, limits: GrammarLimits = GrammarLimits()) -> None:
        self._tokenizer, self._limits = tokenizer, limits
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._verdicts: OrderedDict[bytes, ConstraintError | None] = OrderedDict()

    @property
    def pid(self) -> int | None:
        """The id of the process that knows the vocabulary, while there is one."""
        return None if self._process is None else self._process.pid

    def check(self, constraint: Constraint) -> None:
        """Raises ConstraintError for a constraint that answers cannot be held to."""
        if len(constraint.text) > MAX_CHARS:
            problem = f"it has {len(constraint.text):,} characters, but may have {MAX_CHARS:,}"
            raise ConstraintError(constraint, problem)
        key = hashlib.sha256(repr(constraint).encode("utf-8", "surrogatepass")).digest()
        if key not in self._verdicts:
            held = self.hold(constraint)
            error: ConstraintError | None = None
            try:
                held.allowed()
            except ConstraintError as refusal:
                error = refusal
            finally:
                held.close()
            self._verdicts[key] = error
            if len(self._verdicts) > _MOST_VERDICTS:
                self._verdicts.popitem(last=False)
        if (known := self._verdicts.get(key)) is not None:
            raise known

    def hold(self, constraint: Constraint, *, strips_space: bool = False) -> Held:
        """Begins an answer; with `strips_space` one space before its first word is no part of it."""
        ours, theirs = socket.socketpair()
        ours.settimeout(_PATIENCE)
        with theirs, self._lock:
            for is_last in (False, True):
                control = self._started()
                try:
                    socket.send_fds(control, [b"+"], [theirs.fileno()])
                    break
                except OSError:
                    self._end()
                    if is_last:
                        raise SlimoeError("The process that holds answers to grammars has ended. Try again.") from None
        with contextlib.suppress(OSError):
            send(
                ours,
                GrammarRequest(constraint.kind, constraint.text, strips_space, constraint.before, constraint.instead),
            )
        return Held(ours, constraint, self._tokenizer.n_vocab, self._limits)

    def close(self) -> None:
        """Ends the process; the next constraint starts another."""
        with self._lock:
            self._end()

    def _started(self) -> socket.socket:
        if self._control is not None:
            return self._control
        control, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                _COMMAND,
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=kept_environment(),
                start_new_session=True,
            )
        self._control = control
        tokenizer, limits = self._tokenizer, self._limits
        pieces, control_tokens = tokenizer.all_pieces(), sorted(tokenizer.control)
        ends = sorted(tokenizer.eog)
        times = (limits.memory_bytes, limits.compile_seconds, limits.step_seconds)
        with contextlib.suppress(OSError):
            send(control, Setup(pieces, control_tokens, ends, *times))
        return control

    def _end(self) -> None:
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._control = self._process = None
