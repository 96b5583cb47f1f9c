"""Ollama's API: lines of JSON, whole documents, what is asked about models, errors."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from slimoe.server.api_error import server_failed
from slimoe.server.dialects.ollama_body import CHAT, GENERATE, OPTIONS
from slimoe.server.dialects.ollama_shape import OllamaShape, error_body
from slimoe.server.http.access import AccessRules
from tests.models.live_server import LiveOptions, LiveServer, live_server, until
from tests.server.dialects.conftest import Post

pytestmark = pytest.mark.asyncio(loop_scope="module")
HI: list[Any] = [{"role": "user", "content": "hello world"}]
ASKS: dict[str, dict[str, Any]] = {"/api/chat": {"messages": HI}, "/api/generate": {"prompt": "hello world"}}
ECHOED = " [INST] hello world [/INST]"
FIGURES = {
    "total_duration",
    "load_duration",
    "prompt_eval_count",
    "prompt_eval_duration",
    "eval_count",
    "eval_duration",
}


async def lines(server: LiveServer, path: str, body: object) -> list[dict[str, Any]]:
    async with (
        aiohttp.ClientSession() as session,
        session.post(server.url + path, data=json.dumps(body)) as response,
    ):
        assert (response.status, response.content_type) == (200, "application/x-ndjson")
        return [json.loads(line) for line in (await response.read()).decode().splitlines()]


def text_of(answer: dict[str, Any]) -> str:
    return str(answer["message"]["content"] if "message" in answer else answer["response"])


@pytest.mark.parametrize("path", ASKS)
async def test_a_stream_of_lines(server: LiveServer, path: str) -> None:
    answers = await lines(server, path, ASKS[path])
    assert len(answers) > 3
    assert "".join(map(text_of, answers)) == ECHOED
    assert [answer["done"] for answer in answers] == [False] * (len(answers) - 1) + [True]
    assert all(not FIGURES & answer.keys() and "done_reason" not in answer for answer in answers[:-1])
    assert {answer["model"] for answer in answers} == {"tiny"}
    times = [datetime.fromisoformat(answer["created_at"]) for answer in answers]
    assert times == sorted(times)
    last = answers[-1]
    assert (last["done_reason"], text_of(last)) == ("stop", "")
    assert (last["prompt_eval_duration"], last["eval_duration"]) == (2_000_000, 4_000_000)
    assert last["total_duration"] >= last["load_duration"] >= 0
    assert last["eval_count"] > 3
    assert last["prompt_eval_count"] > 3


@pytest.mark.parametrize("path", ASKS)
async def test_a_whole_answer(post: Post, path: str) -> None:
    status, answer = await post(path, {**ASKS[path], "stream": False, "keep_alive": "5m"})
    assert (status, answer["done"], answer["done_reason"], text_of(answer)) == (200, True, "stop", ECHOED)
    assert answer.keys() >= FIGURES
    assert ("message" in answer) == (path == "/api/chat")
    _, answer = await post(path, {**ASKS[path], "stream": False, "options": {"num_predict": 2, "num_ctx": 4096}})
    assert (answer["done_reason"], answer["eval_count"]) == ("length", 2)
    for unlimited in (-1, -2):
        _, answer = await post(path, {**ASKS[path], "stream": False, "options": {"num_predict": unlimited}})
        assert answer["done_reason"] == "stop"
    _, answer = await post(path, {**ASKS[path], "stream": False, "options": {"stop": ["wor"]}})
    assert text_of(answer) == " [INST] hello "


@pytest.mark.usefixtures("marks")
async def test_thinking_and_calls(server: LiveServer, post: Post) -> None:
    asked = {"messages": [{"role": "user", "content": '<think>hmm</><call look>{"at": "Paris"}</><call wait>{}</>'}]}
    called = [
        {"id": "call_0", "function": {"name": "look", "arguments": {"at": "Paris"}, "index": 0}},
        {"id": "call_1", "function": {"name": "wait", "arguments": {}, "index": 1}},
    ]
    _, answer = await post("/api/chat", {**asked, "stream": False})
    assert (answer["message"]["thinking"], answer["message"]["tool_calls"]) == ("hmm", called)
    answers = await lines(server, "/api/chat", asked)
    assert "".join(answer["message"].get("thinking", "") for answer in answers) == "hmm"
    assert [answer["message"]["tool_calls"] for answer in answers if "tool_calls" in answer["message"]] == [called]
    assert "tool_calls" in answers[-2]["message"]
    _, answer = await post("/api/generate", {"prompt": "<think>hmm</>", "stream": False})
    assert (answer["thinking"], answer["response"]) == ("hmm", " [INST]  [/INST]")


@pytest.mark.parametrize(
    ("path", "fields", "read"),
    [
        ("/api/chat", {"messages": [{"role": "system", "content": "a"}, *HI]}, " [INST] a\n\nhello world [/INST]"),
        ("/api/chat", {"messages": [*HI, {"role": "assistant", "content": "b"}]}, f"{ECHOED} b"),
        ("/api/generate", {"system": "a"}, " [INST] a\n\nhello world [/INST]"),
        ("/api/generate", {"raw": True}, " hello world"),
    ],
)
async def test_what_the_model_reads(post: Post, path: str, fields: dict[str, Any], read: str) -> None:
    status, answer = await post(path, {**ASKS[path], **fields, "stream": False})
    assert (status, text_of(answer)) == (200, read)


async def test_results_find_their_calls_without_ids(post: Post) -> None:
    calls = [{"function": {"name": name, "arguments": {"n": 1}}} for name in ("look", "wait", "look")]
    results = [{"role": "tool", "tool_name": "look", "content": text} for text in ("sun", "rain")]
    unnamed = {"role": "tool", "content": "done"}
    said = [*HI, {"role": "assistant", "content": "", "tool_calls": calls}, *results, unnamed]
    status, answer = await post("/api/chat", {"messages": said, "stream": False})
    assert status == 200
    text = text_of(answer)
    for result in ("Result of look (call_1_0):\nsun", "Result of look (call_1_2):\nrain", "wait (call_1_1):\ndone"):
        assert result in text


@pytest.mark.parametrize("path", ASKS)
async def test_scores(server: LiveServer, post: Post, path: str) -> None:
    asked = {**ASKS[path], "logprobs": True, "top_logprobs": 2}
    _, answer = await post(path, {**asked, "stream": False})
    assert "".join(score["token"] for score in answer["logprobs"]) == ECHOED
    assert all(len(score["top_logprobs"]) == 2 for score in answer["logprobs"])
    pieces = await lines(server, path, asked)
    assert [score for piece in pieces for score in piece.get("logprobs", ())] == answer["logprobs"]
    assert all("".join(one["token"] for one in piece["logprobs"]) == text_of(piece) for piece in pieces[:-1])


@pytest.mark.parametrize(
    ("path", "body"), [("/api/chat", {}), ("/api/chat", {"messages": []}), ("/api/generate", {"model": "x"})]
)
async def test_asking_for_the_model_alone(server: LiveServer, post: Post, path: str, body: dict[str, Any]) -> None:
    for keep_alive, reason in ((-1, "load"), ("5m", "load"), (0, "unload")):
        status, answer = await post(path, {**body, "keep_alive": keep_alive})
        assert (status, answer["done"], answer["done_reason"], text_of(answer)) == (200, True, reason, "")
    await until(lambda: server.backends.default.supervisor.phase == "asleep")
    async with aiohttp.ClientSession() as session, session.get(f"{server.url}/api/ps") as response:
        assert await response.json() == {"models": []}


async def test_what_is_told_of_models(server: LiveServer, post: Post) -> None:
    await post("/api/generate", {})
    async with aiohttp.ClientSession() as session:
        found = {}
        for name in ("version", "tags", "ps"):
            async with session.get(f"{server.url}/api/{name}") as response:
                assert response.status == 200
                found[name] = await response.json()
    assert tuple(map(int, found["version"]["version"].split("."))) >= (0, 6, 4)
    assert found["version"]["slimoe"] == "1.2.3"
    (tag,), (loaded,) = found["tags"]["models"], found["ps"]["models"]
    assert (tag["name"], tag["model"], len(tag["digest"])) == ("tiny", "tiny", 64)
    assert tag["size"] > 0
    assert (tag["details"]["family"], tag["details"]["format"]) == ("llama", "gguf")
    assert {**loaded, **tag} == loaded
    assert loaded["context_length"] == 512
    status, shown = await post("/api/show", {"model": "tiny"})
    assert (status, shown["details"]) == (200, tag["details"])
    assert "[INST]" in shown["template"]
    assert shown["model_info"]["llama.context_length"] == 512
    assert shown["capabilities"] == ["completion", "tools"]


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("/api/chat", {"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ("/api/chat", {"messages": [{"role": "user"}]}, "content"),
    ("/api/chat", {"messages": [{**HI[0], "images": ["aGk="]}]}, "images"),
    ("/api/chat", {"messages": [{**HI[0], "tool_calls": [{"function": {"name": "f"}}]}]}, "assistant"),
    ("/api/chat", {"tools": [{"function": {}}]}, "tools[0].function"),
    ("/api/chat", {"options": {"temperature": "hot"}}, "options.temperature"),
    ("/api/chat", {"options": {"num_predict": -3}}, "options.num_predict"),
    ("/api/chat", {"options": {"stop": ["x"] * 65}}, "stop"),
    ("/api/chat", {"options": []}, "options"),
    ("/api/chat", {"keep_alive": "soon"}, "keep_alive"),
    ("/api/chat", {"think": "very"}, "think"),
    ("/api/generate", {"raw": True, "system": "a"}, "raw"),
    ("/api/generate", {"images": ["aGk="]}, "images"),
    ("/api/generate", {"template": "{{ .Prompt }}"}, "template"),
    ("/api/generate", {"context": [1, 2]}, "context"),
    ("/api/generate", {"suffix": "b"}, "suffix"),
    ("/api/generate", {"prompt": 5}, "prompt"),
]


@pytest.mark.parametrize(("path", "fields", "named"), BAD)
async def test_bad_requests(post: Post, path: str, fields: dict[str, Any], named: str) -> None:
    status, answer = await post(path, {**ASKS[path], **fields})
    assert status == 400
    assert answer.keys() == {"error"}
    assert named in answer["error"]


async def test_what_would_not_be_kept_is_refused(post: Post) -> None:
    for path, table in (("/api/chat", CHAT), ("/api/generate", GENERATE)):
        for name in table:
            status, answer = await post(path, {**ASKS[path], name: {"asked": "for"}})
            assert status == 400, name
            assert name in answer["error"]
    for name in OPTIONS:
        status, answer = await post("/api/chat", {**ASKS["/api/chat"], "options": {name: {"asked": "for"}}})
        assert status == 400, name
        assert name in answer["error"]


async def test_errors_are_texts(model: Path, server: LiveServer, post: Post) -> None:
    status, answer = await post("/api/chat", {"messages": [{"role": "user", "content": "the quick fox " * 300}]})
    assert (status, "maximum context length is 512 tokens" in answer["error"]) == (400, True)
    status, answer = await post("/api/chat", {"messages": [{"role": "user", "content": "bug"}]})
    assert (status, answer["error"].startswith("The engine failed")) == (500, True)
    assert list(OllamaShape("tiny", is_chat=True).failure([], server_failed())) == [error_body(server_failed())]
    for path in ("/api/pull", "/api/embed", "/api/embeddings", "/api/create"):
        status, answer = await post(path, {"model": "tiny"})
        assert (status, path in answer["error"]) == (501, True)
    async with (
        live_server(model, LiveOptions(rules=AccessRules(key="sesame"))) as guarded,
        aiohttp.ClientSession() as session,
        session.get(f"{guarded.url}/api/tags") as response,
    ):
        assert (response.status, (await response.json()).keys()) == (401, {"error"})


async def test_several_models(model: Path) -> None:
    async with live_server(model, others={"second": model}) as server, aiohttp.ClientSession() as session:
        async with session.get(f"{server.url}/api/tags") as response:
            assert [entry["name"] for entry in (await response.json())["models"]] == ["tiny", "second"]
        asked = {"messages": HI, "stream": False}
        for name in ("second", "second:latest"):
            async with session.post(f"{server.url}/api/chat", json={"model": name, **asked}) as response:
                assert (response.status, (await response.json())["model"]) == (200, "second")
        async with session.get(f"{server.url}/api/ps") as response:
            assert [entry["name"] for entry in (await response.json())["models"]] == ["second"]
        async with session.post(f"{server.url}/api/chat", json={"model": "third", **asked}) as response:
            assert (response.status, (await response.json()).keys()) == (404, {"error"})
        body = {"model": "third", "max_tokens": 5, "messages": HI}
        async with session.post(f"{server.url}/v1/messages", json=body) as response:
            assert (response.status, (await response.json())["error"]["type"]) == (404, "not_found_error")
