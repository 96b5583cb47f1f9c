"""Budgets: how many bytes of host and device memory this program may hold, out of what a person wrote."""

import psutil


def tree_resident_bytes(pid: int | None = None) -> int:
    """Memory that a process and its children hold resident now; by default this process.

    On Linux a page shared by several processes counts in equal parts in each (proportional set size), so that the
    code which our two processes share counts once in the sum. Elsewhere it counts in each of them, and the sum is an
    upper bound.
    """
    process = psutil.Process(pid)
    return sum(_resident(member) for member in (process, *process.children(recursive=True)))


def _resident(process: psutil.Process) -> int:
    try:
        info = process.memory_full_info()
    except psutil.NoSuchProcess:
        return 0
    except psutil.AccessDenied:
        info = process.memory_info()
    return int(getattr(info, "pss", info.rss))
