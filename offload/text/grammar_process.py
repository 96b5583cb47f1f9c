"""A process that does nothing but hold answers to the forms that clients ask for: strangers' grammars, in short.

It knows the vocabulary and forks for each grammar. The fork limits itself: the kernel ends it when it takes too much
processor time, and refuses memory past a bound; only the answers that this grammar holds end with it. No key, no model
and no connection is there. Run as `python -m slimoe.offload.text.grammar_process`, with a socket for standard input.
"""

import os
import signal
import socket
import sys
from collections.abc import Sequence

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from slimoe.offload.resources.process_limits import limit_memory, limit_time
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
from slimoe.offload.text.grammar_source import UnusableGrammarError, grammar_of

_LIMITS = LLParserLimits(max_items_in_row=20_000, verbose_errors=False)
_SHOWN = 400
"""Characters of llguidance's reasons, which may quote the whole grammar."""


class _Vocabulary:
    """The tokens as llguidance asks for them; texts are only split for grammars that insist on it."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, setup: Setup) -> None:
        self.tokens: Sequence[bytes] = setup.pieces
        self.special_token_ids = setup.control
        self.eos_token_id = setup.ends[0] if setup.ends else None
        self.tokenizer: LLTokenizer | None = None

    def __call__(self, text: str) -> list[int]:
        assert self.tokenizer is not None
        return self.tokenizer.greedy_tokenize(text)


class GrammarProcess:
    """Builds the vocabulary's tree, then forks whenever the other side sends a socket."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._setup = receive(control, Setup)
        vocabulary = _Vocabulary(self._setup)
        ends = list(self._setup.ends)
        self._tokenizer = vocabulary.tokenizer = LLTokenizer(vocabulary, eos_token=ends or None)  # type: ignore[arg-type]
        spaced = 0
        for token, piece in enumerate(self._setup.pieces):
            spaced |= (piece[:1] == b" " and token not in self._setup.control) << token
        self._n_mask = self._setup.n_mask_bytes
        self._spaced = spaced
        self._setup.pieces.clear()

    def run(self) -> None:
        """Until the other side closes the control socket."""
        # Nobody waits for the forks.
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        while True:
            data, sockets, _, _ = socket.recv_fds(self._control, 1, 1)
            if not data:
                return
            for number in sockets:
                if os.fork() == 0:
                    self._control.close()
                    self._hold(socket.socket(fileno=number))
                    os._exit(0)
                os.close(number)

    def _hold(self, answers: socket.socket) -> None:
        """Holds one answer, in the fork: compiles the grammar, then says what may follow each token."""
        limit_memory(self._setup.memory_bytes)
        request = receive(answers, GrammarRequest)
        limit_time(self._setup.compile_seconds)
        try:
            held = _Held(self._tokenizer, request, self._spaced, self._n_mask)
        except UnusableGrammarError as error:
            self._fail(answers, str(error))
            return
        while True:
            if held.is_complete:
                answers.sendall(COMPLETE)
                return
            # That the answer goes on is known long before how.
            answers.sendall(GOES_ON)
            try:
                mask = held.mask()
            except UnusableGrammarError as error:
                self._fail(answers, str(error))
                return
            answers.sendall(GOES_ON + mask)
            limit_time(0)
            token = receive_exactly(answers, TOKEN_BYTES)
            limit_time(self._setup.step_seconds)
            held.take(int.from_bytes(token, "little"))

    def _fail(self, answers: socket.socket, reason: str) -> None:
        answers.sendall(FAILED)
        send(answers, reason[:_SHOWN])


class _Held:
    """One answer and the grammar that holds it.

    Of a chat's answer the first space is left out. So its first token may also be one that begins with a space, where
    what follows the space is allowed; from then on it is held by a grammar that begins with one.
    """

    def __init__(self, tokenizer: LLTokenizer, request: GrammarRequest, spaced: int, n_mask: int) -> None:
        self._matcher = _matcher(tokenizer, grammar_of(request))
        self._after_space = _matcher(tokenizer, grammar_of(request, " ")) if request.strips_space else None
        self._spaced, self._n_mask = spaced, n_mask

    @property
    def is_complete(self) -> bool:
        """Whether nothing can follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def mask(self) -> bytes:
        """One bit for each token that may follow, those that end an answer included where it may end."""
        mask = _mask(self._matcher)
        if self._after_space is not None:
            either = int.from_bytes(mask, "little") & ~self._spaced
            mask = (either | int.from_bytes(_mask(self._after_space), "little")).to_bytes(len(mask), "little")
        return mask[: self._n_mask]

    def take(self, token: int) -> None:
        """Goes on behind a token of the mask."""
        if self._after_space is not None:
            if self._spaced >> token & 1:
                self._matcher = self._after_space
            self._after_space = None
        self._matcher.consume_token(token)


def _matcher(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=_LIMITS)
    if matcher.is_error():
        raise UnusableGrammarError(matcher.get_error().split("\n<")[0])
    return matcher


def _mask(matcher: LLMatcher) -> bytes:
    mask = matcher.compute_bitmask()
    if matcher.is_error():
        reason = matcher.get_error().split("\n<")[0]
        raise UnusableGrammarError("no text has this form" if reason.startswith("NoExtensionBias") else reason)
    return mask


def main() -> None:
    """The process's whole life."""
    try:
        GrammarProcess(socket.socket(fileno=sys.stdin.fileno())).run()
    except (BrokenPipeError, ConnectionResetError, EOFError):
        os._exit(0)


if __name__ == "__main__":
    main()
