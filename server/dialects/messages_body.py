"""Anthropic's conversations as they are sent, and as turns: system text, blocks of messages, tools."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from slimoe.offload.text.generation import Constraint
from slimoe.server.api.forms import ResponseFormat, Schema, constraint_of, format_constraint
from slimoe.server.api.request_body import SamplingBody
from slimoe.server.api.unsupported_fields import COMMON, Unsupported
from slimoe.server.api_error import invalid, unsupported
from slimoe.server.dialects.conversation import (
    check_choice,
    check_tools,
    joined_answers,
    json_text,
    not_text,
    reasoning_values,
    tool_of,
)
from slimoe.server.messages import Call, ChatPrompt, Tool, ToolChoice, Turn

_MODES: Mapping[str, Literal["auto", "none", "required"]] = {
    "auto": "auto",
    "any": "required",
    "tool": "required",
    "none": "none",
}
_EFFORTS = {"xhigh": "high", "max": "high"}
_ELSEWHERE = Unsupported("Anthropic's servers have what it names, and this one does not.")
_OWN = ("stop_sequences", "system", "output_format", "output_config")
UNSUPPORTED: Mapping[str, Unsupported] = {
    **{name: field for name, field in COMMON.items() if name not in _OWN},
    **dict.fromkeys(("container", "mcp_servers"), _ELSEWHERE),
    "thread": Unsupported("This server keeps no conversations. Send the whole of it as messages, without thread."),
    "compaction": Unsupported("This server sums up no conversations. Ask the model for that in a message."),
    "stop": Unsupported("What ends an answer is given in stop_sequences."),
    "max_completion_tokens": Unsupported("The limit of an answer is called max_tokens."),
    "n": Unsupported("There is one answer to a conversation.", (None, 1)),
}


class Block(msgspec.Struct, gc=False):
    """A block of content, of whatever type."""

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: "str | list[Block] | None" = None
    is_error: bool | None = None


class Message(msgspec.Struct, gc=False):
    """A message of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class MessagesTool(msgspec.Struct):
    """A tool of the client's own."""

    name: str
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None


class MessagesToolChoice(msgspec.Struct):
    """`tool_choice`."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(msgspec.Struct):
    """`thinking`; how much is the model's own affair."""

    type: Literal["enabled", "adaptive", "between_tools", "disabled"]


class OutputFormat(msgspec.Struct):
    """The JSON schema that the answer is held to."""

    type: Literal["json_schema"]
    schema: Schema


class OutputConfig(msgspec.Struct):
    """`output_config`."""

    effort: str | None = None
    format: OutputFormat | None = None


class ConversationBody(SamplingBody, kw_only=True):
    """What `/v1/messages` and `/v1/messages/count_tokens` have in common."""

    messages: list[Message]
    model: str | None = None
    system: str | list[Block] | None = None
    tools: list[MessagesTool] | None = None
    tool_choice: MessagesToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None

    def constraint(self) -> Constraint | None:
        """The form of the answer, given in its newer place or its older one; raises ApiError."""
        newer, older = self.output_config and self.output_config.format, self.output_format
        given, param = (newer, "output_config.format") if newer else (older, "output_format")
        if given is None:
            return constraint_of(self)
        return constraint_of(self, format_constraint(ResponseFormat(given.type, schema=given.schema), param))


class MessagesBody(ConversationBody, kw_only=True):
    """`POST /v1/messages`."""

    max_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)]
    stream: bool | None = None
    stop_sequences: list[str] | None = None


def chat_prompt(body: ConversationBody) -> ChatPrompt:
    """The conversation as the engine's side takes it; raises ApiError that names the block at fault."""
    if not body.messages:
        raise invalid("There are no messages. Send at least one.", "messages")
    turns = [] if body.system is None else [Turn("system", _text(body.system, "system"))]
    blocks = [block for message in body.messages if isinstance(message.content, list) for block in message.content]
    names = {block.id: block.name for block in blocks if block.type == "tool_use" and block.id and block.name}
    for n, message in enumerate(body.messages):
        where = f"messages[{n}].content"
        turns += [_answer(message, where)] if message.role == "assistant" else _said(message, where, names)
    choice, tools = _choice(body.tool_choice), _tools(body.tools or ())
    check_choice(choice, tools, "tool_choice")
    effort = body.output_config and body.output_config.effort
    thinks = None if body.thinking is None else body.thinking.type != "disabled"
    values = reasoning_values(_EFFORTS.get(effort, effort) if effort else None, thinks)
    return ChatPrompt(joined_answers(turns), values, tools, choice)


def _said(message: Message, where: str, names: Mapping[str, str]) -> Iterator[Turn]:
    """The turns of a message that is not the assistant's: results of tools each as one, text between them."""
    if isinstance(message.content, str):
        yield Turn(message.role, message.content)
        return
    texts: list[str] = []
    for n, block in enumerate(message.content):
        place = f"{where}[{n}]"
        if block.type != "tool_result":
            texts.append(_text([block], place))
            continue
        if block.tool_use_id is None:
            raise invalid("A tool_result needs the tool_use_id of its call.", f"{place}.tool_use_id")
        if texts:
            yield Turn(message.role, "\n".join(texts))
            texts = []
        result = _text(block.content or "", f"{place}.content")
        if block.is_error:
            result = f"Error: {result}"
        yield Turn("tool", result, call_id=block.tool_use_id, name=names.get(block.tool_use_id, ""))
    if texts or not message.content:
        yield Turn(message.role, "\n".join(texts))


def _answer(message: Message, where: str) -> Turn:
    """What the assistant said, thought and called."""
    if isinstance(message.content, str):
        return Turn("assistant", message.content)
    texts, calls, thoughts = [], [], []
    for n, block in enumerate(message.content):
        place = f"{where}[{n}]"
        if block.type == "tool_use":
            if not block.name or not block.id:
                raise invalid("A tool_use needs a name and an id.", place)
            calls.append(Call(block.name, json_text(block.input or {}, f"{place}.input"), block.id))
        elif block.type == "thinking":
            thoughts.append(block.thinking or "")
        elif block.type != "redacted_thinking":  # which only who wrote it can read
            texts.append(_text([block], place))
    return Turn("assistant", "\n".join(texts), tuple(calls), reasoning="\n".join(thoughts))


def _text(content: str | Sequence[Block], where: str) -> str:
    """The text of blocks of which each is text; `where` is that of a single one, or of the list."""
    if isinstance(content, str):
        return content
    texts = []
    for n, block in enumerate(content):
        place = where if where.endswith("]") else f"{where}[{n}]"
        if block.type != "text":
            raise not_text(block.type, place)
        if block.text is None:
            raise invalid("A text block needs a text.", place)
        texts.append(block.text)
    return "\n".join(texts)


def _tools(given: Sequence[MessagesTool]) -> tuple[Tool, ...]:
    for n, tool in enumerate(given):
        if tool.type not in (None, "custom"):
            raise unsupported(
                f"The tool {tool.name!r} of type {tool.type!r} is Anthropic's own. Describe it with an input_schema.",
                f"tools[{n}].type",
            )
    tools = tuple(
        tool_of(tool.name, tool.description, tool.input_schema, tool.strict, f"tools[{n}].input_schema")
        for n, tool in enumerate(given)
    )
    check_tools(tools)
    return tools


def _choice(given: MessagesToolChoice | None) -> ToolChoice:
    if given is None:
        return ToolChoice()
    if (given.type == "tool") != bool(given.name):
        raise invalid("A tool_choice has a name if it is of the type tool, and only then.", "tool_choice.name")
    # A named tool is called once.
    is_parallel = not given.disable_parallel_tool_use and not given.name
    return ToolChoice(_MODES[given.type], given.name or "", is_parallel)
