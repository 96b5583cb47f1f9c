"""A folder of a prompt cache's records, of bounded size, which several processes may share.

A record appears under its name when it is whole, and nobody needs to know the others: it is there or not. The one that
was used longest ago goes first. What has another name is never touched.
"""

import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from slimoe.offload.files.private_folder import make_private
from slimoe.offload.files.regular_file import open_regular, reason
from slimoe.offload.memory.contents import Bytes
from slimoe.offload.memory.prompt_record import RecordName, TextKeys, content_of, digest, file_bytes

Tell = Callable[[str], None]

_PART = re.compile(r"(.+)\.[0-9a-f]{8}\.part")
_PART_SECONDS = 600
"""A record that is not whole after such a time belongs to a process that has ended."""
_FULL, _PRUNED = 0.95, 0.9
"""Shares of the bound: above the first records are removed, down to the second. What lies between is for what other
processes write before this one looks again."""
_LOOK_SHARE = 0.02
"""This process looks again after it has written such a share of the bound."""


class PromptFolder:
    """The records in the folder `path`, of at most `most_bytes`; problems with files are told to `tell`, once each.

    Raises UsageError where there can be no such folder, or other users could write to it.
    """

    def __init__(self, path: Path, most_bytes: int, tell: Tell) -> None:
        make_private(path, "--prompt-cache")
        self.path, self._most_bytes, self._tell = path, most_bytes, tell
        self._bad: set[str] = set()
        self._n_bytes = self._unseen_bytes = 0
        self._make_room(0)  # another run may have left more than this one is to have

    def has(self, name: RecordName, used_ns: int | None = None) -> bool:
        """Whether a record is there that was never found damaged; with `used_ns` it was used at that time."""
        path = self.path / str(name)
        if str(name) in self._bad:
            return False
        try:
            if used_ns is not None:
                os.utime(path, ns=(used_ns, used_ns))
                return True
            return stat.S_ISREG(os.stat(path).st_mode)
        except OSError:
            return False

    def names(self, keys: TextKeys) -> list[RecordName]:
        """All records of beginnings of a text."""
        with suppress(OSError), os.scandir(self.path) as entries:
            found = (RecordName.parse(entry.name) for entry in entries)
            return [name for name in found if name is not None and keys.is_of(name)]
        return []

    def read(self, name: RecordName, head: bytes, n_bytes: int) -> Bytes | None:
        """A record's content, if the file is whole and what it is called; else it counts as missing from now on."""
        try:
            with open_regular(self.path / str(name)) as file:
                data = file.read(file_bytes(head, n_bytes) + 1)
            content = content_of(data, head, n_bytes)
            problem = "it is damaged or cut off, or no record of this model"
        except FileNotFoundError:
            return None
        except OSError as error:
            content, problem = None, reason(error)
        except MemoryError:
            return None
        if content is None and str(name) not in self._bad:
            self._bad.add(str(name))
            self._tell(f"Prompt cache: {name} is ignored ({problem}).")
        return content

    def write(self, name: RecordName, head: bytes, content: Bytes, used_ns: int) -> None:
        """Writes a record that was used at a time, for which older ones may go; raises OSError."""
        n_bytes = file_bytes(head, content.nbytes)
        if not self._make_room(n_bytes):
            return
        part = self.path / f"{name}.{secrets.token_hex(4)}.part"
        try:
            with open(part, "xb", buffering=0, opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
                for piece in (head, content.data, digest(head, content)):
                    _write_all(file.fileno(), memoryview(piece))
                os.utime(file.fileno(), ns=(used_ns, used_ns))
            os.replace(part, self.path / str(name))
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)
        self._bad.discard(str(name))
        self._n_bytes += n_bytes
        self._unseen_bytes += n_bytes

    def remove(self, names: Iterable[RecordName]) -> None:
        """Removes records."""
        for name in names:
            with suppress(OSError):
                (self.path / str(name)).unlink(missing_ok=True)

    def _make_room(self, n_bytes: int) -> bool:
        """Removes what was used longest ago until so many bytes fit; whether they can."""
        most, unseen = _FULL * self._most_bytes, self._unseen_bytes
        if self._n_bytes and self._n_bytes + n_bytes <= most and unseen < _LOOK_SHARE * self._most_bytes:
            return True
        records, self._n_bytes = self._look()
        self._unseen_bytes = 0
        if self._n_bytes + n_bytes > most:
            for _, _, size, path in sorted(records):
                if self._n_bytes + n_bytes <= _PRUNED * self._most_bytes:
                    break
                with suppress(OSError):
                    path.unlink(missing_ok=True)
                    self._n_bytes -= size
        return self._n_bytes + n_bytes <= most

    def _look(self) -> tuple[list[tuple[int, int, int, Path]], int]:
        """When each record was used last, its end counted backwards, bytes and path; and the bytes of all.

        What processes that have ended left unfinished is removed.
        """
        records, n_bytes = [], 0
        with os.scandir(self.path) as entries:
            for entry in entries:
                part = _PART.fullmatch(entry.name)
                name = RecordName.parse(entry.name if part is None else part[1])
                if name is None or not entry.is_file(follow_symlinks=False):
                    continue
                try:
                    status = entry.stat(follow_symlinks=False)
                except OSError:
                    continue
                if part is None:
                    records.append((status.st_mtime_ns, -name.n_tokens, status.st_size, self.path / entry.name))
                elif time.time() - status.st_mtime > _PART_SECONDS:
                    with suppress(OSError):
                        os.unlink(entry.path)
                    continue
                n_bytes += status.st_size
        return records, n_bytes


def _write_all(descriptor: int, data: memoryview) -> None:
    """Writes all of the bytes."""
    while len(data):
        data = data[os.write(descriptor, data) :]
