"""Keeps Ctrl-C from being lost in C functions that call back into Python. Apart: it is about signals, not text."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Lets SIGINT wait until the end of the block.

    An exception cannot pass through C: one that a signal's handler raises in a callback is printed and dropped.
    Other threads than the main one run no handlers, and where none is set there is nothing to hold.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            handler(*came[0])
