"""A conversation as clients send it, and as turns: nothing that was said gets lost on the way.

Calls of tools keep their names, their ids, and their arguments as they were sent; a tool's answer names its call. How a
model's template shows them is decided where it is rendered, see `slimoe.server.chat.template_forms`. A refusal is what
the assistant said. Its reasoning is kept beside that, or in its place where it is all there is.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from slimoe.server.api_error import ApiError, invalid, unsupported
from slimoe.server.messages import Call, Turn

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
MAX_MESSAGES, MAX_PARTS = 16_384, 16_384
MAX_DEPTH = 64
"""Of lists and objects in each other, in the arguments of a call and the schema of a tool."""
_OLD_NAMES = {"function": "tool"}
_TEXT_PARTS = ("text", "input_text", "output_text")


class Function(msgspec.Struct, gc=False):
    """A function's name and its arguments: JSON in a text, as OpenAI has it, or an object."""

    name: str
    arguments: str | dict[str, Any] | None = None


class CustomTool(msgspec.Struct, gc=False):
    """A call whose input is plain text."""

    name: str
    input: str | None = None


class ToolCall(msgspec.Struct, gc=False):
    """One entry of `tool_calls`."""

    id: str | None = None
    type: str | None = None
    function: Function | None = None
    custom: CustomTool | None = None


class Part(msgspec.Struct, gc=False):
    """One part of a message."""

    type: str
    text: str | None = None
    refusal: str | None = None


class Message(msgspec.Struct, gc=False):
    """One chat message; `content` is a text, a list of parts, or null where something else was said."""

    role: str
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    function_call: Function | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: Any = None
    images: Any = None
    audio: Any = None


def turns(messages: Sequence[Message]) -> tuple[Turn, ...]:
    """The conversation as turns; raises ApiError that names the message at fault."""
    if not messages:
        raise invalid("There are no messages. Send at least one.", "messages")
    if len(messages) > MAX_MESSAGES:
        raise invalid(f"{len(messages):,} messages are too many: {MAX_MESSAGES:,} are allowed.", "messages")
    calls = [call for message in messages for call in message.tool_calls or ()]
    names = {call.id: called.name for call in calls if call.id and (called := call.function or call.custom)}
    found = tuple(_turn(f"messages[{n}]", message, names) for n, message in enumerate(messages))
    if len(found) > 1 and found[-1].role == found[-2].role == "assistant":
        raise invalid(
            "The last two messages are both the assistant's. Join them to have the last continued.", "messages"
        )
    return found


def _turn(where: str, message: Message, names: dict[str, str]) -> Turn:
    if message.role not in ROLES:
        raise invalid(f"The role {message.role!r} is not one of {', '.join(ROLES)}.", f"{where}.role")
    role = _OLD_NAMES.get(message.role, message.role)
    for name, value in (("images", message.images), ("audio", message.audio)):
        if value:
            raise _not_text(name, f"{where}.{name}")
    calls = tuple(_calls(where, message, role))
    text = _text(where, message)
    if text is None and not calls:
        raise invalid("A message needs content.", f"{where}.content")
    id = message.tool_call_id or ""
    name = message.name or (names.get(id, "") if role == "tool" else "")
    reasoning = message.reasoning_content or message.reasoning
    is_said = role == "assistant" and isinstance(reasoning, str) and reasoning != text
    return Turn(role, text or "", calls, id if role == "tool" else "", name, reasoning if is_said else "")


def _text(where: str, message: Message) -> str | None:
    """What was said in words; None for nothing at all."""
    content = message.content
    texts = [content] if isinstance(content, str) else []
    parts = content if isinstance(content, list) else []
    if len(parts) > MAX_PARTS:
        raise invalid(f"{len(parts):,} parts are too many: {MAX_PARTS:,} are allowed.", f"{where}.content")
    for n, part in enumerate(parts):
        text = part.refusal if part.type == "refusal" else part.text
        if part.type not in (*_TEXT_PARTS, "refusal"):
            raise _not_text(part.type, f"{where}.content[{n}]")
        if text is None:
            raise invalid("A text part needs a text.", f"{where}.content[{n}]")
        texts.append(text)
    if message.refusal:
        texts.append(message.refusal)
    reasoning = message.reasoning_content or message.reasoning
    if not texts and not message.tool_calls and not message.function_call and isinstance(reasoning, str) and reasoning:
        texts.append(reasoning)
    return "\n".join(texts) if texts or content is not None else None


def _not_text(kind: str, where: str) -> ApiError:
    return unsupported(f"This model reads text only, not a part of type {kind!r}.", where)


def _calls(where: str, message: Message, role: str) -> Iterator[Call]:
    calls = list(message.tool_calls or ())
    if message.function_call is not None:
        calls.append(ToolCall(function=message.function_call))
    if calls and role != "assistant":
        raise invalid(
            f"A message of the role {role} has tool calls, which only the assistant makes.", f"{where}.tool_calls"
        )
    for n, call in enumerate(calls):
        place = f"{where}.tool_calls[{n}]"
        if call.function is not None:
            arguments = _arguments(call.function.arguments, f"{place}.function.arguments")
            yield Call(call.function.name, arguments, call.id or "")
        elif call.custom is not None:
            yield Call(
                call.custom.name, json.dumps({"input": call.custom.input or ""}, ensure_ascii=False), call.id or ""
            )
        else:
            raise unsupported(f"A call of type {call.type!r} is not known. Send one with a function.", place)


def _arguments(given: str | dict[str, Any] | None, where: str) -> str:
    """The arguments as they were sent, which need not be JSON; none at all are an empty object."""
    try:
        value = msgspec.json.decode(given) if isinstance(given, str) and given else given
        is_too_deep = is_deeper(value, MAX_DEPTH)
    except (msgspec.DecodeError, UnicodeError):
        is_too_deep = False
    except RecursionError:
        is_too_deep = True
    if is_too_deep:
        raise invalid(f"The arguments of a tool call are nested more than {MAX_DEPTH} deep.", where)
    return given if isinstance(given, str) and given else json.dumps(given or {}, ensure_ascii=False)


def is_deeper(value: object, most: int) -> bool:
    """Whether a JSON value holds lists and objects in each other more than `most` deep."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return inner is not None and (most == 0 or any(is_deeper(element, most - 1) for element in inner))
