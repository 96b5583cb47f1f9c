"""Holds answers to the forms that clients ask for: JSON schemas, regular expressions and grammars.

llguidance says which tokens may follow. A form is tried out in a process that may end, see `grammar_process`, before it
is compiled in this one, where masks are made with the model's whole vocabulary. It is loaded for the first form.
"""

import contextlib
import hashlib
import socket
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from slimoe.offload.errors import SlimoeError, UsageError
from slimoe.offload.resources.process_limits import kept_environment
from slimoe.offload.text.generation import Constraint
from slimoe.offload.text.grammar_messages import Setup, Verdict, receive, send
from slimoe.offload.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_COMMAND = (sys.executable, "-P", "-m", "slimoe.offload.text.grammar_process")
_PATIENCE = 30.0
"""Seconds by the clock, for a machine that is busy; the processor time that a grammar may take is far less."""
_MOST_COMPILED, _MOST_COMPILED_BYTES = 64, 48 << 20
_DEEP_STACK = 16 << 20
"""Several times what the trial had: what was compiled there is compiled here."""
MAX_CHARS = 1 << 20
"""Of a constraint's text."""
LONG_MASK_SECONDS = 0.0002
"""Of processor time: after a mask that takes longer the next is made while the model computes. To hand one over takes
about as long."""

Allowed = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class GrammarLimits:
    """What compiling one grammar may take of the machine, and of the processor what it takes to go on by one token.

    A schema of 100 kB takes a tenth of a second and some megabytes, a token of it a thousandth. All tokens of an answer
    together may take `first_seconds`, and `mean_seconds` more for each of them: what nobody notices beside others.
    """

    cpu_seconds: float = 1.0
    token_seconds: float = 0.5
    first_seconds: float = 1.0
    mean_seconds: float = 0.003
    memory_bytes: int = 48 << 20
    stack_bytes: int = 4 << 20


class ConstraintError(UsageError):
    """An answer cannot be held to the form that was asked for, by the field `param`."""

    def __init__(self, constraint: Constraint, reason: str, param: str | None = None) -> None:
        self.param = param or constraint.param
        super().__init__(f"{self.param} cannot be followed: {reason.rstrip('.')}.")


class _Compiled(NamedTuple):
    """What holds answers to one form, also behind a space if that is no part of them; or why nothing can."""

    matcher: "LLMatcher | None"
    after_space: "LLMatcher | None" = None
    problem: str | None = None
    n_bytes: int = 0
    param: str | None = None


class Held:
    """One answer that is held to a form; `is_complete` says that nothing can follow the last token.

    Of a chat's answer the first space is left out. So its first token may also be one that begins with a space, where
    what follows the space is allowed; from then on it is held by a grammar that begins with one.
    """

    def __init__(
        self,
        constraint: Constraint,
        compiled: _Compiled,
        spaced: Allowed,
        workers: ThreadPoolExecutor,
        limits: GrammarLimits,
    ) -> None:
        assert compiled.matcher is not None
        self.is_complete = False
        self._limits, self._n_masks = limits, 0
        self._taking_seconds = self._all_seconds = 0.0
        self._constraint, self._spaced, self._workers = constraint, spaced, workers
        # Whole words, as llguidance writes them.
        self._bits = np.empty(-(-len(spaced) // 32) * 4, np.uint8)
        self._place = self._bits.ctypes.data, self._bits.nbytes
        self._matcher = compiled.matcher.deep_copy()
        self._after_space = None if compiled.after_space is None else compiled.after_space.deep_copy()
        self._made: Future[Allowed] | None = None
        self._mask_seconds = 0.0

    def allowed(self) -> Allowed:
        """Which tokens may come next, [n_vocab], among them those that end the answer where it may end.

        Raises ConstraintError when llguidance gives up, or takes too long.
        """
        made, self._made = self._made, None
        return self._make() if made is None else made.result()

    def take(self, token: int) -> None:
        """Goes on behind `token`, one of those allowed."""
        if self._after_space is not None:
            if self._spaced[token]:
                self._matcher = self._after_space
            self._after_space = None
        begin = time.thread_time()
        self._matcher.consume_token(token)
        self._taking_seconds = time.thread_time() - begin
        self.is_complete = self._matcher.is_stopped() and not self._matcher.is_error()
        if self._mask_seconds > LONG_MASK_SECONDS and not self.is_complete:
            # From here on nobody but the worker touches the matcher.
            self._made = self._workers.submit(self._make)

    def _make(self) -> Allowed:
        begin = time.thread_time()
        mask = self._mask_of(self._matcher)
        if self._after_space is not None:
            mask = (mask & ~self._spaced) | self._mask_of(self._after_space)
        self._mask_seconds = time.thread_time() - begin
        self._check_time(self._taking_seconds + self._mask_seconds)
        return mask

    def _check_time(self, seconds: float) -> None:
        """Raises ConstraintError when a token has taken too long, or all of them together.

        Nothing can stop llguidance in its midst, and what takes long once will again.
        """
        limits = self._limits
        self._n_masks += 1
        self._all_seconds += seconds
        if seconds > limits.token_seconds:
            problem = f"a token of it takes more than {limits.token_seconds:g} seconds of processor time"
        elif self._all_seconds > limits.first_seconds + self._n_masks * limits.mean_seconds:
            most = f"{limits.first_seconds:g} seconds of processor time and {limits.mean_seconds:g} more for each"
            problem = f"its tokens, {self._n_masks:,} so far, take more than {most}"
        else:
            return
        raise ConstraintError(self._constraint, f"{problem}. Ask for a simpler form")

    def _mask_of(self, matcher: "LLMatcher") -> Allowed:
        matcher.unsafe_compute_mask_ptr(*self._place)
        if matcher.is_error():
            from slimoe.offload.text.grammar_source import reason_of

            raise ConstraintError(self._constraint, reason_of(matcher))
        return np.unpackbits(self._bits, count=len(self._spaced), bitorder="little").view(np.bool_)


class Grammars:
    """The forms that answers of one model are held to. Any thread may call it; `close` ends its process.

    What the latest constraints were compiled to is remembered.
    """

    def __init__(self, tokenizer: Tokenizer, limits: GrammarLimits = GrammarLimits()) -> None:
        self._tokenizer, self._limits = tokenizer, limits
        self._lock, self._tree_lock = threading.Lock(), threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._tree: LLTokenizer | None = None
        self._spaced = np.empty(0, np.bool_)
        self._known: OrderedDict[bytes, _Compiled] = OrderedDict()
        self._workers = ThreadPoolExecutor(1, thread_name_prefix="masks")

    @property
    def pid(self) -> int | None:
        """The id of the process that tries grammars out, while there is one."""
        return None if self._process is None else self._process.pid

    def check(self, constraint: Constraint, *, strips_space: bool = False) -> None:
        """Compiles a constraint, unless it is known; raises ConstraintError for one that answers cannot be held to."""
        self._compiled(constraint, strips_space)

    def hold(self, constraint: Constraint, *, strips_space: bool = False) -> Held:
        """Begins an answer; with `strips_space` one space before its first word is no part of it.

        Raises ConstraintError.
        """
        compiled = self._compiled(constraint, strips_space)
        return Held(constraint, compiled, self._spaced, self._workers, self._limits)

    def close(self) -> None:
        """Ends the process; the next new constraint starts another."""
        self._workers.shutdown(wait=False)
        with self._lock:
            self._end()

    def _compiled(self, constraint: Constraint, strips_space: bool) -> _Compiled:
        if len(constraint.text) > MAX_CHARS:
            problem = f"it has {len(constraint.text):,} characters, but may have {MAX_CHARS:,}"
            raise ConstraintError(constraint, problem)
        parts = constraint.kind, constraint.text, constraint.before, constraint.instead, strips_space, constraint.tools
        key = hashlib.sha256(repr(parts).encode()).digest()
        with self._lock:
            found = self._known.get(key)
        if found is None:
            found = self._compile(constraint, strips_space)
        with self._lock:
            self._known[key] = found
            self._known.move_to_end(key)
            while self._known and (
                len(self._known) > _MOST_COMPILED
                or sum(compiled.n_bytes for compiled in self._known.values()) > _MOST_COMPILED_BYTES
            ):
                self._known.popitem(last=False)
        if found.problem is not None:
            raise ConstraintError(constraint, found.problem, found.param)
        return found

    def _compile(self, constraint: Constraint, strips_space: bool) -> _Compiled:
        """Compiles a constraint in this process once it was done in another without harm."""
        verdict = self._tried(constraint)
        if verdict.problem is not None:
            return _Compiled(None, problem=verdict.problem, param=verdict.param)
        from slimoe.offload.text.grammar_source import UnusableGrammarError, compiled

        tree = self._grown_tree()
        try:
            matcher = _with_deep_stack(lambda: compiled(tree, constraint))
            after_space = _with_deep_stack(lambda: compiled(tree, constraint, " ")) if strips_space else None
        except UnusableGrammarError as error:
            return _Compiled(None, problem=str(error), param=error.param)
        return _Compiled(matcher, after_space, n_bytes=verdict.n_bytes * (2 if strips_space else 1))

    def _grown_tree(self) -> "LLTokenizer":
        from slimoe.offload.text.grammar_source import tokenizer_of

        with self._tree_lock:
            if self._tree is None:
                tokenizer = self._tokenizer
                pieces = tokenizer.all_pieces()
                self._tree = tokenizer_of(pieces, sorted(tokenizer.control), sorted(tokenizer.eog))
                plain = (piece[:1] == b" " and token not in tokenizer.control for token, piece in enumerate(pieces))
                self._spaced = np.fromiter(plain, np.bool_, len(pieces))
            return self._tree

    # --- the process that tries grammars out ---------------------------------------------------------------

    def _tried(self, constraint: Constraint) -> Verdict:
        """What becomes of the constraint in a process that may end."""
        ours, theirs = socket.socketpair()
        ours.settimeout(_PATIENCE)
        with ours:
            with theirs, self._lock:
                for is_last in (False, True):
                    try:
                        socket.send_fds(self._started(), [b"+"], [theirs.fileno()])
                        break
                    except OSError:
                        self._end()
                        if is_last:
                            raise SlimoeError("The process that tries grammars out has ended. Try again.") from None
            try:
                send(ours, constraint)
                return receive(ours, Verdict)
            except (OSError, EOFError):
                limits = self._limits
                most = f"{limits.cpu_seconds:g} seconds of processor time or {limits.memory_bytes >> 20} MiB of memory"
                return Verdict(f"compiling it takes more than {most}. Ask for a simpler form")

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
        ids = sorted(tokenizer.control)
        names = [tokenizer.piece(token, special=True) for token in ids]
        most = limits.memory_bytes, limits.stack_bytes, limits.cpu_seconds
        with contextlib.suppress(OSError):
            send(control, Setup(tokenizer.n_vocab, ids, names, sorted(tokenizer.eog), *most))
        return control

    def _end(self) -> None:
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._control = self._process = None


def _with_deep_stack(work: "Callable[[], LLMatcher]") -> "LLMatcher":
    """Does work whose recursion may go deep."""
    done: Future[LLMatcher] = Future()

    def carry_out() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    usual = threading.stack_size(_DEEP_STACK)
    try:
        threading.Thread(target=carry_out, name="grammar", daemon=True).start()
    finally:
        threading.stack_size(usual)
    return done.result()
