"""Anthropic's `/v1/messages`: documents, events, stop reasons, usage, what is read, errors."""

from itertools import groupby
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from slimoe.server.api_error import ApiError, ErrorInfo
from slimoe.server.dialects.messages_api import error_body
from slimoe.server.dialects.messages_body import UNSUPPORTED
from slimoe.server.http.access import AccessRules
from slimoe.server.http.body_intake import MAX_BODY
from tests.models.live_server import LiveOptions, LiveServer, live_server
from tests.server.dialects.conftest import Events, Post

pytestmark = pytest.mark.asyncio(loop_scope="module")
PATH, COUNT = "/v1/messages", "/v1/messages/count_tokens"
HI: list[Any] = [{"role": "user", "content": "hello world"}]
ASK: dict[str, Any] = {"model": "any", "max_tokens": 200, "messages": HI}
ECHOED = " [INST] hello world [/INST]"
CALLING = '<think>hmm</> Now <call look>{"at": "Paris"}</><call wait>{}</>'


def asking(content: object, **fields: Any) -> dict[str, Any]:
    return {**ASK, "messages": [{"role": "user", "content": content}], **fields}


async def test_a_whole_answer(post: Post) -> None:
    status, answer = await post(PATH, ASK)
    assert status == 200
    assert answer["id"].startswith("msg_")
    usage = answer.pop("usage")
    assert {**answer, "id": ""} == {
        "id": "",
        "type": "message",
        "role": "assistant",
        "model": "tiny",
        "content": [{"type": "text", "text": ECHOED}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
    }
    assert usage["cache_read_input_tokens"] == 1
    assert usage["cache_creation_input_tokens"] == 0
    _, counted = await post(COUNT, {"messages": HI})
    assert usage["input_tokens"] + 1 == counted["input_tokens"]
    assert usage["output_tokens"] > 3


async def test_events_in_their_order(events: Events) -> None:
    named = await events(PATH, ASK)
    assert [name for name, _ in groupby(name for name, _ in named)] == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    documents = [document for _, document in named]
    message = documents[0]["message"]
    assert (message["content"], message["stop_reason"], message["role"]) == ([], None, "assistant")
    assert message["usage"]["input_tokens"] > 0
    assert documents[1] == {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    deltas = [document["delta"] for document in documents if document["type"] == "content_block_delta"]
    assert {delta["type"] for delta in deltas} == {"text_delta"}
    assert "".join(delta["text"] for delta in deltas) == ECHOED
    assert documents[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert documents[-2]["usage"]["cache_read_input_tokens"] == 1
    assert documents[-1] == {"type": "message_stop"}


@pytest.mark.usefixtures("marks")
async def test_thinking_and_calls(post: Post) -> None:
    _, answer = await post(PATH, asking(CALLING))
    thinking, text, look, wait = answer["content"]
    assert thinking == {"type": "thinking", "thinking": "hmm", "signature": ""}
    assert text["text"] == " [INST]  Now  [/INST]"
    assert look == {"type": "tool_use", "id": "call_0", "name": "look", "input": {"at": "Paris"}}
    assert wait == {"type": "tool_use", "id": "call_1", "name": "wait", "input": {}}
    assert answer["stop_reason"] == "tool_use"


@pytest.mark.usefixtures("marks")
async def test_thinking_and_calls_as_events(events: Events) -> None:
    named = [document for _, document in await events(PATH, asking(CALLING))]
    starts = [document for document in named if document["type"] == "content_block_start"]
    stops = [document["index"] for document in named if document["type"] == "content_block_stop"]
    assert [start["index"] for start in starts] == stops == list(range(len(starts)))
    kinds = [start["content_block"]["type"] for start in starts]
    assert kinds == ["text", "thinking", "text", "tool_use", "tool_use", "text"]
    assert starts[3]["content_block"] == {"type": "tool_use", "id": "call_0", "name": "look", "input": {}}
    pieces: dict[int, str] = {}
    for document in named:
        if document["type"] == "content_block_delta":
            (text,) = [value for name, value in document["delta"].items() if name != "type"]
            pieces[document["index"]] = pieces.get(document["index"], "") + text
    signed = [document["index"] for document in named if document.get("delta", {}).get("type") == "signature_delta"]
    assert (pieces[1], signed) == ("hmm", [1])
    assert pieces[3] == '{"at": "Paris"}'
    assert pieces[4] == "{}"
    assert named[-2]["delta"]["stop_reason"] == "tool_use"


@pytest.mark.parametrize(
    ("arguments", "read"),
    [("", {}), ('{"a": 1}', {"a": 1}), ('{"a":', {"arguments": '{"a":'}), ("[1]", {"arguments": [1]})],
)
@pytest.mark.usefixtures("marks")
async def test_arguments_that_are_no_object(post: Post, arguments: str, read: object) -> None:
    _, answer = await post(PATH, asking(f"<call look>{arguments}</>"))
    assert [block["input"] for block in answer["content"] if block["type"] == "tool_use"] == [read]


@pytest.mark.parametrize(
    ("fields", "reason", "stop"),
    [
        ({}, "end_turn", None),
        ({"max_tokens": 2}, "max_tokens", None),
        ({"stop_sequences": ["nothing", "wor"]}, "stop_sequence", "wor"),
        ({"stop_sequences": ["nothing"]}, "end_turn", None),
    ],
)
async def test_why_it_stopped(post: Post, events: Events, fields: Any, reason: str, stop: str | None) -> None:
    _, answer = await post(PATH, {**ASK, **fields})
    assert (answer["stop_reason"], answer["stop_sequence"]) == (reason, stop)
    _, last = (await events(PATH, {**ASK, **fields}))[-2]
    assert last["delta"] == {"stop_reason": reason, "stop_sequence": stop}
    assert last["usage"]["output_tokens"] == answer["usage"]["output_tokens"]


TEXT = [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "b"}]


@pytest.mark.parametrize(
    ("fields", "read"),
    [
        ({"messages": [{"role": "user", "content": TEXT}]}, "a\nb"),
        ({"system": "brief"}, "brief\n\nhello world"),
        ({"system": TEXT}, "a\nb\n\nhello world"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}, "a\n\nb"),
    ],
)
async def test_what_the_model_reads(post: Post, fields: dict[str, Any], read: str) -> None:
    status, answer = await post(PATH, {**ASK, **fields})
    assert status == 200, answer
    assert answer["content"][0]["text"] == f" [INST] {read} [/INST]"


async def test_a_trailing_answer_is_continued(post: Post) -> None:
    said = [*HI, {"role": "assistant", "content": [{"type": "text", "text": "once"}]}]
    _, answer = await post(PATH, {**ASK, "messages": said})
    assert answer["content"][0]["text"] == f"{ECHOED} once"
    said.append({"role": "assistant", "content": "upon"})
    _, answer = await post(PATH, {**ASK, "messages": said})
    assert answer["content"][0]["text"] == f"{ECHOED} once\nupon"


@pytest.mark.parametrize("role", ["user", "assistant"])
async def test_fields_that_do_no_harm(post: Post, role: str) -> None:
    harmless = {"metadata": {"user_id": "me"}, "service_tier": "auto", "cache_control": {"type": "ephemeral"}}
    _, plain = await post(PATH, ASK)
    status, answer = await post(
        PATH,
        {**ASK, **harmless, "context_management": {"edits": []}, "thinking": {"type": "disabled"}, "mirostat": 0},
        anthropic_version="2030-01-01",
        anthropic_beta="a,b",
    )
    assert (status, answer["content"]) == (200, plain["content"])


BAD: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": None}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "content"),
    ({"system": [{"type": "image"}]}, "type 'image'"),
    ({"temperature": -1}, "temperature"),
    ({"stop_sequences": ["x"] * 65}, "stop strings"),
    ({"thinking": {"type": "much"}}, "thinking.type"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search"),
    ({"tools": [{"name": "f", "input_schema": []}]}, "tools[0].input_schema"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"tool_choice": {"type": "tool"}}, "name"),
    ({"tool_choice": {"type": "tool", "name": "g"}, "tools": [{"name": "f", "input_schema": {}}]}, "'g'"),
    ({"tool_choice": {"type": "maybe"}}, "tool_choice.type"),
]
BAD_BLOCKS: list[tuple[str, dict[str, Any], str]] = [
    ("user", {"type": "image", "source": {}}, "messages[0].content[0]"),
    ("user", {"type": "text"}, "text"),
    ("user", {"type": "tool_use", "id": "1", "name": "f"}, "tool_use"),
    ("user", {"type": "tool_result", "content": "x"}, "tool_use_id"),
    ("user", {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "image"}]}, "image"),
    ("assistant", {"type": "tool_use", "name": "f"}, "id"),
    ("assistant", {"type": "server_tool_use", "name": "f"}, "server_tool_use"),
]


@pytest.mark.parametrize(("fields", "named"), BAD)
@pytest.mark.parametrize("stream", [False, True])
async def test_bad_requests(post: Post, fields: dict[str, Any], named: str, stream: bool) -> None:
    status, answer = await post(PATH, {**ASK, "stream": stream, **fields})
    assert (status, answer["type"]) == (400, "error")
    assert answer["error"].keys() == {"type", "message"}
    assert answer["error"]["type"] == "invalid_request_error"
    assert named in answer["error"]["message"]


@pytest.mark.parametrize(("role", "block", "named"), BAD_BLOCKS)
async def test_bad_blocks(post: Post, role: str, block: dict[str, Any], named: str) -> None:
    for path in (PATH, COUNT):
        status, answer = await post(path, {**ASK, "messages": [{"role": role, "content": [block]}]})
        assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
        assert named in answer["error"]["message"]


async def test_a_body_without_max_tokens(post: Post) -> None:
    status, answer = await post(PATH, {"messages": HI})
    assert status == 400
    assert "max_tokens" in answer["error"]["message"]


async def test_what_would_not_be_kept_is_refused(post: Post) -> None:
    for name in UNSUPPORTED:
        for path in (PATH, COUNT):
            status, answer = await post(path, {**ASK, name: {"asked": "for"}})
            assert (status, answer["type"]) == (400, "error"), name
            assert name in answer["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
async def test_overflow_in_the_words_that_clients_look_for(post: Post, stream: bool) -> None:
    status, answer = await post(PATH, asking("the quick brown fox " * 200, stream=stream))
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
    assert answer["error"]["message"].startswith("prompt is too long")
    assert "maximum context length is 512 tokens" in answer["error"]["message"]


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (405, "invalid_request_error"),
        (413, "request_too_large"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (503, "overloaded_error"),
    ],
)
async def test_the_kind_of_an_error(status: int, kind: str) -> None:
    body = error_body(ApiError(status, ErrorInfo("So it is.", "x")))
    assert body == b'{"type":"error","error":{"type":"' + kind.encode() + b'","message":"So it is."}}'


async def test_errors_before_the_endpoint(model: Path, server: LiveServer, post: Post) -> None:
    async with aiohttp.ClientSession() as session:
        async with session.get(server.url + PATH) as response:
            assert (response.status, (await response.json())["type"]) == (405, "error")
        async with session.post(server.url + PATH, data=b" " * (MAX_BODY + 1)) as response:
            assert (response.status, (await response.json())["error"]["type"]) == (413, "request_too_large")
    assert (await post(PATH, ASK, origin="https://evil.com"))[1]["error"]["type"] == "permission_error"
    rules = AccessRules(key="sesame")
    async with live_server(model, LiveOptions(rules=rules)) as guarded, aiohttp.ClientSession() as session:
        for path in (PATH, COUNT):
            async with session.post(guarded.url + path, json=ASK) as response:
                assert (response.status, (await response.json())["error"]["type"]) == (401, "authentication_error")
            for header in ({"x-api-key": "sesame"}, {"Authorization": "Bearer sesame"}):
                async with session.post(guarded.url + path, json=ASK, headers=header) as response:
                    assert response.status == 200


async def test_a_full_queue_and_silence(model: Path) -> None:
    options = LiveOptions(n_queue=0, ping_seconds=0.02)
    async with (
        live_server(model, options) as server,
        aiohttp.ClientSession() as session,
        session.post(server.url + PATH, json=asking("slowly", stream=True)) as first,
    ):
        assert (await first.content.readline()).startswith(b"event: message_start")
        async with session.post(server.url + PATH, json=ASK) as second:
            assert (second.status, second.headers["Retry-After"]) == (429, "2")
            assert (await second.json())["error"]["type"] == "rate_limit_error"
        async with session.post(f"{server.url}/api/chat", json={"messages": HI}) as second:
            assert (second.status, (await second.json()).keys()) == (429, {"error"})
        while await first.content.readline() != b"event: ping\n":
            pass
        assert await first.content.readline() == b'data: {"type":"ping"}\n'


async def test_an_answer_that_breaks_off(events: Events) -> None:
    named = await events(PATH, asking("bug"))
    assert [name for name, _ in named] == ["message_start", "error"]
    assert named[-1][1]["error"]["type"] == "api_error"


async def test_a_page_may_ask_with_the_clients_headers(server: LiveServer) -> None:
    asked = "anthropic-dangerous-direct-browser-access,anthropic-version,x-api-key,x-stainless-lang"
    headers = {"Origin": "http://localhost:3000", "Access-Control-Request-Headers": asked}
    async with aiohttp.ClientSession() as session, session.options(server.url + PATH, headers=headers) as response:
        assert (response.status, response.headers["Access-Control-Allow-Headers"]) == (200, asked)
