"""Opens files to read: regular ones only, so that nothing waits for the other end of a pipe."""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

_KINDS = ((stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))


def open_regular(path: Path, *, buffering: int = -1) -> BinaryIO:
    """Opens a file to read. Raises OSError, whose `strerror` says what a thing is that is no regular file."""
    descriptor = regular_descriptor(path)
    try:
        return open(descriptor, "rb", buffering=buffering)
    except BaseException:
        os.close(descriptor)
        raise


def regular_descriptor(path: Path, flags: int = 0) -> int:
    """The descriptor of a regular file, open to read with further `os.open` flags; raises OSError as `open_regular`."""
    try:
        # A pipe would otherwise be waited for until somebody writes to it; regular files do not know the flag.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | flags)
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise OSError(errno.ENXIO, f"it is {kind_name(os.stat(path).st_mode)}, not a file", str(path)) from None
        raise
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, f"it is {kind_name(mode)}, not a file", str(path))


def read_regular(path: Path) -> bytes:
    """The content of a file; raises OSError as `open_regular` does."""
    with open_regular(path) as file:
        return file.read()


def kind_name(mode: int) -> str:
    """What a thing is that is no regular file, from its `st_mode`."""
    return next((name for holds, name in _KINDS if holds(mode)), "a device")


def reason(error: OSError) -> str:
    """The system's words for an error; some libraries raise errors that have a text and no `strerror`."""
    return error.strerror or str(error) or type(error).__name__
