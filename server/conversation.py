"""A conversation as every dialect hands it on: turns, calls, and tools. Apart: messages are about the pipe."""

from typing import Literal

import msgspec


class Call(msgspec.Struct, frozen=True, array_like=True):
    """A call of a tool that the assistant made; `arguments` is what it wrote, JSON where it wrote well."""

    name: str
    arguments: str
    id: str = ""


class Turn(msgspec.Struct, frozen=True, array_like=True):
    """One message of a conversation; `role` is system, developer, user, assistant or tool.

    The assistant's may hold `calls` and its `reasoning`; a tool's names the call that it answers by `call_id`, and the
    tool by `name`, which is a speaker's name in the other roles.
    """

    role: str
    content: str
    calls: tuple[Call, ...] = ()
    call_id: str = ""
    name: str = ""
    reasoning: str = ""


class Tool(msgspec.Struct, frozen=True):
    """A tool that the assistant may call; `parameters` is the JSON schema of its arguments, as text.

    With `strict` every call must follow the schema. `place` is the field that holds the schema.
    """

    name: str
    description: str = ""
    parameters: str = "{}"
    strict: bool = False
    place: str = "tools"


class ToolChoice(msgspec.Struct, frozen=True):
    """Whether tools are called: `mode` required demands a call, of the tool `name` if one is named."""

    mode: Literal["auto", "none", "required"] = "auto"
    name: str = ""
    is_parallel: bool = True
