"""`/openapi.json`: an OpenAPI 3.1 document of the endpoints, made of the types of what goes in and out."""

import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from slimoe.server.api.endpoint import JSON, Endpoint
from slimoe.server.http.access import is_public

_PARAMETER = re.compile(r"\{(?P<name>\w+)(:[^{}]*)?\}")
_COMPONENT = "#/components/schemas/{name}"
STATUSES: Mapping[int, str] = {
    400: "A field or header is wrong; `param` names it.",
    401: "The API key is missing or wrong.",
    403: "The web page or host name is not allowed.",
    404: "There is no such model.",
    405: "The path takes another method.",
    408: "The body did not arrive in time.",
    409: "Not while the model answers.",
    413: "The body is too large.",
    429: "Too many requests wait already. Try again after `Retry-After` seconds.",
    500: "The server failed, or the model could not be loaded.",
    501: "Not offered by this server, or not by this model.",
    503: "Not now: the model is being loaded, or there is no room. `Retry-After` says when to try again.",
}
"""What the statuses say, in whichever form the endpoint writes its errors."""
_EVERYWHERE, _WITH_BODY = (400, 401, 403, 500), (404, 408, 413, 429, 501, 503)
_SECURITY = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "`Authorization: Bearer KEY`"},
    "header": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
}


def openapi_document(endpoints: Sequence[Endpoint], version: str, *, asks_for_key: bool) -> dict[str, Any]:
    """The document; an alias is described as the path that it stands for."""
    schemas, components = _schemas(endpoints)
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in endpoints:
        for path in (endpoint.path, *endpoint.aliases):
            plain = _PARAMETER.sub(r"{\g<name>}", path)
            paths.setdefault(plain, {})[endpoint.method.lower()] = _operation(endpoint, path, schemas)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "slimoe",
            "version": version,
            "description": "Text from a mixture-of-experts model, by the APIs of OpenAI, Anthropic, Ollama and "
            "llama.cpp's server.",
        },
        "servers": [{"url": "/"}],
        "security": [{name: []} for name in _SECURITY] if asks_for_key else [],
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": _SECURITY},
    }


def _schemas(endpoints: Sequence[Endpoint]) -> tuple[dict[Any, dict[str, Any]], dict[str, Any]]:
    """The schema of every type that the endpoints name, and those that these refer to, by name."""
    named: list[Any] = []
    for endpoint in endpoints:
        for kind in (endpoint.body, endpoint.answer, endpoint.error):
            named += [one for one in alternatives(kind) if one not in named]
    schemas, components = msgspec.json.schema_components(named, ref_template=_COMPONENT)
    return dict(zip(named, schemas, strict=True)), components


def alternatives(kind: Any) -> list[Any]:
    """The types of which a document may be one; a body's type is that without the fields that are refused."""
    if kind is None:
        return []
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return [one for part in typing.get_args(kind) for one in alternatives(part)]
    # A body that is extended by what is refused has the name of what it extends.
    parent = kind.__mro__[1] if isinstance(kind, type) else None
    return [parent if parent is not None and parent.__name__ == kind.__name__ else kind]


def _operation(endpoint: Endpoint, path: str, schemas: Mapping[Any, dict[str, Any]]) -> dict[str, Any]:
    responses = {"200": _response(endpoint, schemas)}
    statuses = {*_EVERYWHERE, *endpoint.statuses, *(_WITH_BODY if endpoint.body is not None else ())}
    for status in sorted(statuses):
        content = {JSON: {"schema": _any_of(endpoint.error, schemas)}}
        responses[str(status)] = {"description": STATUSES[status], "content": content}
    parameters = [
        {"name": match["name"], "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for match in _PARAMETER.finditer(path)
    ]
    parameters += [
        {"name": name, "in": "query", "required": False, "description": text, "schema": {"type": "string"}}
        for name, text in endpoint.query.items()
    ]
    operation: dict[str, Any] = {"summary": endpoint.summary, "responses": responses}
    operation["operationId"] = f"{endpoint.method.lower()}{re.sub(r'[^a-z0-9]+', '_', path.lower()).rstrip('_')}"
    if parameters:
        operation["parameters"] = parameters
    if path != endpoint.path:
        operation["description"] = f"The same as {endpoint.path}."
    if endpoint.body is not None:
        content = {JSON: {"schema": _any_of(endpoint.body, schemas)}}
        operation["requestBody"] = {"required": True, "content": content}
    if is_public(endpoint.path):
        operation["security"] = []
    return operation


def _response(endpoint: Endpoint, schemas: Mapping[Any, dict[str, Any]]) -> dict[str, Any]:
    schema = _any_of(endpoint.answer, schemas) if endpoint.answer is not None else {"type": "string"}
    content: dict[str, Any] = {endpoint.content_type: {"schema": schema}}
    if endpoint.streams:
        description = "The answer in pieces, if the body's `stream` asks for it."
        content[endpoint.stream_type] = {"schema": {"description": description}}
    return {"description": "The answer.", "content": content}


def _any_of(kind: Any, schemas: Mapping[Any, dict[str, Any]]) -> dict[str, Any]:
    found = [schemas[one] for one in alternatives(kind)]
    return found[0] if len(found) == 1 else {"anyOf": found}
