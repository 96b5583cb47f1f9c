"""Whether the system gives a program the threads that it is about to need."""

import threading

from slimoe.offload.errors import SlimoeError


class NoThreadsError(SlimoeError):
    """The system refuses further threads."""

    def __init__(self, n_wanted: int, n_given: int) -> None:
        super().__init__(
            f"{n_wanted} threads are needed, but the system gives this program only {n_given} more. Lower --threads, "
            "or raise the limit (ulimit -u, or pids.max of its control group)."
        )


def require_threads(n_threads: int) -> None:
    """Raises NoThreadsError where so many more cannot run at once: OpenMP would end the process without asking."""
    begun: list[threading.Thread] = []
    may_end = threading.Event()
    try:
        for _ in range(n_threads):
            begun.append(threading.Thread(target=may_end.wait, daemon=True))
            begun[-1].start()
    except RuntimeError:
        raise NoThreadsError(n_threads, len(begun) - 1) from None
    finally:
        may_end.set()
        for thread in begun:
            if thread.ident is not None:
                thread.join()
