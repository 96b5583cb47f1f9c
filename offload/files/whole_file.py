"""Files that are written whole or not at all, by one run at a time: the one place that writes under final names.

What a run writes lies in a folder beside its destination, DESTINATION.partial, until it is whole. The lock in that
folder belongs to one process, from which the system takes it however the process ends: a folder whose lock is free is
what an interrupted run has left.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from slimoe.offload.errors import DoesNotFitError, SlimoeError, UsageError
from slimoe.offload.files.regular_file import kind_name, reason

_PARTIAL, _LOCK = ".partial", "lock"
_LONGEST_NAME = 200
"""Bytes of a name that leave room for an ending of ours."""
PATIENCE_SECONDS, _PAUSE_SECONDS = 0.5, 0.02
"""How long a lock may be taken by a run that only looks at it, or is about to end."""
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class BusyError(UsageError):
    """Another run writes the same file."""


@dataclass(frozen=True, slots=True)
class Leftover:
    """The folder of a run that was interrupted, and the bytes in it."""

    folder: Path
    n_bytes: int


class Destination:
    """A file that only this process may write, until it is closed; `folder`, beside it, is for what is not whole yet.

    `target` is its name as given. `left_bytes` lay in the folder of a run that was interrupted; unless this one resumes
    it they are gone.
    """

    def __init__(self, target: Path, *, resumes: bool = False) -> None:
        """Raises BusyError while another run has the file, UsageError where no file can be written."""
        path = real_path(target)
        self.target, self.folder = target, path.with_name(_short(path.name) + _PARTIAL)
        self._keeps = resumes
        try:
            self._lock = _lock_folder(self.folder, target)
            self.left_bytes = _disk_bytes(self.folder)
            if not resumes:
                clear(self.folder)
        except OSError as error:
            raise write_error(target, error) from None

    @property
    def is_empty(self) -> bool:
        """Whether nothing but the lock lies in the folder."""
        return not _entries(self.folder)

    def forget(self) -> None:
        """Lets closing remove what lies in the folder, also what a later run could resume."""
        self._keeps = False

    def close(self) -> None:
        """Lets others write the file. The folder goes, unless it holds what a later run resumes."""
        lock, self._lock = self._lock, -1
        if lock < 0:
            return
        try:
            if not self._keeps or not _entries(self.folder):
                with contextlib.suppress(OSError):
                    clear(self.folder)
                    (self.folder / _LOCK).unlink()
                    self.folder.rmdir()
        finally:
            os.close(lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


@contextlib.contextmanager
def reserved(target: Path | Destination) -> Iterator[Destination]:
    """A destination for as long as the block runs, or as long as its owner has it; raises as `Destination` does."""
    if isinstance(target, Destination):
        yield target
    else:
        with Destination(target) as destination:
            yield destination


@contextlib.contextmanager
def whole_file(path: Path, folder: Path | None = None) -> Iterator[Path]:
    """Gives a file to write, in `folder` or beside `path`, which takes the place of `path` when the block is done.

    It is synced before, and gone if anything goes wrong; its permissions are what the umask says. Raises
    DoesNotFitError when the disk is full, UsageError for what else the system refuses, also within the block.
    """
    real = real_path(path)
    part = (folder or real.parent) / f"{_short(real.name)}.{secrets.token_hex(4)}.part"
    try:
        os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666))
        yield part
        _sync(part)
        os.replace(part, real)
    except OSError as error:
        raise write_error(path, error) from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
    try:
        _sync(real.parent, os.O_DIRECTORY)
    except OSError as error:
        problem = f"{path} is whole, but the disk does not say that it is kept ({reason(error)})."
        raise SlimoeError(f"{problem} Check the disk, and write it again.") from None


@contextlib.contextmanager
def whole_directory(destination: Destination) -> Iterator[Path]:
    """Gives a directory to fill, in the destination's folder, which takes the target's name when the block is done.

    What is written into it is to be synced by who writes it. Raises as `whole_file` does, also within the block, and
    where something has taken the name meanwhile.
    """
    part = destination.folder / "directory"
    try:
        part.mkdir()
        yield part
        _sync(part, os.O_DIRECTORY)
        os.rename(part, real_path(destination.target))
        _sync(destination.folder.parent, os.O_DIRECTORY)
    except OSError as error:
        raise write_error(destination.target, error) from None


def write_whole(path: Path, data: bytes, folder: Path | None = None) -> None:
    """Writes `data` as a whole file; raises as `whole_file` does."""
    with whole_file(path, folder) as part:
        part.write_bytes(data)


def real_path(path: Path) -> Path:
    """The path of a file to write with links followed, whether there is such a file already or not.

    Raises UsageError for what is no regular file, and where there cannot be one.
    """
    real = Path(os.path.realpath(path))
    try:
        mode = _mode(real)
        if mode is None and not os.path.isdir(real.parent):
            _mode(real.parent)
            raise UsageError(f"{path.parent} is no directory. Create it first.")
    except OSError as error:
        raise write_error(path, error) from None
    if mode is None or stat.S_ISREG(mode):
        return real
    if stat.S_ISDIR(mode):
        raise UsageError(f"{path} is a directory. Name the file to write in it.")
    what = "a link in a circle" if stat.S_ISLNK(mode) else kind_name(mode)
    raise UsageError(f"{path} is {what}, not a file. Choose another name.")


def abandoned(directory: Path) -> tuple[Leftover, ...]:
    """The folders in a directory that interrupted runs have left: those whose lock no process has."""
    leftovers = []
    try:
        for folder in sorted(directory.glob(f"*{_PARTIAL}")):
            try:
                lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            except OSError:
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue
            finally:
                os.close(lock)
            leftovers.append(Leftover(folder, _disk_bytes(folder)))
    except OSError:
        return ()
    return tuple(leftovers)


def write_error(path: Path, error: OSError) -> SlimoeError:
    """The error for a person when the system refuses to write `path`."""
    if error.errno in _FULL:
        free = free_bytes(path.parent)
        message = f"{path} cannot be written: the disk is full, {free:,} bytes are free. Free some space."
        return DoesNotFitError(message, required_bytes=free + 1, available_bytes=free)
    return UsageError(f"{path} cannot be written ({reason(error)}). Choose another place.")


def free_bytes(directory: Path) -> int:
    """Bytes that are free on the disk of a directory; 0 if the system does not say."""
    try:
        return shutil.disk_usage(directory).free
    except OSError:
        return 0


# --- names ---------------------------------------------------------------------------------------------------


def _short(name: str) -> str:
    """Shortens a name, if it is long, so that an ending can be added; different names stay different."""
    raw = os.fsencode(name)
    if len(raw) <= _LONGEST_NAME:
        return name
    digest = hashlib.sha256(raw).hexdigest()[:16]
    return f"{os.fsdecode(raw[:_LONGEST_NAME]).encode('utf-8', 'ignore').decode()}-{digest}"


def _mode(path: Path) -> int | None:
    """The `st_mode` of what lies at a path, None for nothing."""
    try:
        return os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None


def _sync(path: Path, flags: int = 0) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)


# --- the folder of a run -------------------------------------------------------------------------------------


def _lock_folder(folder: Path, target: Path) -> int:
    """Takes the lock of a run's folder, which it makes if need be; returns the lock's descriptor.

    Raises BusyError while another run has it, UsageError for a folder that no run made, and OSError.
    """
    end = time.monotonic() + PATIENCE_SECONDS
    while True:
        with contextlib.suppress(FileNotFoundError):  # its owner has just removed the folder
            lock = _open_lock(folder)
            try:
                if _take(lock, folder):
                    return lock
            except BaseException:
                os.close(lock)
                raise
            os.close(lock)
        if time.monotonic() > end:
            raise BusyError(f"{target} is being written by another run. Wait for its end, or choose another name.")
        time.sleep(_PAUSE_SECONDS)


def _open_lock(folder: Path) -> int:
    try:
        folder.mkdir()
    except FileExistsError:
        pass
    except FileNotFoundError as error:
        raise write_error(folder, error) from None
    if not stat.S_ISDIR(os.lstat(folder).st_mode) or (_LOCK not in (names := os.listdir(folder)) and names):
        raise UsageError(f"{folder} is in the way: no run of this program made it. Move it, or choose another name.")
    try:
        return os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    except OSError:
        with contextlib.suppress(OSError):
            folder.rmdir()  # which an empty one is removed by, and no other
        raise


def _take(lock: int, folder: Path) -> bool:
    """Whether a lock is this process's now, and still lies in its folder; raises OSError."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: what is there is taken for another run's
        if _entries(folder):
            raise UsageError(f"{folder} is of another run, or left from one. If none runs, remove it.") from None
    return os.path.samestat(os.fstat(lock), os.lstat(folder / _LOCK))


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """The entries of a run's folder without its lock."""
    with os.scandir(folder) as entries:
        return [entry for entry in entries if entry.name != _LOCK]


def _disk_bytes(folder: Path) -> int:
    """Bytes of the disk that a folder takes."""
    return 512 * sum(path.lstat().st_blocks for path in folder.rglob("*"))


def clear(folder: Path) -> None:
    """Removes everything from a run's folder but its lock; raises UsageError."""
    for entry in _entries(folder):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)
