"""Answers that are held to a form or to a call of a tool, in every dialect's own fields, by the real engine."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import aiohttp
import pytest
from openai import AsyncOpenAI
from pydantic import BaseModel

from tests.models.live_server import serving

DEMO = Path(__file__).parents[3] / "server" / "demo" / "demo.gguf"
SCHEMA = {
    "type": "object",
    "properties": {"river": {"enum": ["Rhine", "Elbe"]}},
    "required": ["river"],
    "additionalProperties": False,
}
ASK = [{"role": "user", "content": "Name a river."}]
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "messages": ("/v1/messages", {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}),
    "messages, older": ("/v1/messages", {"output_format": {"type": "json_schema", "schema": SCHEMA}}),
    "responses": ("/v1/responses", {"text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}}),
    "chat": ("/api/chat", {"format": SCHEMA}),
    "generate": ("/api/generate", {"format": SCHEMA}),
}
PROMPTS: dict[str, dict[str, Any]] = {
    "/v1/messages": {"messages": ASK, "max_tokens": 100, "temperature": 0},
    "/v1/responses": {"input": ASK, "max_output_tokens": 100, "temperature": 0},
    "/api/chat": {"messages": ASK, "stream": False, "options": {"num_predict": 100, "temperature": 0}},
    "/api/generate": {"prompt": "Name a river.", "stream": False, "options": {"num_predict": 100, "temperature": 0}},
}
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/messages", {"output_config": {"format": {"type": "json_schema", "schema": []}}}, "output_config.format"),
    ("/v1/messages", {"output_config": {"format": {"type": "poem", "schema": {}}}}, "output_config.format"),
    ("/v1/responses", {"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
    ("/v1/responses", {"text": {"format": {"type": "poem"}}}, "text.format.type"),
    ("/v1/responses", {"text": {"format": {"type": "json_object"}}, "grammar": 'root ::= "a"'}, "grammar"),
    ("/v1/responses", {"text": {"format": {"type": "json_schema", "schema": {"type": "poem"}}}}, "text.format.schema"),
    ("/api/chat", {"format": "xml"}, "format"),
    ("/api/chat", {"format": 5}, "format"),
    ("/api/generate", {"format": {"type": "poem"}}, "format"),
]


class River(BaseModel):
    river: Literal["Rhine", "Elbe"]
    is_long: bool


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(DEMO, "--ctx", "512") as (_, url):
        yield url


async def post(url: str, path: str, fields: dict[str, Any]) -> tuple[int, Any]:
    body = {**PROMPTS[path], **fields}
    async with aiohttp.ClientSession() as session, session.post(url + path, json=body) as response:
        return response.status, await response.json()


def text_of(path: str, answer: dict[str, Any]) -> str:
    content = {
        "/v1/messages": lambda: answer["content"][0]["text"],
        "/v1/responses": lambda: answer["output"][0]["content"][0]["text"],
        "/api/chat": lambda: answer["message"]["content"],
        "/api/generate": lambda: answer["response"],
    }
    return str(content[path]())


@pytest.mark.parametrize("name", FORMS)
async def test_a_schema_is_followed(url: str, name: str) -> None:
    path, fields = FORMS[name]
    status, answer = await post(url, path, fields)
    assert status == 200, answer
    assert json.loads(text_of(path, answer))["river"] in ("Rhine", "Elbe")


@pytest.mark.parametrize(
    ("path", "fields"),
    [("/v1/responses", {"text": {"format": {"type": "json_object"}}}), ("/api/chat", {"format": "json"})],
)
async def test_any_object(url: str, path: str, fields: dict[str, Any]) -> None:
    _, answer = await post(url, path, fields)
    assert text_of(path, answer).lstrip().startswith("{")


@pytest.mark.parametrize(("path", "fields", "named"), WRONG)
async def test_what_is_no_form(url: str, path: str, fields: dict[str, Any], named: str) -> None:
    status, answer = await post(url, path, fields)
    assert status == 400
    assert named in json.dumps(answer)


async def test_the_clients_own_parser(url: str) -> None:
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        asked: dict[str, Any] = {"model": "", "input": "Name a river.", "text_format": River, "temperature": 0}
        answer = await client.responses.parse(**asked)
        assert isinstance(answer.output_parsed, River)
        async with client.responses.stream(**asked) as stream:
            streamed = await stream.get_final_response()
        assert streamed.output_parsed == answer.output_parsed


@pytest.mark.parametrize(
    "choice", [{"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "flow"}]
)
async def test_a_call_that_anthropics_client_demands(url: str, choice: dict[str, Any]) -> None:
    tools = [{"name": "flow", "description": "Tells a flow.", "input_schema": SCHEMA}]
    asked = {"tools": tools, "tool_choice": choice, "max_tokens": 200}
    status, answer = await post(url, "/v1/messages", asked)
    assert (status, answer["stop_reason"]) == (200, "tool_use")
    (call,) = answer["content"]
    assert (call["type"], call["name"], call["input"]["river"] in ("Rhine", "Elbe")) == ("tool_use", "flow", True)
    said = [
        *ASK,
        {"role": "assistant", "content": answer["content"]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call["id"], "content": "2000 m3/s"}]},
    ]
    status, answer = await post(url, "/v1/messages", {**asked, "messages": said, "tool_choice": {"type": "auto"}})
    assert status == 200


async def test_a_call_that_openais_client_demands(url: str) -> None:
    tools: Any = [{"type": "function", "name": "flow", "parameters": SCHEMA, "strict": True}]
    choice: Any = {"type": "function", "name": "flow"}
    async with (
        AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
        client.responses.stream(model="", input="Name a river.", tools=tools, tool_choice=choice) as stream,
    ):
        answer = await stream.get_final_response()
    (call,) = answer.output
    assert call.type == "function_call"
    assert json.loads(call.arguments)["river"] in ("Rhine", "Elbe")
    assert (call.name, call.status) == ("flow", "completed")
