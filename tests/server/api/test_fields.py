"""Fields beyond the common ones: what is honoured, what is refused because it would not be kept, what does no harm."""

import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from slimoe.server.api.unsupported_fields import CHAT, COMPLETION, SAMPLERS
from tests.models.live_server import LiveServer, live_server

pytestmark = pytest.mark.asyncio(loop_scope="module")
HELLO: list[Any] = [{"role": "user", "content": "hello world"}]
ASKS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": HELLO},
    "/v1/completions": {"prompt": "hello world"},
    "/apply-template": {"messages": HELLO},
}
CONSTRAINTS: dict[str, Any] = {
    "grammar_triggers": [{"type": "word", "value": "x"}],
    "structural_tag": {"structures": []},
    "guided_whitespace_pattern": " ",
    "format": "json",
    "text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "integer"}}},
    "output_config": {"format": {"type": "json_schema", "schema": {"type": "integer"}}},
    "json_mode": True,
    "structured_output": {"type": "integer"},
    "guidance": {"regex": "a"},
    "thinking_budget_tokens": 5,
    "min_tokens": 5,
    "max_new_tokens": 5,
    "num_predict": 5,
    "t_max_predict_ms": 100,
    "stop_token_ids": [5],
    "stop_sequences": ["a"],
    "include_stop_str_in_output": True,
    "bad_words": ["a"],
    "allowed_token_ids": [5],
    "logits_processors": ["x"],
    "no_repeat_ngram_size": 2,
    "use_beam_search": True,
    "best_of": 3,
    "documents": [{"title": "a"}],
    "system": "be brief",
    "chat_template": "{{ messages }}",
    "truncate_prompt_tokens": 3,
    "prompt_logprobs": 0,
    "n_probs": 5,
    "skip_special_tokens": False,
    "modalities": ["text", "audio"],
    "audio": {"voice": "alloy"},
    "images": ["x"],
    "web_search_options": {},
    "lora": [{"id": 0, "scale": 1.0}],
    "options": {"num_predict": 3},
}
HARMLESS: dict[str, Any] = {
    "user": "me",
    "metadata": {"a": "b"},
    "store": True,
    "unheard_of": [1],
    "seed": -1,
    "top_k": -1,
    "modalities": ["text"],
    "prediction": {"type": "content", "content": "x"},
    "parallel_tool_calls": True,
    "cache_prompt": True,
    "text": {"format": {"type": "text"}},
    "thinking_budget_tokens": -1,
    "skip_special_tokens": True,
    "num_beams": 1,
    "response_format": {"type": "text"},
    "typical_p": 0.5,
}


async def post(server: LiveServer, path: str, body: object) -> tuple[int, Any]:
    async with aiohttp.ClientSession() as session, session.post(server.url + path, json=body) as response:
        return response.status, await response.json()


@pytest.mark.parametrize("path", ASKS)
@pytest.mark.parametrize("name", CONSTRAINTS)
async def test_what_would_not_be_kept_is_refused(server: LiveServer, path: str, name: str) -> None:
    status, answer = await post(server, path, {**ASKS[path], name: CONSTRAINTS[name]})
    assert (status, answer["error"]["param"]) == (400, name)
    assert (answer["error"]["type"], answer["error"]["code"]) == ("not_supported_error", "unsupported_value")


@pytest.mark.parametrize("path", ASKS)
async def test_every_field_of_the_table_is_refused(server: LiveServer, path: str) -> None:
    for name in COMPLETION if path == "/v1/completions" else CHAT:
        status, answer = await post(server, path, {**ASKS[path], name: {"asked": "for"}})
        assert (status, answer["error"]["param"]) == (400, name)
        assert answer["error"]["message"].startswith(f"The field {name} is not supported. ")


@pytest.mark.parametrize("path", ASKS)
async def test_values_that_ask_for_nothing_are_fine(server: LiveServer, path: str) -> None:
    names = [name for name in CONSTRAINTS if name not in ("skip_special_tokens", "prompt_logprobs", "best_of")]
    nothings: list[Any] = [None, {}, [], "", 0, False]
    for nothing in nothings:
        for name in names if nothing is None else ("format", "min_tokens", "stop_token_ids", "documents", "bad_words"):
            status, answer = await post(server, path, {**ASKS[path], name: nothing})
            assert status == 200, (name, nothing, answer)


@pytest.mark.parametrize("path", ASKS)
async def test_values_that_cannot_be_read_are_refused(server: LiveServer, path: str) -> None:
    start = json.dumps(ASKS[path]).encode()[:-1]
    async with aiohttp.ClientSession() as session:
        for value in (b'"\xff"', b"1e999"):
            async with session.post(server.url + path, data=start + b', "min_tokens": ' + value + b"}") as response:
                assert response.status == 400
                assert (await response.json())["error"]["param"] == "min_tokens"
        async with session.post(server.url + path, data=start + b', "mirostat": 1e999, "max_tokens": 1}') as response:
            assert response.status == 200


@pytest.mark.parametrize("path", ASKS)
async def test_harmless_fields_change_nothing(server: LiveServer, path: str) -> None:
    _, plain = await post(server, path, ASKS[path])
    status, answer = await post(server, path, {**ASKS[path], **HARMLESS})
    assert status == 200, answer
    assert answer.get("choices") == plain.get("choices")
    assert answer.get("prompt") == plain.get("prompt")


async def test_ways_of_sampling_that_are_not_ours_are_told_once(model: Path, caplog: Any) -> None:
    async with live_server(model) as server:
        for _ in range(2):
            for name in SAMPLERS:
                for value in (3, 0, None):
                    status, _ = await post(server, "/v1/chat/completions", {"messages": HELLO, name: value})
                    assert status == 200
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == len(set(lines)) == len(SAMPLERS)
    assert all(line.endswith("which this server does not sample by.") for line in lines)


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens", "n_predict"])
async def test_every_spelling_of_the_limit(server: LiveServer, name: str) -> None:
    for path, ask in (("/v1/chat/completions", HELLO), ("/v1/completions", "hello world")):
        prompt = {"messages" if path.endswith("chat/completions") else "prompt": ask}
        _, answer = await post(server, path, {**prompt, name: 1})
        assert (answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]) == (1, "length")
    _, answer = await post(server, "/v1/completions", {"prompt": "one two three four five six seven", name: -1})
    assert answer["choices"][0]["text"] == " one two three four five six seven"
    assert answer["usage"]["completion_tokens"] > 16
    assert answer["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"continue_final_message": True}, "continue_final_message"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
        ({"chat_template_kwargs": {"tools": [{}]}}, "chat_template_kwargs.tools"),
        ({"chat_template_kwargs": {"documents": [{}]}}, "chat_template_kwargs.documents"),
    ],
)
async def test_where_an_answer_begins(server: LiveServer, fields: dict[str, Any], param: str) -> None:
    status, answer = await post(server, "/v1/chat/completions", {"messages": HELLO, **fields})
    assert (status, answer["error"]["param"]) == (400, param)


async def test_a_message_that_is_continued(server: LiveServer) -> None:
    said: list[Any] = [*HELLO, {"role": "assistant", "content": "once"}]
    wanted = {"continue_final_message": True, "add_generation_prompt": False}
    status, answer = await post(server, "/v1/chat/completions", {"messages": said, **wanted})
    assert (status, answer["choices"][0]["message"]["content"]) == (200, " [INST] hello world [/INST] once")
    status, answer = await post(server, "/v1/chat/completions", {"messages": said, "continue_final_message": False})
    assert (status, answer["error"]["param"]) == (400, "continue_final_message")
    both = {"continue_final_message": True, "add_generation_prompt": True}
    status, answer = await post(server, "/v1/chat/completions", {"messages": said, **both})
    assert (status, answer["error"]["param"]) == (400, "add_generation_prompt")
    _, answer = await post(server, "/apply-template", {"messages": said, "add_generation_prompt": False})
    assert answer["prompt"] == "<s>[INST] hello world [/INST] once</s>"


@pytest.mark.parametrize(
    ("body", "value", "n_values", "param"),
    [
        ('{"messages": [{"role": "user", "content": "x"}], "logit_bias": {#}}', '"1":1', 1_000_000, "logit_bias"),
        ('{"messages": [#]}', '{"role":"user","content":""}', 200_000, "messages"),
        ('{"messages": [{"role": "user", "content": "x"}], "stop": [#]}', '""', 500_000, "stop"),
    ],
)
async def test_very_many_values_are_refused_unread(
    server: LiveServer, body: str, value: str, n_values: int, param: str
) -> None:
    data = body.replace("#", ",".join([value] * n_values)).encode()
    url = f"{server.url}/v1/chat/completions"
    async with aiohttp.ClientSession() as session, session.post(url, data=data) as response:
        error = (await response.json())["error"]
        assert (response.status, error["param"]) == (400, param)
    assert error["message"] == f"{param} holds too many values: a body may have 100,000 in all."
