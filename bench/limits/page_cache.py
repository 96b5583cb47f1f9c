"""What the system keeps of a file in memory: how much there is, and how to be rid of it.

Whoever reads a file first pays for its pages, and everyone after gets them for nothing: a contender that is to be
measured under a memory limit must find none. Linux only.
"""

import ctypes
import math
import mmap
import os
from pathlib import Path

import numpy as np

from slimoe.offload.errors import SlimoeError

_TRIES = 5


class StillCachedError(SlimoeError):
    """Pages of the file stay in the page cache."""

    exit_code = 75


def cached_bytes(path: Path) -> int:
    """How much of a file lies in the page cache, whoever read it; a file of ours, or as root: others show all."""
    n_bytes = path.stat().st_size
    if not n_bytes:
        return 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), n_bytes, access=mmap.ACCESS_READ) as mapped:
        flags = np.zeros(math.ceil(n_bytes / mmap.PAGESIZE), np.uint8)
        # A view of numpy's, since ctypes gives no address of a map that cannot be written; one that can be counts as
        # memory that the system must have, more than there is for a large file.
        view = np.frombuffer(mapped, np.uint8)
        address = ctypes.c_void_p(view.ctypes.data)
        status = ctypes.CDLL(None).mincore(address, ctypes.c_size_t(n_bytes), ctypes.c_void_p(flags.ctypes.data))
        del view  # or the map cannot be closed
    assert status == 0, f"mincore fails on {path}"
    return int(np.count_nonzero(flags & 1)) * mmap.PAGESIZE


def drop(path: Path) -> None:
    """Writes a file out and drops it from the page cache.

    Raises StillCachedError, as when another program has the file mapped.
    """
    file = os.open(path, os.O_RDONLY)
    try:
        for _ in range(_TRIES):
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            left = cached_bytes(path)
            if not left:
                return
    finally:
        os.close(file)
    raise StillCachedError(
        f"{left} bytes of {path} stay in the page cache: another program has it open. End that program."
    )
