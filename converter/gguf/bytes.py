"""Reads stretches of files at given places, with errors that name the file; samples them to tell models apart."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from slimoe.offload.errors import ModelFileError
from slimoe.offload.files.regular_file import read_regular, reason


def read_bytes(path: Path, offset: int, n_bytes: int) -> NDArray[np.uint8]:
    """`n_bytes` bytes of a file from `offset` on; raises ModelFileError when they cannot be read."""
    data = np.empty(n_bytes, np.uint8)
    try:
        with path.open("rb", buffering=0) as file:
            view = data.data
            while view:
                n_read = os.preadv(file.fileno(), [view], offset)
                if n_read == 0:
                    problem = "the file became shorter while it was read."
                    raise ModelFileError(path, problem, "Download the model again.")
                view, offset = view[n_read:], offset + n_read
    except OSError as error:
        raise ModelFileError(path, f"the file cannot be read ({reason(error)}).") from None
    return data


def all_bytes(path: Path) -> bytes:
    """A small file; raises ModelFileError when it cannot be read."""
    try:
        return read_regular(path)
    except OSError as error:
        raise ModelFileError(path, f"the file cannot be read ({reason(error)}).") from None


_SAMPLE_BYTES = 4096


class Digest(Protocol):
    """One of hashlib's."""

    def update(self, data: bytes, /) -> None:
        """More bytes to cover."""
        ...


def add_samples(digest: Digest, stretches: Iterable[tuple[Path, int, int]]) -> None:
    """Covers the first 4096 bytes of each stretch (file, offset, bytes) of files; raises ModelFileError.

    Training touches every tensor that it changes everywhere, so that a fine-tuned model differs from its origin here,
    and a few megabytes are read of a model of any size.
    """
    for path, offset, n_bytes in stretches:
        digest.update(read_bytes(path, offset, min(n_bytes, _SAMPLE_BYTES)).tobytes())
