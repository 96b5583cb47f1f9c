"""The tools of a chat: how OpenAI's clients describe and choose them, today and in older programs."""

from typing import Any, Literal

import msgspec

from slimoe.server.api.request_body import GenerationBody
from slimoe.server.api_error import invalid, unsupported
from slimoe.server.dialects.conversation import check_choice, check_tools, json_text
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


class ChatToolChoice(msgspec.Struct):
    """`tool_choice` where it names a function."""

    type: str = "function"
    function: NamedFunction | None = None


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
        check_tools(tools, "functions[{n}].name")
        field, given = "function_call", body.function_call
        name = given.name if isinstance(given, NamedFunction) else ""
        mode = given if isinstance(given, str) else "required" if name else "auto"
        choice = ToolChoice(mode, name, is_parallel=False)
    else:
        tools = tuple(_chat_tool(tool, f"tools[{n}]") for n, tool in enumerate(body.tools or ()))
        check_tools(tools, "tools[{n}].function.name")
        field, choice = "tool_choice", _choice(body)
    check_choice(choice, tools, field)
    return tools, choice


def _chat_tool(tool: ChatTool, where: str) -> Tool:
    if tool.type != "function" or tool.function is None:
        problem = "it has none" if tool.type == "function" else f"its type is {tool.type!r}"
        raise unsupported(f"A tool is called by its function, but {problem}. Send one of type function.", where)
    return _tool(tool.function, f"{where}.function")


def _tool(function: DescribedFunction, where: str) -> Tool:
    schema = json_text(function.parameters or {}, f"{where}.parameters")
    return Tool(function.name, function.description or "", schema, bool(function.strict), f"{where}.parameters")


def _choice(body: ToolsBody) -> ToolChoice:
    given, is_parallel = body.tool_choice, body.parallel_tool_calls is not False
    if given in ("required", "any"):
        # Several are demanded only of who asks for several: small models would not find an end.
        return ToolChoice("required", is_parallel=bool(body.parallel_tool_calls))
    if not isinstance(given, ChatToolChoice):
        return ToolChoice("none" if given == "none" else "auto", is_parallel=is_parallel)
    if given.type != "function" or given.function is None:
        raise unsupported("A tool is chosen as auto, none, required, or a function by its name.", "tool_choice")
    if not given.function.name:
        raise invalid("tool_choice names no function.", "tool_choice.function.name")
    # A named tool is called once.
    return ToolChoice("required", given.function.name, is_parallel=False)
