"""The tasks that experts of a file were merged for, as its header has them: what their texts do not use is lost."""

from collections.abc import Mapping
from pathlib import Path

import msgspec

from slimoe.converter.document import BadDocumentError, decode_json
from slimoe.offload.gguf.header import Value
from slimoe.offload.gguf.keys import SPECIALISED


class Task(msgspec.Struct, frozen=True):
    """A task's text: how many `tokens` were measured, and a digest of them."""

    tokens: int
    sha256: str


def tasks_of(metadata: Mapping[str, Value]) -> dict[str, Task]:
    """The tasks by their texts' names, the last one last; none where the header names none that can be read."""
    try:
        return decode_json(str(metadata.get(SPECIALISED, "{}")).encode(), dict[str, Task])
    except BadDocumentError:
        return {}


def task_key(metadata: Mapping[str, Value], text: str, task: Task) -> dict[str, Value]:
    """The header's key of a file that is made for the task of `text` of one that has `metadata`.

    Where the text lies is not told.
    """
    name, before = Path(text).name, tasks_of(metadata)
    before.pop(name, None)
    return {SPECIALISED: msgspec.json.encode({**before, name: task}).decode()}


def task_note(metadata: Mapping[str, Value]) -> str | None:
    """A sentence on what is lost in a file that was made for a task; None of any other."""
    names = " and ".join(tasks_of(metadata))
    return f"Made for one task: what {names} does not use is lost." if names else None
