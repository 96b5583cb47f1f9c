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
    choices, either = schema.get("enum"), schema.get("anyOf")
    given = either if isinstance(either, list) and either else [schema]
    if isinstance(choices, list) and choices:
        return all(isinstance(choice, str) for choice in choices)
    kinds = [kind for one in given for kind in _kinds(one)]
    return "string" in kinds and all(kind in ("string", "null") for kind in kinds)


def _kinds(schema: object) -> list[object]:
    """The types that a schema allows; one that names none allows all."""
    kind = schema.get("type") if isinstance(schema, dict) else None
    return kind if isinstance(kind, list) else [kind]
