"""Requests that cannot be answered: the status, the JSON, and a server that goes on."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
import pytest_asyncio

from slimoe.server.http.access import AccessRules
from slimoe.server.http.body_intake import MAX_BODY
from tests.models.live_server import LiveOptions, LiveServer, live_server

pytestmark = pytest.mark.asyncio(loop_scope="module")
CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "hi"}]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(model: Path) -> AsyncIterator[LiveServer]:
    async with live_server(model) as server:
        yield server
        async with server.client() as client:
            answer = await client.completions.create(model="", prompt="still here")
            assert answer.choices[0].text == " still here"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def guarded(model: Path) -> AsyncIterator[str]:
    """A server that knows one more name and one more page."""
    rules = AccessRules(hosts=frozenset({"box"}), origins=frozenset({"https://mine.org"}))
    async with live_rules(model, rules) as url:
        yield url


async def send(url: str, data: bytes | str, **headers: str) -> tuple[int, dict[str, Any]]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with aiohttp.ClientSession() as session, session.post(url, data=data, headers=named) as response:
        assert response.content_type == "application/json"
        error = (await response.json())["error"]
        assert {"message", "type", "param", "code"} <= error.keys()
        return response.status, error


BAD_CHATS: list[tuple[Any, str | None]] = [
    ({"messages": None}, "messages"),
    ({"messages": "string"}, "messages"),
    ({"messages": [123]}, "messages[0]"),
    ({"messages": [{}]}, "messages[0]"),
    ({"messages": []}, "messages"),
    ({}, None),
    ([], None),
    ({"messages": [{"role": 123, "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": 123}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ({"messages": [*HI, {}]}, "messages[1]"),
    ({"messages": [*HI, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "assistant", "content": "first"}, *HI]}, "messages"),
    ({"messages": HI, "max_tokens": -2}, "max_tokens"),
    ({"messages": HI, "max_completion_tokens": -2}, "max_completion_tokens"),
    ({"messages": HI, "n_predict": -2}, "n_predict"),
    ({"messages": HI, "n_predict": "all"}, "n_predict"),
    ({"messages": HI, "max_tokens": 1.5}, "max_tokens"),
    ({"messages": HI, "max_tokens": "5"}, "max_tokens"),
    ({"messages": HI, "temperature": -0.1}, "temperature"),
    ({"messages": HI, "temperature": "hot"}, "temperature"),
    ({"messages": HI, "top_p": 1.1}, "top_p"),
    ({"messages": HI, "top_k": -2}, "top_k"),
    ({"messages": HI, "presence_penalty": 3}, "presence_penalty"),
    ({"messages": HI, "repeat_penalty": 0}, "repeat_penalty"),
    ({"messages": HI, "seed": 2**64}, "seed"),
    ({"messages": HI, "n": 0}, "n"),
    ({"messages": HI, "n": 99}, "n"),
    ({"messages": HI, "top_logprobs": 21, "logprobs": True}, "top_logprobs"),
    ({"messages": HI, "top_logprobs": 2}, "top_logprobs"),
    ({"messages": HI, "top_logprobs": 2, "logprobs": False}, "top_logprobs"),
    ({"messages": HI, "logprobs": 2}, "logprobs"),
    ({"messages": HI, "logit_bias": {"word": 1}}, "logit_bias"),
    ({"messages": HI, "logit_bias": {"99999": 1}}, "logit_bias"),
    ({"messages": HI, "logit_bias": {"5": True}}, "logit_bias.5"),
    ({"messages": HI, "logit_bias": {"5": "x"}}, "logit_bias[...]"),
    ({"messages": HI, "logit_bias": [1]}, "logit_bias"),
    ({"messages": HI, "logit_bias": {str(n): -100 for n in range(512)}}, "logit_bias"),
    ({"messages": HI, "logit_bias": {str(n): False for n in range(512)}}, "logit_bias"),
    ({"messages": HI, "logit_bias": {str(n): 1 for n in range(4097)}}, "logit_bias"),
    ({"messages": HI * 16_385}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 16_385}]}, "messages[0].content"),
    ({"messages": HI, "chat_template_kwargs": {"x": 2**70}}, "chat_template_kwargs"),
    ({"messages": HI, "chat_template_kwargs": json.loads('{"x":' * 40 + "1" + "}" * 40)}, "chat_template_kwargs"),
    ({"messages": HI, "stop": [1]}, "stop[0]"),
    ({"messages": HI, "stop": ["x"] * 65}, "stop"),
    ({"messages": HI, "stop": "x" * 1025}, "stop"),
    ({"messages": HI, "stream": "yes"}, "stream"),
    ({"messages": HI, "tools": [{"type": "function"}]}, "tools[0]"),
    ({"messages": HI, "functions": [{}]}, "functions[0]"),
    ({"messages": HI, "response_format": {"type": "json_schema"}}, "response_format.schema"),
    ({"messages": HI, "response_format": {"type": "structural_tag"}}, "response_format"),
    ({"messages": HI, "response_format": {"type": "poem"}}, "response_format.type"),
    ({"messages": HI, "response_format": "text"}, "response_format"),
]


@pytest.mark.parametrize(("body", "param"), BAD_CHATS)
@pytest.mark.parametrize("stream", [False, True])
async def test_bad_chats(server: LiveServer, body: Any, param: str | None, stream: bool) -> None:
    sent = {"stream": True, **body} if stream and isinstance(body, dict) else body
    status, error = await send(server.url + CHAT, json.dumps(sent))
    unsupported = param in ("tools[0]", "response_format", "messages[0].content[0]")
    assert status == 400
    assert error["type"] in (
        ("invalid_request_error", "not_supported_error") if unsupported else ("invalid_request_error",)
    )
    assert error["param"] == param
    assert error["message"].endswith(".")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, None),
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt[0]"),
        ({"prompt": ["a", [1, "b"]]}, "prompt[1]"),
        ({"prompt": [True]}, "prompt[0]"),
        ({"prompt": [1.5]}, "prompt[0]"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [512]}, "prompt"),
        ({"prompt": [2**40]}, "prompt"),
        ({"prompt": ["a"] * 2049}, "prompt"),
        ({"prompt": ["a"] * 129, "n": 16}, "n"),
        ({"prompt": [1] * 400_000}, "prompt"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "best_of": 3}, "best_of"),
        ({"prompt": "a", "max_tokens": -5}, "max_tokens"),
    ],
)
async def test_bad_completions(server: LiveServer, body: Any, param: str | None) -> None:
    status, error = await send(server.url + COMPLETE, json.dumps(body))
    assert (status, error["param"]) == (400, param)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/detokenize", {"tokens": [512]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
        ("/tokenize", {}, "content"),
        ("/tokenize", {"content": 5}, "content"),
        ("/tokenize", {"content": "a " * (2**19 + 1)}, "content"),
        ("/tokenize", {"prompt": "a " * (2**16 + 1), "with_pieces": True}, "prompt"),
    ],
)
async def test_bad_tokens(server: LiveServer, path: str, body: Any, param: str) -> None:
    status, error = await send(server.url + path, json.dumps(body))
    assert (status, error["param"]) == (400, param)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b'{"prompt": "a",}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b"[" * 100000,
        b'{"prompt": "a", "json_schema": "\xff"}',
        b'{"prompt": "a", "json_schema": {"a": "\xff"}}',
    ],
)
async def test_what_is_no_json(server: LiveServer, data: bytes) -> None:
    status, error = await send(server.url + COMPLETE, data)
    assert (status, error["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, COMPLETE])
async def test_overflow_is_told_in_all_words_that_clients_look_for(server: LiveServer, path: str, stream: bool) -> None:
    text = "the quick brown fox " * 200
    prompt: dict[str, Any] = {"messages": [{"role": "user", "content": text}]} if path == CHAT else {"prompt": text}
    status, error = await send(server.url + path, json.dumps({**prompt, "stream": stream, "max_tokens": 100}))
    assert (status, error["type"], error["code"]) == (400, "exceed_context_size_error", "context_length_exceeded")
    assert error["param"] == ("messages" if path == CHAT else "prompt")
    assert error["n_ctx"] == 512
    asked = error["n_prompt_tokens"] + 100
    assert f"maximum context length is 512 tokens. However, you requested {asked} tokens (" in error["message"]
    assert "exceeds the available context size" in error["message"]
    assert "context_length_exceeded" in error["message"]


async def test_a_prompt_that_just_fits(server: LiveServer) -> None:
    body = {"prompt": [5] * 511, "max_tokens": 1}
    async with aiohttp.ClientSession() as session:
        async with session.post(server.url + COMPLETE, json=body) as response:
            assert response.status == 200
        async with session.post(server.url + COMPLETE, json={**body, "prompt": [5] * 512}) as response:
            assert response.status == 400
        async with session.post(server.url + COMPLETE, json={"prompt": [5] * 512, "max_tokens": 0}) as response:
            assert response.status == 200


async def test_the_clients_exceptions(server: LiveServer) -> None:
    async with server.client() as client:
        with pytest.raises(openai.BadRequestError) as bad:
            await client.chat.completions.create(model="", messages=[])
        assert bad.value.param == "messages"
        with pytest.raises(openai.NotFoundError) as missing:
            await client.models.retrieve("gpt-4o")
        assert (missing.value.code, missing.value.type) == ("model_not_found", "invalid_request_error")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("POST", "/v1/nothing", 404),
        ("GET", "/v1/models/a/b", 404),
        ("GET", CHAT, 405),
        ("DELETE", "/v1/models", 405),
        ("PUT", "/v1/%0a%1b[31m", 404),
        ("GET", "/v1/models/%0a%1b[31m", 404),
        ("GET", "/" + 7000 * "x", 404),
        ("POST", "/health", 405),
    ],
)
async def test_wrong_addresses(server: LiveServer, method: str, path: str, status: int) -> None:
    async with aiohttp.ClientSession() as session, session.request(method, server.url + path) as response:
        assert response.status == status
        error = (await response.json())["error"]
    assert error["message"].endswith(".")
    assert error["message"].isprintable()
    assert len(error["message"]) < 1100
    assert error["type"] in ("not_found_error", "invalid_request_error")


async def test_a_body_that_is_too_large(server: LiveServer) -> None:
    status, error = await send(server.url + COMPLETE, b" " * (MAX_BODY + 1))
    assert (status, error["type"]) == (413, "request_too_large")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:1", 200),
        ("127.0.0.1", 200),
        ("[::1]:80", 200),
        ("192.168.0.7:80", 200),
        ("box", 200),
        ("evil.com", 403),
        ("evil.com.:80", 403),
        ("localhost.evil.com", 403),
        ("127.0.0.1.evil.com", 403),
        ("[::1].evil.com", 403),
        ("[::1]evil.com:80", 403),
        ("[::1", 403),
        ("[localhost]", 403),
        ("[127.0.0.1]:80", 403),
        ("localhost:1@evil.com", 403),
        ("localhost@evil.com", 403),
        ("localhost:evil.com", 403),
        ("localhost:80:80", 403),
        ("localhost/.evil.com", 403),
        ("localhost evil.com", 403),
        ("", 403),
    ],
)
async def test_host_names(guarded: str, host: str, status: int) -> None:
    assert await ask(guarded, host=host) == status


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost:3000", 200),
        ("https://127.0.0.1", 200),
        ("http://[::1]:5", 200),
        ("tauri://localhost", 200),
        ("http://tauri.localhost", 200),
        ("app://x", 200),
        ("https://mine.org", 200),
        ("https://evil.com", 403),
        ("null", 403),
        ("http://192.168.0.7", 403),
        ("http://localhost.evil.com", 403),
        ("http://[::1", 400),
        ("http://[::1].evil.com", 400),
        ("http://localhost:1@evil.com", 400),
        ("http://localhost:port", 400),
        ("localhost", 400),
        ("http://a b", 400),
    ],
)
async def test_web_pages(guarded: str, origin: str, status: int) -> None:
    assert await ask(guarded, origin=origin) == status
    headers = {"Origin": origin, "Access-Control-Request-Headers": "x-a"}
    async with aiohttp.ClientSession() as session, session.options(guarded + CHAT, headers=headers) as response:
        assert response.status == status
        allowed = response.headers.get("Access-Control-Allow-Origin")
        assert allowed == (origin if status == 200 else None)
        assert "Access-Control-Allow-Credentials" not in response.headers


@pytest.mark.parametrize(
    ("site", "origin", "status"),
    [
        ("cross-site", None, 403),
        ("cross-site", "https://mine.org", 400),
        ("same-site", None, 400),
        ("same-origin", None, 400),
        ("none", None, 400),
    ],
)
async def test_a_page_that_does_not_tell_its_origin(guarded: str, site: str, origin: str | None, status: int) -> None:
    """An empty body is told from a page that is not let in; a link may lead here from anywhere."""
    headers = {"Sec-Fetch-Site": site, **({} if origin is None else {"Origin": origin})}
    async with aiohttp.ClientSession() as session, session.post(guarded + CHAT, headers=headers) as response:
        assert response.status == status
    async with aiohttp.ClientSession() as session, session.get(guarded + "/", headers=headers) as response:
        assert response.status == 200


async def test_the_key(model: Path) -> None:
    async with live_rules(model, AccessRules(key="sesame")) as url:
        assert await ask(url) == 401
        assert await ask(url, authorization="Bearer open") == 401
        assert await ask(url, authorization="Bearer sésame") == 401
        assert await ask(url, authorization="Bearer sesame") == 200
        assert await ask(url, x_api_key="sesame") == 200
        assert await ask(url, x_api_key="sesame", host="evil.com") == 200
        assert await ask(url, "/health") in (200, 503)
        status, error = await send(url + CHAT, b"{}")
        assert (status, error["type"], error["code"]) == (401, "authentication_error", "invalid_api_key")


@asynccontextmanager
async def live_rules(model: Path, rules: AccessRules) -> AsyncIterator[str]:
    """An application whose engine need not be there yet."""
    async with live_server(model, LiveOptions(rules=rules, waits=False)) as server:
        yield server.url


async def ask(url: str, path: str = "/v1/models", **headers: str) -> int:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with aiohttp.ClientSession() as session, session.get(url + path, headers=named) as response:
        return response.status
