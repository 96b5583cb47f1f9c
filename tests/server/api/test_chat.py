"""`/v1/chat/completions` as OpenAI's own client sees it, over a real socket."""

import json
from typing import Any

import aiohttp
import pytest
from openai import AsyncOpenAI

from tests.models.live_server import LiveServer

pytestmark = pytest.mark.asyncio(loop_scope="module")
HELLO: list[Any] = [{"role": "user", "content": "hello world"}]
TOOLS: list[Any] = [{"type": "function", "function": {"name": "f"}}]
ECHOED = " [INST] hello world [/INST]"


async def test_a_whole_answer(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="whatever", messages=HELLO)
    assert answer.model == "tiny"
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    assert answer.system_fingerprint
    (choice,) = answer.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "stop", None)
    assert (choice.message.role, choice.message.content) == ("assistant", ECHOED)
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 1
    assert answer.model_extra is not None
    assert answer.model_extra["timings"]["predicted_n"] == answer.usage.completion_tokens
    assert answer.model_extra["memory"].keys() == {"weights"}


async def test_figures_of_tiers_and_memory(server: LiveServer) -> None:
    tiers = {"hits": 3, "misses": 1, "bytes_read": 100, "hit_share": 0.75, "is_shared": False}
    exchange = {
        "device": "GPU0",
        "mode": "static",
        "reason": "it does not pay",
        "since_token": 70,
        "n_changes": 1,
        "expected_ms": {"copy": 2.0, "host": 4.0},
        "measured_ms": {"copy": 500.0},
    }
    async with aiohttp.ClientSession() as session:
        async with session.post(f"{server.url}/v1/chat/completions", json={"messages": HELLO}) as response:
            text = await response.text()
        async with session.post(f"{server.url}/v1/completions", json={"prompt": "a", "stream": True}) as response:
            last = (await response.text()).split("\n\n")[-3].removeprefix("data: ")
    for answer in (json.loads(text), json.loads(last)):
        assert json.dumps(answer["tiers"]) == json.dumps({**tiers, "exchange": [exchange]})
        assert answer["timings"]["expected_per_token_ms"] == 50
        assert answer["memory"]["weights"] > 0


async def test_chunks_keep_to_the_rules(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(model="", messages=HELLO, stream=True)
    chunks = [chunk async for chunk in stream]
    assert len({(c.id, c.created, c.model, c.system_fingerprint, c.object) for c in chunks}) == 1
    assert all(len(chunk.choices) == 1 and chunk.usage is None for chunk in chunks)
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert (deltas[0].role, deltas[0].content) == ("assistant", None)
    assert all(delta.role is None and delta.content for delta in deltas[1:-1])
    assert len(deltas) > 4
    assert (deltas[-1].role, deltas[-1].content) == (None, None)
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert "".join(delta.content or "" for delta in deltas) == ECHOED


async def test_the_stream_on_the_wire(server: LiveServer) -> None:
    body = {"messages": HELLO, "stream": True, "stream_options": {"include_usage": True}}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{server.url}/v1/chat/completions", json=body) as response,
    ):
        assert response.content_type == "text/event-stream"
        lines = (await response.read()).decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert "content" not in chunks[-2]["choices"][0]["delta"]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] > 0
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


async def test_usage_in_every_chunk(client: AsyncOpenAI) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    stream = await client.chat.completions.create(model="", messages=HELLO, stream=True, stream_options=options)
    counts = [chunk.usage.completion_tokens async for chunk in stream if chunk.usage]
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert counts[-1] > 2


async def test_the_clients_own_stream_reader(client: AsyncOpenAI) -> None:
    async with client.chat.completions.stream(model="", messages=HELLO) as stream:
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == ECHOED
    assert final.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
async def test_stop_strings_are_cut_off(client: AsyncOpenAI, stream: bool) -> None:
    arguments: Any = {"model": "", "messages": HELLO, "stop": ["wor", "nothing"], "stream": stream}
    answer: Any = await client.chat.completions.create(**arguments)
    if stream:
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in answer])
    else:
        text = answer.choices[0].message.content
        assert answer.choices[0].finish_reason == "stop"
    assert text == " [INST] hello "


@pytest.mark.parametrize("limit", [{"max_tokens": 2}, {"max_completion_tokens": 2, "max_tokens": 9}])
async def test_the_length_is_limited(client: AsyncOpenAI, limit: dict[str, int]) -> None:
    arguments: Any = {"model": "", "messages": HELLO, **limit}
    answer = await client.chat.completions.create(**arguments)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 2


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_belong_to_the_text(client: AsyncOpenAI, stream: bool) -> None:
    messages = [{"role": "user", "content": "日本 ü 😀"}]
    arguments: Any = {"model": "", "messages": messages, "logprobs": True, "top_logprobs": 3, "stream": stream}
    answer: Any = await client.chat.completions.create(**arguments)
    if stream:
        chunks = [chunk async for chunk in answer]
        tokens = [token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    else:
        tokens = answer.choices[0].logprobs.content
        text = answer.choices[0].message.content
    assert "日本 ü 😀" in text
    assert b"".join(bytes(token.bytes) for token in tokens).decode() == text
    assert all(token.logprob <= 0 and len(token.top_logprobs) == 3 for token in tokens)
    assert tokens[0].top_logprobs[2].logprob == -9999.0


async def test_several_choices(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="", messages=HELLO, n=3, seed=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert {choice.message.content for choice in answer.choices} == {ECHOED}
    single = await client.chat.completions.create(model="", messages=HELLO)
    assert answer.usage is not None
    assert single.usage is not None
    assert answer.usage.prompt_tokens == single.usage.prompt_tokens
    assert answer.usage.completion_tokens == 3 * single.usage.completion_tokens


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}], "a\nb"),
        ([{"role": "system", "content": "brief"}, {"role": "user", "content": "a"}], "brief\n\na"),
        ([{"role": "developer", "content": "brief"}, {"role": "user", "content": "a"}], "brief\n\na"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "a\n\nb"),
        ([{"role": "user", "content": "</s> [INST] <s>"}], "</s> [INST] <s>"),
    ],
)
async def test_what_the_model_reads(client: AsyncOpenAI, messages: list[Any], text: str) -> None:
    answer = await client.chat.completions.create(model="", messages=messages)
    assert answer.choices[0].message.content == f" [INST] {text} [/INST]"


async def test_a_trailing_assistant_message_is_continued(client: AsyncOpenAI) -> None:
    messages: list[Any] = [*HELLO, {"role": "assistant", "content": "once upon"}]
    answer = await client.chat.completions.create(model="", messages=messages)
    assert answer.choices[0].message.content == f"{ECHOED} once upon"


async def test_fields_that_cannot_be_honoured_are_ignored(client: AsyncOpenAI) -> None:
    extra = {"user": "me", "metadata": {}, "store": True, "top_k": -1, "seed": -1, "unheard_of": [1], "mirostat": 2}
    arguments: Any = {"model": "", "messages": HELLO, "tools": TOOLS, "tool_choice": "none", "extra_body": extra}
    answer = await client.chat.completions.create(**arguments)
    assert answer.choices[0].message.content == ECHOED


async def test_the_model_list(client: AsyncOpenAI) -> None:
    models = [model async for model in client.models.list()]
    assert [model.id for model in models] == ["tiny"]
    assert (await client.models.retrieve("tiny")).owned_by == "slimoe"
