"""Which parameters of a tool are texts. Apart: formats without quotes cannot tell a text from a number."""

import json

from slimoe.server.messages import Tool


def text_parameters(tool: Tool) -> tuple[str, ...]:
    """The parameters whose values are texts by the tool's schema, whatever they look like."""
    properties = json.loads(tool.parameters).get("properties")
    if not isinstance(properties, dict):
        return ()
    return tuple(name for name, schema in properties.items() if isinstance(schema, dict) and _is_text(schema))


def _is_text(schema: dict[str, object]) -> bool:
    kind, choices, either = schema.get("type"), schema.get("enum"), schema.get("anyOf")
    if isinstance(either, list) and either:
        kind = [one.get("type") if isinstance(one, dict) else None for one in either]
    if isinstance(choices, list) and choices:
        return all(isinstance(choice, str) for choice in choices)
    return kind == "string" or (isinstance(kind, list) and "string" in kind and set(kind) <= {"string", "null"})
