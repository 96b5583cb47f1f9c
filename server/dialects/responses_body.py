"""OpenAI's Responses as they are asked for: items made into turns, tools, and what is refused."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta

from slimoe.offload.text.generation import Constraint
from slimoe.server.api.forms import ResponseFormat, constraint_of, format_constraint
from slimoe.server.api.request_body import LogprobCount, SamplingBody
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

ROLES = ("system", "developer", "user", "assistant")
LOGPROBS = "message.output_text.logprobs"
_TEXTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text", "refusal")
_STORED = Unsupported("This server keeps no answers. Send the whole conversation as input.")
_LIMIT = Unsupported("The limit of an answer is called max_output_tokens.")
_OWN = ("instructions", "max_output_tokens", "text")
UNSUPPORTED: Mapping[str, Unsupported] = {
    **{name: field for name, field in COMMON.items() if name not in _OWN},
    **dict.fromkeys(("previous_response_id", "conversation", "background"), _STORED),
    **dict.fromkeys(("max_tokens", "max_completion_tokens", "n_predict"), _LIMIT),
    "prompt": Unsupported("This server has no prompts of its own. Send the text as instructions."),
    "messages": Unsupported("The conversation is called input."),
    "n": Unsupported("There is one answer to a conversation.", (None, 1)),
    "functions": Unsupported("Functions are given in tools."),
    "moderation": Unsupported("This server judges no texts."),
}


class ItemPart(msgspec.Struct, gc=False):
    """A part of an item's content."""

    type: str
    text: str | None = None
    refusal: str | None = None


class InputItem(msgspec.Struct, gc=False):
    """An item of `input`: a message, unless `type` says that it is something else."""

    type: str | None = None
    role: str | None = None
    content: str | list[ItemPart] | None = None
    call_id: str | None = None
    name: str | None = None
    namespace: str | None = None
    arguments: str | None = None
    input: str | None = None
    output: str | list[ItemPart] | None = None
    summary: list[ItemPart] | None = None


class ResponsesTool(msgspec.Struct, omit_defaults=True):
    """A function that the client carries out, or a namespace of such `tools`."""

    type: str
    name: str = ""
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    tools: "list[ResponsesTool] | None" = None


class Function(NamedTuple):
    """A function that may be called, where it stands in the body, and the namespace that it is in."""

    where: str
    tool: ResponsesTool
    namespace: str = ""

    @property
    def name(self) -> str:
        """What the model calls it by."""
        return full_name(self.namespace, self.tool.name)


class NamedTool(msgspec.Struct, omit_defaults=True):
    """A tool by its name."""

    type: str = "function"
    name: str = ""


class ResponsesToolChoice(msgspec.Struct, omit_defaults=True):
    """`tool_choice` where it is more than a word: a function, or which of the tools may be called."""

    type: str
    name: str | None = None
    mode: Literal["auto", "required"] | None = None
    tools: list[NamedTool] | None = None


class TextFormat(msgspec.Struct, omit_defaults=True):
    """`text.format`."""

    type: str
    name: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class TextConfig(msgspec.Struct, omit_defaults=True):
    """`text`."""

    format: TextFormat | None = None


class ReasoningConfig(msgspec.Struct, omit_defaults=True):
    """`reasoning`."""

    effort: str | None = None


class InputBody(SamplingBody, kw_only=True):
    """What `/v1/responses` and `/v1/responses/input_tokens` have in common."""

    input: str | list[InputItem]
    model: str | None = None
    instructions: str | None = None
    tools: list[ResponsesTool] | None = None
    tool_choice: Literal["auto", "none", "required"] | ResponsesToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None

    def callable_tools(self) -> list[Function]:
        """The functions of `tools`, those in namespaces as well; raises ApiError for other tools."""
        functions = []
        for n, tool in enumerate(self.tools or ()):
            if tool.type == "namespace" and tool.name:
                inner = enumerate(tool.tools or ())
                functions += [Function(f"tools[{n}].tools[{number}]", one, tool.name) for number, one in inner]
            else:
                functions.append(Function(f"tools[{n}]", tool))
        for where, tool, _ in functions:
            if tool.type != "function":
                raise unsupported(
                    f"The tool {tool.type!r} is not one that this server has. Functions alone can be called.",
                    f"{where}.type",
                )
            if not tool.name:
                raise invalid("A function needs a name.", f"{where}.name")
        return functions


class ResponsesBody(InputBody, kw_only=True):
    """`POST /v1/responses`."""

    stream: bool | None = None
    max_output_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    stop: str | list[str] | None = None
    top_logprobs: LogprobCount | None = None
    include: list[str] | None = None
    metadata: dict[str, Any] | None = None
    user: str | None = None
    return_progress: bool | None = None
    timings_per_token: bool | None = None

    def constraint(self) -> Constraint | None:
        """The form of the answer; raises ApiError."""
        given = self.text and self.text.format
        if not given:
            return constraint_of(self)
        schema = msgspec.Raw(msgspec.json.encode(given.schema))
        return constraint_of(self, format_constraint(ResponseFormat(given.type, schema=schema), "text.format"))

    @property
    def n_logprobs(self) -> int | None:
        """How many likeliest tokens to tell of; None for no scores at all."""
        return self.top_logprobs or 0 if self.top_logprobs or LOGPROBS in (self.include or ()) else None


def full_name(namespace: str | None, name: str | None) -> str:
    """What the model calls a function by, wherever it stands."""
    return f"{namespace}__{name}" if namespace else name or ""


def chat_prompt(body: InputBody) -> ChatPrompt:
    """The conversation as the engine's side takes it; raises ApiError that names the item at fault."""
    turns = [Turn("system", body.instructions)] if body.instructions else []
    if isinstance(body.input, str):
        turns.append(Turn("user", body.input))
    else:
        called = [item for item in body.input if item.call_id and item.name]
        names = {item.call_id or "": full_name(item.namespace, item.name) for item in called}
        for n, item in enumerate(body.input):
            turns += _turns(item, f"input[{n}]", names)
    if not turns:
        raise invalid("There is nothing to answer. Send at least one message.", "input")
    tools, choice = _chosen(body)
    values = reasoning_values(None if body.reasoning is None else body.reasoning.effort)
    return ChatPrompt(joined_answers(turns), values, tools, choice)


def _turns(item: InputItem, where: str, names: Mapping[str, str]) -> Iterator[Turn]:
    """What an item adds to the conversation: a turn, or a piece of the assistant's; none for reasoning kept secret."""
    match item.type:
        case "message" | None:
            if item.role not in ROLES:
                raise invalid(f"The role {item.role!r} is not one of {', '.join(ROLES)}.", f"{where}.role")
            if item.content is None:
                raise invalid("A message needs content.", f"{where}.content")
            yield Turn(item.role, _text(item.content, f"{where}.content"))
        case "function_call" | "custom_tool_call":
            if not item.name or not item.call_id:
                raise invalid(f"A {item.type} needs a name and a call_id.", where)
            custom = json_text({"input": item.input or ""}, where)
            arguments = custom if item.type == "custom_tool_call" else item.arguments or "{}"
            yield Turn("assistant", "", (Call(full_name(item.namespace, item.name), arguments, item.call_id),))
        case "function_call_output" | "custom_tool_call_output":
            if not item.call_id or item.output is None:
                raise invalid(f"A {item.type} needs a call_id and an output.", where)
            output = _text(item.output, f"{where}.output")
            yield Turn("tool", output, call_id=item.call_id, name=names.get(item.call_id, ""))
        case "reasoning":
            reasoning = _text(item.content or item.summary or "", f"{where}.content")
            if reasoning:
                yield Turn("assistant", "", reasoning=reasoning)
        case "item_reference":
            raise unsupported("This server keeps no items. Send the item itself.", where)
        case _:
            raise unsupported(f"Items of type {item.type!r} come from tools that this server does not have.", where)


def _text(content: str | Sequence[ItemPart], where: str) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for n, part in enumerate(content):
        text = part.refusal if part.type == "refusal" else part.text
        if part.type not in _TEXTS:
            raise not_text(part.type, f"{where}[{n}]")
        if text is None:
            raise invalid(f"A part of type {part.type} needs a text.", f"{where}[{n}]")
        texts.append(text)
    return "\n".join(texts)


def _chosen(body: InputBody) -> tuple[tuple[Tool, ...], ToolChoice]:
    """The tools that may be called, and whether one must be."""
    tools = tuple(
        tool_of(one.name, one.tool.description, one.tool.parameters, one.tool.strict, f"{one.where}.parameters")
        for one in body.callable_tools()
    )
    check_tools(tools)
    given, is_parallel = body.tool_choice, body.parallel_tool_calls is not False
    if not isinstance(given, ResponsesToolChoice):
        choice = ToolChoice(given or "auto", is_parallel=is_parallel)
    elif given.type == "function" and given.name:
        # A named tool is called once.
        choice = ToolChoice("required", given.name, is_parallel=False)
    elif given.type == "allowed_tools" and given.tools is not None:
        known, allowed = {tool.name for tool in tools}, [tool.name for tool in given.tools]
        unknown = next((n for n, name in enumerate(allowed) if name not in known), None)
        if unknown is not None:
            raise invalid("An allowed tool is one of tools, by its name.", f"tool_choice.tools[{unknown}]")
        tools = tuple(tool for tool in tools if tool.name in allowed)
        choice = ToolChoice(given.mode or "auto", is_parallel=is_parallel)
    else:
        raise unsupported("A tool_choice is a function with its name, or allowed_tools with tools.", "tool_choice")
    check_choice(choice, tools, "tool_choice")
    return tools, choice
