"""What a template's process and the rest of the program say to each other: JSON behind its length."""

import json
from dataclasses import dataclass
from typing import Any, NamedTuple

HEADER_BYTES = 4
CONTINUED = "\ufdd2"
"""Marks the end of the message that is to be continued; no client's text has it when it comes to a template."""


@dataclass(frozen=True, slots=True)
class TemplateCaps:
    """What a template does with tools; the default is one that knows none.

    `tools` are described by it. `calls` tells whether it shows calls with their results, and whether it wants their
    arguments as an object or a text. It shows several calls in one message if `is_parallel`, and their ids if
    `shows_ids`; with `has_short_ids` they must be nine letters and digits. `reasoning` is the field of a message in
    which it reads reasoning, or chunk for a part of the content.
    """

    tools: bool = False
    calls: str = ""
    is_parallel: bool = False
    shows_ids: bool = False
    has_short_ids: bool = False
    reasoning: str = ""


NO_TOOLS = TemplateCaps()
"""Of a template that does nothing with tools."""


class Rendered(NamedTuple):
    """The text of a conversation, and whether the tools are described in the plain form in it."""

    text: str
    has_plain_tools: bool = False


def packed(message: dict[str, Any]) -> bytes:
    """One message as it goes over the pipe."""
    body = json.dumps(message, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return len(body).to_bytes(HEADER_BYTES, "big") + body


def unpacked(body: bytes) -> dict[str, Any]:
    """The message that stands behind a length."""
    message: dict[str, Any] = json.loads(body.decode("utf-8", "surrogatepass"))
    return message
