"""The API's description: every route is in it, and the page shows it without anything from elsewhere."""

import base64
import hashlib
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from slimoe.server.app import AppConfig, init_app
from slimoe.server.description.docs_page import docs_page
from slimoe.server.http.access import AccessRules
from tests.models.live_server import LiveOptions, LiveServer, live_server

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def document(server: LiveServer) -> AsyncIterator[dict[str, Any]]:
    async with aiohttp.ClientSession() as session, session.get(f"{server.url}/openapi.json") as response:
        assert (response.status, response.content_type) == (200, "application/json")
        yield await response.json()


def references(value: Any) -> Iterator[str]:
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from references(inner)
    if isinstance(value, dict) and "$ref" in value:
        yield value["$ref"]


async def test_every_route_is_described(server: LiveServer, document: dict[str, Any]) -> None:
    app = init_app(AppConfig(has_page=False), server.backends)
    routes = {
        (route.method.lower(), re.sub(r":[^{}]*\}", "}", route.resource.canonical))
        for route in app.router.routes()
        if route.resource is not None and route.method != "HEAD"
    }
    described = {(method, path) for path, methods in document["paths"].items() for method in methods}
    assert described == routes
    assert all(operation["summary"] for methods in document["paths"].values() for operation in methods.values())


async def test_the_documentation_names_paths_without_v1_that_are_there(document: dict[str, Any]) -> None:
    text = Path(__file__).parents[3].joinpath("docs/server.md").read_text(encoding="utf-8")
    told = re.findall(r"`(/[a-z_/]+)`", text.split("Without `/v1` there are")[1].partition(". ")[0])
    assert "/models" in told
    assert {path for name in told for path in (name, f"/v1{name}")} <= document["paths"].keys()


async def test_references_lead_somewhere(document: dict[str, Any]) -> None:
    names = document["components"]["schemas"]
    found = {reference.removeprefix("#/components/schemas/") for reference in references(document)}
    assert found == set(names)
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in names)
    ids = [operation["operationId"] for methods in document["paths"].values() for operation in methods.values()]
    assert len(ids) == len(set(ids))


async def test_a_body_is_described_without_what_is_refused(document: dict[str, Any]) -> None:
    chat = document["components"]["schemas"]["ChatBody"]
    assert chat["required"] == ["messages"]
    assert chat["properties"]["n"] == {
        "anyOf": [{"type": "integer", "minimum": 1, "maximum": 16}, {"type": "null"}],
        "default": None,
    }
    assert "max_new_tokens" not in chat["properties"]
    content = document["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]["content"]
    assert content.keys() == {"application/json", "text/event-stream"}
    assert document["paths"]["/api/chat"]["post"]["responses"]["200"]["content"].keys() == {
        "application/json",
        "application/x-ndjson",
    }


async def test_an_answer_of_chosen_fields_is_described(document: dict[str, Any]) -> None:
    """`response_fields` may name nothing that is there, and the answer is then an empty object."""
    content = document["paths"]["/completion"]["post"]["responses"]["200"]["content"]
    whole, many, chosen, many_chosen = content["application/json"]["schema"]["anyOf"]
    assert many["items"] == whole
    assert many_chosen["items"] == chosen
    assert chosen["type"] == "object"
    assert "required" not in chosen
    assert "`response_fields`" in chosen["description"]


async def test_errors_are_described_as_each_api_writes_them(document: dict[str, Any]) -> None:
    for path, name in (
        ("/v1/completions", "ErrorDocument"),
        ("/v1/messages", "MessagesError"),
        ("/api/chat", "OllamaError"),
    ):
        responses = document["paths"][path]["post"]["responses"]
        assert {"400", "401", "403", "404", "408", "413", "429", "500", "501", "503"} <= responses.keys()
        assert responses["413"]["content"]["application/json"]["schema"] == {"$ref": f"#/components/schemas/{name}"}
    assert "413" not in document["paths"]["/v1/models"]["get"]["responses"]


async def test_the_key_is_described_where_one_is_asked_for(model: Path, document: dict[str, Any]) -> None:
    assert document["security"] == []
    options = LiveOptions(rules=AccessRules(key="s3cret"))
    async with live_server(model, options) as server, aiohttp.ClientSession() as session:
        async with session.get(f"{server.url}/openapi.json") as response:
            keyed = await response.json()
        async with session.get(f"{server.url}/docs") as response:
            assert response.status == 200
        async with session.get(f"{server.url}/props") as response:
            assert response.status == 401
    assert keyed["security"] == [{"bearer": []}, {"header": []}]
    assert keyed["paths"]["/health"]["get"]["security"] == []
    assert "security" not in keyed["paths"]["/props"]["get"]


async def test_the_page_needs_nothing_from_elsewhere(server: LiveServer, document: dict[str, Any]) -> None:
    async with aiohttp.ClientSession() as session, session.get(f"{server.url}/docs") as response:
        assert (response.status, response.content_type) == (200, "text/html")
        policy, page = response.headers["Content-Security-Policy"], await response.text()
    assert "<script" not in page
    assert "://" not in page
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    assert base64.b64encode(hashlib.sha256(style.encode()).digest()).decode() in policy
    shown = set(re.findall(r"<h2><b>\w+</b> <code>([^<]+)</code>", page))
    aliases = {path for path, methods in document["paths"].items() for one in methods.values() if "description" in one}
    assert shown == document["paths"].keys() - aliases
    anchors = set(re.findall(r'id="([^"]+)"', page))
    assert set(re.findall(r'href="#([^"]+)"', page)) <= anchors


async def test_the_page_shows_markup_as_text(document: dict[str, Any]) -> None:
    hostile = '<img src=x onerror="alert(1)">'
    changed = {
        **document,
        "info": {"title": hostile, "version": hostile, "description": hostile},
        "paths": {hostile: {"get": {"summary": hostile, "responses": {"200": {"content": {hostile: {"schema": {}}}}}}}},
        "components": {"schemas": {hostile: {"description": hostile, "properties": {hostile: {"enum": [hostile]}}}}},
    }
    assert "<img" not in docs_page(changed)
