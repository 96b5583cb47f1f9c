"""Tools, calls and results written out as text, for models whose chat template knows none of them.

- Tools stand at the end of the system message, one in a line of JSON, below a sentence that says how to call them.
- A call is a line of JSON: `{"id": "call_1", "name": "weather", "arguments": {"city": "Paris"}}`. Where the tools are
  written out too, it stands in the tags that calls are asked for in.
- What a tool gave back stands below a line that says whose it is: `Result of weather (call_1):`.
- The name of a speaker stands before what they say: `Ann: Hello`.
"""

import json
from collections.abc import Sequence
from typing import Any

CALL_BEGIN, CALL_END = "<tool_call>", "</tool_call>"
_ABOUT_TOOLS = """You can call these tools, each described by a line of JSON:
{tools}

To call a tool, write its name and arguments as JSON between tags, and nothing else:
{begin}
{{"name": "the tool's name", "arguments": {{"a parameter's name": "its value"}}}}
{end}
Each call has tags of its own. What the tools give back is told to you afterwards."""


def plain_messages(messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation as roles and texts, with `tools` described in its system message."""
    plain = [{"role": message["role"], "content": plain_text(message, in_tags=bool(tools))} for message in messages]
    if tools:
        lines = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
        about = _ABOUT_TOOLS.format(tools=lines, begin=CALL_BEGIN, end=CALL_END)
        at = next((n for n, message in enumerate(plain) if message["role"] in ("system", "developer")), None)
        if at is None:
            plain.insert(0, {"role": "system", "content": about})
        else:
            plain[at]["content"] = "\n\n".join(text for text in (plain[at]["content"], about) if text)
    return plain


def plain_text(message: dict[str, Any], *, in_tags: bool) -> str:
    """What a message says in words, calls included."""
    said, name = message["content"], message.get("name", "")
    if message["role"] == "tool":
        id = message.get("call_id", "")
        whose = f"{name} ({id})" if name and id else name or id
        return f"Result of {whose}:\n{said}" if whose else said
    calls = [_line(call) for call in message.get("calls", ())]
    if in_tags:
        calls = [f"{CALL_BEGIN}\n{line}\n{CALL_END}" for line in calls]
    text = "\n".join(part for part in (said, *calls) if part)
    return f"{name}: {text}" if name else text


def _line(call: dict[str, Any]) -> str:
    """A call as a line of JSON, with the arguments as they were sent if they are that, else as a text."""
    values = {"id": json.dumps(call["id"], ensure_ascii=False)} if call["id"] else {}
    values["name"] = json.dumps(call["name"], ensure_ascii=False)
    is_json = "value" in call
    values["arguments"] = call["arguments"] if is_json else json.dumps(call["arguments"], ensure_ascii=False)
    return "{" + ", ".join(f'"{name}": {value}' for name, value in values.items()) + "}"
