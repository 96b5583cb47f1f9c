"""Folders for what nobody else is to read."""

import stat
from pathlib import Path

from slimoe.offload.errors import UsageError
from slimoe.offload.files.regular_file import reason


def make_private(path: Path, flag: str) -> None:
    """Makes a folder that only its owner can read, if there is none.

    Raises UsageError, which names the `flag`, where there can be no folder or everybody may write to it.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = path.stat().st_mode
    except OSError as error:
        raise UsageError(f"{flag}: {path} cannot be a folder ({reason(error)}). Choose another.") from None
    if mode & stat.S_IWOTH:
        raise UsageError(f"{flag}: everybody may write to {path}. Choose a folder of your own.")
