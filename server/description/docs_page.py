"""`/docs`: the OpenAPI document as a page to read, without scripts and without anything from elsewhere."""

import base64
import hashlib
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from aiohttp import hdrs

_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 0 auto; padding: 1rem; }
code { font-family: ui-monospace, monospace; overflow-wrap: anywhere; }
section { border-top: 1px solid color-mix(in srgb, currentColor 25%, transparent); padding: .5rem 0; }
h2 { font-size: 1.1rem; margin: .5rem 0; }
h2 b { display: inline-block; min-width: 4rem; }
details { margin: .25rem 0; }
summary { cursor: pointer; }
table { border-collapse: collapse; width: 100%; margin: .5rem 0; }
th, td { text-align: left; vertical-align: top; padding: .2rem 1rem .2rem 0; }
"""
_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
HEADERS = {
    hdrs.CONTENT_TYPE: "text/html; charset=utf-8",
    "Content-Security-Policy": f"default-src 'none'; style-src 'sha256-{_HASH}'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    hdrs.CACHE_CONTROL: "no-cache",
}
_TYPES = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false", "null": "null"}


def docs_page(document: Mapping[str, Any]) -> str:
    """The page for an OpenAPI document whose references are all to its own components."""
    info, components = document["info"], document["components"]["schemas"]
    operations = "".join(
        _operation(method, path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
        if "description" not in operation
    )
    types = "".join(_component(name, schema) for name, schema in sorted(components.items()))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(info['title'])}: the API</title><style>{_STYLE}</style></head><body><main>"
        f"<h1>{escape(info['title'])} {escape(info['version'])}</h1><p>{escape(info['description'])} For programs: "
        f'<a href="/openapi.json">/openapi.json</a>. <a href="#types">Types</a>.</p>{operations}'
        f'<h1 id="types">Types</h1>{types}</main></body></html>'
    )


def _operation(method: str, path: str, operation: Mapping[str, Any]) -> str:
    rows = [f"<section><h2><b>{method.upper()}</b> <code>{escape(path)}</code></h2>"]
    rows.append(f"<p>{escape(operation['summary'])}</p>")
    for parameter in operation.get("parameters", ()):
        text = escape(parameter.get("description", f"in the {parameter['in']}"))
        rows.append(f"<p><code>{escape(parameter['name'])}</code>: {text}</p>")
    if "requestBody" in operation:
        rows.append(f"<p>Takes {_contents(operation['requestBody']['content'])}.</p>")
    rows.append(f"<p>Answers {_contents(operation['responses']['200']['content'])}.</p>")
    errors = "".join(
        f"<tr><td>{status}</td><td>{escape(response['description'])}</td></tr>"
        for status, response in operation["responses"].items()
        if status != "200"
    )
    rows.append(f"<details><summary>Errors</summary><table>{errors}</table></details></section>")
    return "".join(rows)


def _contents(content: Mapping[str, Any]) -> str:
    return ", or ".join(f"{_type(one['schema'])} as {escape(kind)}" for kind, one in content.items())


def _component(name: str, schema: Mapping[str, Any]) -> str:
    required = schema.get("required", ())
    rows = "".join(
        f"<tr><td><code>{escape(field)}</code></td><td>{_type(one)}{_limits(one)}</td>"
        f"<td>{'required' if field in required else _default(one)}</td></tr>"
        for field, one in schema.get("properties", {}).items()
    )
    text = escape(schema.get("description", ""))
    title = f"<summary><code>{escape(name)}</code></summary>"
    return f'<details id="{escape(name)}">{title}<p>{text}</p><table>{rows}</table></details>'


def _type(schema: Mapping[str, Any]) -> str:
    """A schema in few words, with links to the types that it names."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(map(_type, schema["anyOf"])))
    if "enum" in schema:
        return " or ".join(f"<code>{escape(str(value))}</code>" for value in schema["enum"])
    if "const" in schema:
        return f"<code>{escape(str(schema['const']))}</code>"
    kind = schema.get("type", "")
    if kind == "array":
        return f"list of {_type(schema.get('items') or {})}"
    if kind == "object":
        inner = schema.get("additionalProperties")
        return f"object of {_type(inner)}" if isinstance(inner, Mapping) else "object"
    return _TYPES.get(kind, "anything")


def _limits(schema: Mapping[str, Any]) -> str:
    found = list(_found_limits(schema))
    return f" ({', '.join(found)})" if found else ""


def _found_limits(schema: Mapping[str, Any]) -> Iterator[str]:
    words = {"minimum": "at least", "maximum": "at most", "minLength": "at least", "maxLength": "at most"}
    for one in schema.get("anyOf", (schema,)):
        yield from (f"{word} {one[name]:,}" for name, word in words.items() if name in one)


def _default(schema: Mapping[str, Any]) -> str:
    value = schema.get("default")
    return "" if value in (None, "", [], {}) else f"default <code>{escape(str(value))}</code>"
