"""Ctrl-C while the main thread is deaf: Python's handlers run between two of its own steps, and not within C code.

A call of ggml's may take minutes, and one to a device that has stopped answering never comes back.
"""

import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from slimoe.offload.ggml.device_calls import longest_wait
from slimoe.server.telling import tell

INTERRUPTED = 130
"""The exit status of a command that Ctrl-C has ended, as shells have it."""
_LOOK_SECONDS = 1.0
_DEAF_SECONDS = 20.0
"""Of a device's silence, until a person is told: a slow one may compute a batch for seconds."""


@contextmanager
def ending_at_interrupt(count: int = 2) -> Iterator[None]:
    """Ends the process at the `count`th Ctrl-C within the block, whatever the main thread does then.

    The first ones reach the main thread as ever. What it waits for after one, and a device that does not answer, are
    told on standard error. Another thread's block, and one within another, change nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard, told = socket.socketpair()
    told.setblocking(False)
    before = signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
    watch = threading.Thread(target=_watch, args=(heard, count), name="interrupts", daemon=True)
    watch.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        told.close()
        watch.join()
        heard.close()


def _watch(heard: socket.socket, n_left: int) -> None:
    """Counts the Ctrl-C that are heard until the other end is closed."""
    is_asked = is_told = False
    while True:
        if select.select([heard], (), (), _LOOK_SECONDS)[0]:
            numbers = heard.recv(64)
            if not numbers:
                return
            n_came = numbers.count(signal.SIGINT)
            n_left -= n_came
            if n_left <= 0:
                print(file=sys.stderr, flush=True)
                os._exit(INTERRUPTED)
            is_asked, is_told = is_asked or n_came > 0, is_told and not n_came
        elif not is_told:
            is_told = _told(n_left, is_asked=is_asked)


def _told(n_left: int, *, is_asked: bool) -> bool:
    """Tells a person what holds the main thread up, if there is something to tell by now."""
    wait = longest_wait()
    if not is_asked and (wait is None or wait.seconds <= _DEAF_SECONDS):
        return False
    problem = "This step is still being computed." if wait is None else f"{wait}. {wait.advice}"
    print(file=sys.stderr)  # an answer may stand half a line before
    tell(f"{problem} {'Ctrl-C' if n_left == 1 else f'Ctrl-C {n_left} times'} ends the program at once.")
    return True
