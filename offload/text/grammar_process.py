"""A process that tries out the forms that clients ask for, before the engine holds an answer to one.

It forks for each grammar. The fork limits itself: the kernel ends it when it takes too much processor time, memory or
stack, and with it nothing is lost. It holds no key, no model and no connection. Run as
`python -m slimoe.offload.text.grammar_process`, with a socket for standard input.
"""

import os
import signal
import socket
import sys

from llguidance import LLTokenizer

from slimoe.offload.resources.process_limits import limit_memory, limit_stack, limit_time, resident_bytes
from slimoe.offload.text.generation import Constraint
from slimoe.offload.text.grammar_messages import Setup, Verdict, receive, send
from slimoe.offload.text.grammar_source import UnusableGrammarError, compiled, tokenizer_of

_BYTES = [bytes([byte]) for byte in range(256)]


class GrammarProcess:
    """Forks whenever the other side sends a socket, over which the fork is asked."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._setup = receive(control, Setup)
        # Bytes do in place of tokens, whose tree would be large; but all have their numbers.
        names = dict(zip(self._setup.control, self._setup.names, strict=True))
        pieces = [names.get(token, b"") for token in range(self._setup.n_vocab)]
        self._tokenizer: LLTokenizer = tokenizer_of(pieces + _BYTES, self._setup.control, self._setup.ends)

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
                    self._try(socket.socket(fileno=number))
                    os._exit(0)
                os.close(number)

    def _try(self, asker: socket.socket) -> None:
        """Compiles one grammar, in the fork."""
        setup = self._setup
        limit_memory(setup.memory_bytes)
        limit_stack(setup.stack_bytes)
        constraint = receive(asker, Constraint)
        before = resident_bytes()
        limit_time(setup.cpu_seconds)
        try:
            compiled(self._tokenizer, constraint)
        except UnusableGrammarError as error:
            send(asker, Verdict(str(error), param=error.param))
        else:
            limit_time(0)
            send(asker, Verdict(None, max(0, resident_bytes() - before)))


def main() -> None:
    """The process's whole life."""
    try:
        GrammarProcess(socket.socket(fileno=sys.stdin.fileno())).run()
    except (BrokenPipeError, ConnectionResetError, EOFError):
        os._exit(0)


if __name__ == "__main__":
    main()
