"""Reserves the files that a command is to write, and tells what interrupted runs have left beside them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slimoe.offload.files.whole_file import Destination, abandoned
from slimoe.offload.resources.memory import human
from slimoe.server.telling import tell

_ADVICE = "The same command takes them up, or clears them away; rm -r does too."


@contextmanager
def reserve(target: Path, *, resumes: bool = False) -> Iterator[Destination]:
    """Reserves `target` for this run while the block runs, as `Destination` does; tells what other runs have left."""
    with Destination(target, resumes=resumes) as destination:
        if destination.left_bytes and not resumes:
            size = human(destination.left_bytes)
            tell(f"{destination.folder}: {size} of a run that was interrupted were removed.")
        for left in abandoned(destination.folder.parent):
            if left.n_bytes:
                tell(f"{left.folder}: {human(left.n_bytes)} are left of an interrupted run. {_ADVICE}")
        yield destination


@contextmanager
def unwritten(target: Path) -> Iterator[None]:
    """Says, when Ctrl-C ends the block, that `target` was not written."""
    try:
        yield
    except KeyboardInterrupt:
        tell(f"Interrupted: {target} was not written, and no part of it is left.")
        raise
