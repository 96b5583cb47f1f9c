"""The tools of a chat: how OpenAI's clients describe and choose them, today and in older programs."""

from typing import Any, Literal

import msgspec

from slimoe.server.api.request_body import GenerationBody
from slimoe.server.api_error import invalid, unsupported
from slimoe.server.dialects.conversation import check_choice, check_tools, tool_of
from slimoe.server.messages import Tool, ToolChoice

Mode = Literal["auto", "none", "required", "any"]


class DescribedFunction(msgspec.Struct):
    """A function that the assistant may have called; `parameters` is the JSON schema of its arguments."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ChatTool(msgspec.Struct):
    """One of `tools`."""

    type: str = "function"
    function: DescribedFunction | None = None


class NamedFunction(msgspec.Struct):
    """A function by its name."""

    name: str


class AllowedTool(msgspec.Struct):
    """One of the tools that may be called."""

    type: str = "function"
    function: NamedFunction | None = None


class AllowedTools(msgspec.Struct):
    """Which of the tools may be called, and whether one must be."""

    tools: list[AllowedTool]
    mode: Literal["auto", "required"] = "auto"


class ChatToolChoice(msgspec.Struct):
    """`tool_choice` where it names functions."""

    type: str = "function"
    function: NamedFunction | None = None
    allowed_tools: AllowedTools | None = None


class ToolsBody(GenerationBody, kw_only=True):
    """The fields about tools."""

    tools: list[ChatTool] | None = None
    tool_choice: Mode | ChatToolChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: list[DescribedFunction] | None = None
    function_call: Literal["auto", "none"] | NamedFunction | None = None

    @property
    def is_older(self) -> bool:
        """Whether the client calls tools functions, of which one is called at a time."""
        return bool(self.functions) and not self.tools


def tools_of(body: ToolsBody) -> tuple[tuple[Tool, ...], ToolChoice]:
    """The tools, and whether they are to be called; raises ApiError for what cannot be followed."""
    if body.is_older:
        tools = tuple(_tool(function, f"functions[{n}]") for n, function in enumerate(body.functions or ()))
        check_tools(tools)
        field, called = "function_call", body.function_call
        name = called.name if isinstance(called, NamedFunction) else ""
        mode = called if isinstance(called, str) else "required" if name else "auto"
        choice = ToolChoice(mode, name, is_parallel=False)
    else:
        tools = tuple(_chat_tool(tool, f"tools[{n}]") for n, tool in enumerate(body.tools or ()))
        check_tools(tools)
        field, given = "tool_choice", body.tool_choice
        if isinstance(given, ChatToolChoice) and given.type == "allowed_tools" and given.allowed_tools:
            tools = _allowed(given.allowed_tools, tools)
            given = given.allowed_tools.mode
        choice = _choice(given, body.parallel_tool_calls)
    check_choice(choice, tools, field)
    return tools, choice


def _chat_tool(tool: ChatTool, where: str) -> Tool:
    if tool.type != "function" or tool.function is None:
        problem = "it has none" if tool.type == "function" else f"its type is {tool.type!r}"
        raise unsupported(f"A tool is called by its function, but {problem}. Send one of type function.", where)
    return _tool(tool.function, f"{where}.function")


def _tool(function: DescribedFunction, where: str) -> Tool:
    place = f"{where}.parameters"
    return tool_of(function.name, function.description, function.parameters, function.strict, place)


def _allowed(allowed: AllowedTools, tools: tuple[Tool, ...]) -> tuple[Tool, ...]:
    """Those of the tools that may be called; raises ApiError for others than these."""
    names, known = set(), {tool.name for tool in tools}
    for n, one in enumerate(allowed.tools):
        if one.type != "function" or one.function is None or one.function.name not in known:
            raise invalid(
                "An allowed tool is one of tools, by its function's name.", f"tool_choice.allowed_tools.tools[{n}]"
            )
        names.add(one.function.name)
    return tuple(tool for tool in tools if tool.name in names)


def _choice(given: Mode | ChatToolChoice | None, wants_parallel: bool | None) -> ToolChoice:
    is_parallel = wants_parallel is not False
    if given in ("required", "any"):
        # Several are demanded only of who asks for several: small models would not find an end.
        return ToolChoice("required", is_parallel=bool(wants_parallel))
    if not isinstance(given, ChatToolChoice):
        return ToolChoice("none" if given == "none" else "auto", is_parallel=is_parallel)
    if given.type != "function" or given.function is None:
        raise unsupported(
            "A tool is chosen as auto, none, required, a function by its name, or allowed_tools with tools.",
            "tool_choice",
        )
    if not given.function.name:
        raise invalid("tool_choice names no function.", "tool_choice.function.name")
    # A named tool is called once.
    return ToolChoice("required", given.function.name, is_parallel=False)
