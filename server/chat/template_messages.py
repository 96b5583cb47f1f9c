"""What a template's process and the rest of the program say to each other: JSON behind its length."""

import json
from typing import Any

HEADER_BYTES = 4
CONTINUED = "\ufdd2"
"""Marks the end of the message that is to be continued; no client's text has it when it comes to a template."""


def packed(message: dict[str, Any]) -> bytes:
    """One message as it goes over the pipe."""
    body = json.dumps(message, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return len(body).to_bytes(HEADER_BYTES, "big") + body


def unpacked(body: bytes) -> dict[str, Any]:
    """The message that stands behind a length."""
    message: dict[str, Any] = json.loads(body.decode("utf-8", "surrogatepass"))
    return message
