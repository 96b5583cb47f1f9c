"""What tells models apart whose files have the same sizes, names and shapes: a few bytes of every tensor."""

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from slimoe.converter.gguf.bytes import read_bytes

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
