"""What the conversations of several dialects have in common: JSON as text, tools, and answers in several pieces."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from slimoe.server.api_error import ApiError, invalid, unsupported
from slimoe.server.chat.history import MAX_DEPTH, is_deeper
from slimoe.server.messages import Tool, ToolChoice, Turn

MAX_TOOLS, MAX_NAME = 256, 128
_NAME = re.compile(rf"[a-zA-Z0-9_.-]{{1,{MAX_NAME}}}")


def joined_answers(turns: Iterable[Turn]) -> tuple[Turn, ...]:
    """The turns, with what the assistant said, thought and called in a row as one."""
    joined: list[Turn] = []
    for turn in turns:
        if joined and joined[-1].role == turn.role == "assistant":
            last = joined.pop()
            turn = Turn(
                "assistant",
                "\n".join(filter(None, (last.content, turn.content))),
                (*last.calls, *turn.calls),
                reasoning="\n".join(filter(None, (last.reasoning, turn.reasoning))),
            )
        joined.append(turn)
    return tuple(joined)


def json_text(value: Any, where: str) -> str:
    """A value of a body as JSON text, as models write it; raises ApiError for one that is nested too deeply."""
    if is_deeper(value, MAX_DEPTH):
        raise invalid(f"{where} is nested more than {MAX_DEPTH} deep.", where)
    return json.dumps(value, ensure_ascii=False)


def json_object(text: str) -> dict[str, Any]:
    """The object that a call's arguments are; what is none, as an answer cut short leaves it, under `arguments`."""
    try:
        value = msgspec.json.decode(text or "{}")
    except (msgspec.DecodeError, RecursionError):
        value = text
    return value if isinstance(value, dict) else {"arguments": value}


def tool_of(
    name: str, description: str | None, parameters: Mapping[str, Any] | None, strict: bool | None, place: str
) -> Tool:
    """A tool whose schema stands in the field `place`; raises ApiError for one that is nested too deeply."""
    return Tool(name, description or "", json_text(parameters or {}, place), bool(strict), place)


def check_tools(tools: Sequence[Tool]) -> None:
    """Raises ApiError for tools that cannot be called; a tool's name stands beside its schema."""
    if len(tools) > MAX_TOOLS:
        raise invalid(f"{len(tools):,} tools are too many: {MAX_TOOLS} are allowed.", tools[0].place.partition("[")[0])
    names: set[str] = set()
    for tool in tools:
        where = f"{tool.place.rpartition('.')[0]}.name"
        if not _NAME.fullmatch(tool.name):
            raise invalid(
                f"The name of a tool has up to {MAX_NAME} letters, digits, dots, dashes and underscores, which "
                f"{tool.name[:MAX_NAME]!r} has not.",
                where,
            )
        if tool.name in names:
            raise invalid(f"Two tools have the name {tool.name!r}.", where)
        names.add(tool.name)


def check_choice(choice: ToolChoice, tools: Sequence[Tool], where: str) -> None:
    """Raises ApiError for a demand of tools that are not there."""
    if choice.mode == "required" and not tools:
        raise invalid(f"{where} demands a call, but there are no tools.", where)
    if choice.name and choice.name not in {tool.name for tool in tools}:
        raise invalid(f"{where} names {choice.name!r}, which is none of the tools.", where)


def reasoning_values(effort: str | None, thinks: bool | None = None) -> dict[str, Any]:
    """What the chat template is told of reasoning: how much, and whether at all, which an effort of none denies."""
    thinks = False if effort == "none" and thinks is None else thinks
    values = {"reasoning_effort": effort or None, "enable_thinking": thinks}
    return {name: value for name, value in values.items() if value is not None}


def told(error: ApiError) -> str:
    """The message of an error where no other field names what is at fault."""
    param = error.info.param
    return error.message if param is None or param in error.message else f"{error.message} ({param})"


def not_text(kind: str, where: str) -> ApiError:
    """The refusal of what is no text."""
    return unsupported(f"This model reads text only, not a part of type {kind!r}.", where)
