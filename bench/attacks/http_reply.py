"""Reads the answers to hostile requests as strictly as a good client would, and says what is wrong with them."""

import json
from dataclasses import dataclass
from typing import Any, NoReturn

_TEXT_PATHS = (b"# HELP",)


class BadReplyError(Exception):
    """An answer that no client could parse."""


@dataclass(frozen=True, slots=True)
class HttpReply:
    """One answer: its status, its headers by lower-case name, and its body."""

    status: int
    headers: dict[str, str]
    body: bytes


def split_replies(data: bytes, method: str = "POST") -> list[HttpReply]:
    """All answers on a connection that the server has closed; raises BadReplyError."""
    replies = []
    while data:
        reply, data = _first(data, method)
        if reply.status >= 200:  # what comes before, as 100 Continue, is no answer
            replies.append(reply)
    return replies


def _first(data: bytes, method: str) -> tuple[HttpReply, bytes]:
    head, mark, rest = data.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    parts = lines[0].split(" ", 2)
    if not mark or len(parts) < 2 or not parts[0].startswith("HTTP/") or not parts[1].isdigit():
        raise BadReplyError(f"no status line: {data[:80]!r}")
    headers = {}
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        if not colon or not name or name != name.strip() or not value.isprintable():
            raise BadReplyError(f"a bad header: {line!r}")
        headers[name.lower()] = value.strip()
    status = int(parts[1])
    if method == "HEAD":  # of a line that it cannot read the server does not know the method, and may write a body
        return HttpReply(status, headers, b""), b""
    if status in (204, 304) or status < 200:
        return HttpReply(status, headers, b""), rest
    if headers.get("transfer-encoding") == "chunked":
        body, rest = _dechunked(rest)
    elif "content-length" in headers:
        length = int(headers["content-length"])
        if len(rest) < length:
            raise BadReplyError(f"a body of {len(rest)} bytes where {length} were announced")
        body, rest = rest[:length], rest[length:]
    else:
        body, rest = rest, b""
    return HttpReply(status, headers, body), rest


def _dechunked(data: bytes) -> tuple[bytes, bytes]:
    parts: list[bytes] = []
    while True:
        line, mark, data = data.partition(b"\r\n")
        try:
            length = int(line, 16)
        except ValueError:
            length = -1
        if not mark or length < 0 or data[length : length + 2] != b"\r\n":
            raise BadReplyError("a chunk is cut off")
        if not length:
            return b"".join(parts), data[2:]
        parts.append(data[:length])
        data = data[length + 2 :]


def fault_of(reply: HttpReply, method: str = "POST") -> str | None:
    """How an answer breaks what the API promises, None if it does not."""
    if reply.status >= 500 and not (reply.status == 503 and "retry-after" in reply.headers):
        return f"status {reply.status}: {reply.body[:300].decode('utf-8', 'replace')}"
    if method == "HEAD" or reply.status == 204:
        return None
    if reply.headers.get("content-type", "").startswith("text/event-stream"):
        return stream_fault(reply.body)
    if reply.status == 200 and reply.body.startswith(_TEXT_PATHS):
        return None
    try:
        document = strict_json(reply.body)
    except ValueError as error:
        return f"a body that is no JSON ({error}): {reply.body[:80]!r}, status {reply.status}"
    if not isinstance(document, dict):
        return "a body that is no object"
    return error_fault(document) if reply.status >= 400 else None


def error_fault(document: dict[str, Any]) -> str | None:
    """What is wrong with the JSON document of an error, None if nothing is."""
    error = document.get("error")
    if not isinstance(error, dict) or not isinstance(error.get("message"), str) or not error["message"].strip():
        return "an error without a message"
    if not isinstance(error.get("type"), str) or not isinstance(error.get("code"), str | None):
        return "an error whose type or code is no text"
    if any(not character.isprintable() and character != "\n" for character in error["message"]):
        return f"a control character in a message: {error['message'][:80]!r}"
    return None


def stream_fault(body: bytes) -> str | None:
    """What is wrong with the body of a stream of events, None if nothing is."""
    blocks = body.decode("utf-8", "replace").split("\n\n")
    events = [block.partition("data: ")[2] for block in blocks if "data: " in block]
    if not events:
        return "a stream without events"
    try:
        documents = [strict_json(event.encode()) for event in events if event != "[DONE]"]
    except ValueError:
        return "an event that is no JSON"
    if events[-1] == "[DONE]":
        return None
    return error_fault(documents[-1]) if documents and isinstance(documents[-1], dict) else "a stream without an end"


def strict_json(data: bytes) -> Any:
    """Reads a JSON document; raises ValueError, also for NaN, infinities and lone surrogates."""
    document = json.loads(data.decode("utf-8"), parse_constant=_refuse)
    json.dumps(document, ensure_ascii=False).encode("utf-8")
    return document


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
