"""How a process lives that this program has started: it dies with its parent. Apart, since ggml is not loaded here."""

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

_PR_SET_PDEATHSIG = 1
_OOM_SCORE = 500


def settle_in(parent_pid: int) -> None:
    """Makes this process a good child: dies with its parent, leaves Ctrl-C to it, is the first to go without memory."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent_pid:
            leave()
        Path("/proc/self/oom_score_adj").write_text(str(_OOM_SCORE))
    if sys.platform != "win32":
        import resource

        # An abort must not write the model's gigabytes to disk before the engine can start again.
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def leave() -> NoReturn:
    """Ends the process at once: threads inside C code cannot be asked, and the memory goes back either way."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
    os._exit(0)
