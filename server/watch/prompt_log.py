"""Prompts and answers in files, for those who ask for that: one file for each request, which only its owner reads."""

import errno
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from slimoe.offload.errors import UsageError
from slimoe.offload.files.regular_file import reason
from slimoe.server.log_format import JOURNAL
from slimoe.server.watch.record import RequestRecord

MOST_FILES = 10_000
"""In the folder; for each further one the oldest goes."""
MOST_BYTES = 16 << 20
"""Of one file; what is larger is not written, as if the folder could not take it."""


class PromptLog:
    """A folder with a file of JSON for each generation."""

    def __init__(self, folder: Path, most_files: int = MOST_FILES) -> None:
        """Makes the folder; raises UsageError where no file can be written."""
        self._folder, self._most_files = folder, most_files
        self._has_failed = False
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._names = sorted(path.name for path in folder.glob("*.json"))
        except OSError as error:
            raise UsageError(f"--log-prompts {folder} cannot be written to ({reason(error)}).") from None
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UsageError(f"--log-prompts {folder} cannot be written to (permission denied).")

    def write(self, record: RequestRecord, prompts: Sequence[Any], answers: Sequence[dict[str, Any]]) -> None:
        """Writes what one request asked, and was answered so far; a failure is told once and harms nobody."""
        about = {"id": record.id, "path": record.path, "model": record.model, "time": time.time()}
        name = f"{time.time_ns()}-{record.id}.json"
        try:
            data = msgspec.json.encode({**about, "prompts": list(prompts), "answers": list(answers)})
            if len(data) > MOST_BYTES:
                raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            with open(os.open(self._folder / name, flags, 0o600), "wb") as file:
                file.write(data)
            self._names.append(name)
            while len(self._names) > self._most_files:
                (self._folder / self._names.pop(0)).unlink(missing_ok=True)
        except (OSError, UnicodeError) as error:
            if not self._has_failed:
                JOURNAL.tell(f"Prompts cannot be written to {self._folder} ({error}).", "warning")
            self._has_failed = True
