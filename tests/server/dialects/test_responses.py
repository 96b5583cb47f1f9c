"""OpenAI's `/v1/responses` on the wire and as OpenAI's own client sees it."""

from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from openai.types.responses import ResponseFunctionToolCall, ResponseOutputMessage, ResponseReasoningItem

from slimoe.server.dialects.responses_body import UNSUPPORTED
from tests.server.dialects.conftest import Events, Post

pytestmark = pytest.mark.asyncio(loop_scope="module")
PATH, COUNT = "/v1/responses", "/v1/responses/input_tokens"
ASK: dict[str, Any] = {"model": "any", "input": "hello world"}
ECHOED = " [INST] hello world [/INST]"
CALLING = '<think>hmm</> Now <call look>{"at": "Paris"}</><call wait>{}</>'
LOOK: Any = {"type": "function", "name": "look", "parameters": {"type": "object"}, "strict": False}


async def test_a_whole_answer(client: AsyncOpenAI) -> None:
    answer = await client.responses.create(**ASK, instructions="brief", metadata={"a": "b"})
    assert answer.id.startswith("resp_")
    assert (answer.object, answer.status, answer.model, answer.error) == ("response", "completed", "tiny", None)
    assert answer.output_text == " [INST] brief\n\nhello world [/INST]"
    (item,) = answer.output
    assert isinstance(item, ResponseOutputMessage)
    assert item.id.startswith("msg_")
    assert (item.role, item.status, len(item.content)) == ("assistant", "completed", 1)
    assert (answer.instructions, answer.metadata, answer.store) == ("brief", {"a": "b"}, False)
    assert (answer.tool_choice, answer.parallel_tool_calls) == ("auto", True)
    assert answer.usage is not None
    assert answer.usage.input_tokens_details.cached_tokens == 1
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    counted = await client.responses.input_tokens.count(**ASK, instructions="brief")
    assert (counted.input_tokens, counted.object) == (answer.usage.input_tokens, "response.input_tokens")


async def test_tools_are_given_back(client: AsyncOpenAI) -> None:
    choice: Any = {"type": "function", "name": "look"}
    for given in ("auto", "none", "required", choice):
        answer = await client.responses.create(**ASK, tools=[LOOK], tool_choice=given, parallel_tool_calls=False)
        assert [tool.to_dict() for tool in answer.tools] == [LOOK]
        told: Any = answer.tool_choice
        assert (told if isinstance(told, str) else told.to_dict()) == given
        assert not answer.parallel_tool_calls


async def test_events_in_their_order(events: Events) -> None:
    named = await events(PATH, ASK)
    names = [name.removeprefix("response.") for name, _ in named]
    n_deltas = names.count("output_text.delta")
    assert n_deltas > 2
    assert names == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        *["output_text.delta"] * n_deltas,
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    documents = [document for _, document in named]
    assert [document["sequence_number"] for document in documents] == list(range(len(documents)))
    first, last = documents[0]["response"], documents[-1]["response"]
    assert (first["status"], first["output"], first["usage"]) == ("in_progress", [], None)
    ended = ("status", "output", "usage", "timings", "tiers", "memory")
    assert {**first, **{name: last[name] for name in ended}} == last
    assert (last["timings"]["predicted_n"], last["tiers"]["hits"]) == (last["usage"]["output_tokens"], 3)
    assert last["output"] == [documents[-2]["item"]]
    assert {document["item_id"] for document in documents if "item_id" in document} == {last["output"][0]["id"]}
    text = "".join(document["delta"] for document in documents[4 : 4 + n_deltas])
    assert text == documents[-4]["text"] == documents[-3]["part"]["text"] == ECHOED


@pytest.mark.usefixtures("marks")
async def test_reasoning_and_calls(client: AsyncOpenAI) -> None:
    answer = await client.responses.create(model="any", input=CALLING)
    reasoning, message, look, wait = answer.output
    assert isinstance(reasoning, ResponseReasoningItem)
    assert reasoning.content is not None
    assert (reasoning.content[0].text, reasoning.summary) == ("hmm", [])
    assert isinstance(message, ResponseOutputMessage)
    assert answer.output_text == " [INST]  Now  [/INST]"
    assert isinstance(look, ResponseFunctionToolCall)
    assert (look.name, look.arguments, look.call_id) == ("look", '{"at": "Paris"}', "call_0")
    assert isinstance(wait, ResponseFunctionToolCall)
    ids = [item.id or "" for item in answer.output]
    assert [id.partition("_")[0] for id in ids] == ["rs", "msg", "fc", "fc"]
    assert answer.usage is not None
    assert answer.usage.output_tokens_details.reasoning_tokens > 0


@pytest.mark.usefixtures("marks")
async def test_reasoning_and_calls_as_events(client: AsyncOpenAI) -> None:
    names = []
    async with client.responses.stream(model="any", input=CALLING) as stream:
        async for event in stream:
            names.append(event.type.removeprefix("response."))
        answer = await stream.get_final_response()
    kinds = [item.type for item in answer.output]
    assert kinds == ["message", "reasoning", "message", "function_call", "function_call", "message"]
    begin = names.index("reasoning_text.delta") - 2
    assert names[begin : begin + 6] == [
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
    ]
    begin = names.index("function_call_arguments.delta") - 1
    assert names[begin : begin + 5] == [
        "output_item.added",
        *["function_call_arguments.delta"] * 2,
        "function_call_arguments.done",
        "output_item.done",
    ]
    look = answer.output[3]
    assert isinstance(look, ResponseFunctionToolCall)
    assert (look.name, look.arguments, look.status) == ("look", '{"at": "Paris"}', "completed")


@pytest.mark.usefixtures("marks")
@pytest.mark.parametrize("stream", [False, True])
async def test_functions_in_a_namespace(post: Post, events: Events, stream: bool) -> None:
    tools = [LOOK, {"type": "namespace", "name": "sky", "description": "d", "tools": [LOOK]}]
    asked = {"input": '<call sky__look>{"at": 1}</><call look>{}</>', "tools": tools}
    answer = (await events(PATH, asked))[-1][1]["response"] if stream else (await post(PATH, asked))[1]
    assert answer["tools"] == tools
    called = [item for item in answer["output"] if item["type"] == "function_call"]
    assert [(item["name"], item.get("namespace")) for item in called] == [("look", "sky"), ("look", None)]
    result = {"type": "function_call_output", "call_id": called[0]["call_id"], "output": "sun"}
    _, answer = await post(PATH, {"input": [{"role": "user", "content": "go"}, called[0], result]})
    assert "Result of sky__look (call_0):\nsun" in answer["output"][0]["content"][0]["text"]


async def test_an_answer_cut_short(client: AsyncOpenAI, events: Events) -> None:
    answer = await client.responses.create(**ASK, max_output_tokens=2)
    assert answer.status == "incomplete"
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    name, last = (await events(PATH, {**ASK, "max_output_tokens": 2}))[-1]
    assert (name, last["response"]["status"]) == ("response.incomplete", "incomplete")
    assert [item["status"] for item in last["response"]["output"]] == ["incomplete"]
    assert last["response"]["usage"]["output_tokens"] == 2


async def test_an_answer_that_says_nothing(post: Post, events: Events) -> None:
    body = {**ASK, "stop": " ["}
    _, answer = await post(PATH, body)
    assert [part["text"] for part in answer["output"][0]["content"]] == [""]
    last = (await events(PATH, body))[-1][1]["response"]
    assert (last["status"], last["output"][0]["content"]) == ("completed", answer["output"][0]["content"])


@pytest.mark.parametrize("stream", [False, True])
async def test_scores(client: AsyncOpenAI, events: Events, stream: bool) -> None:
    asked: dict[str, Any] = {**ASK, "include": ["message.output_text.logprobs"], "top_logprobs": 2}
    if stream:
        last = next(document for name, document in await events(PATH, asked) if name == "response.output_text.done")
        scores, text = last["logprobs"], last["text"]
    else:
        answer = await client.responses.create(**asked)
        message = answer.output[0].to_dict()
        content: Any = message["content"]
        scores, text = content[0]["logprobs"], content[0]["text"]
    assert "".join(score["token"] for score in scores) == text
    assert all(len(score["top_logprobs"]) == 2 for score in scores)


async def test_progress_and_times_when_asked_to(events: Events) -> None:
    named = await events("/responses", {**ASK, "return_progress": True, "timings_per_token": True})
    progress = [document["prompt_progress"] for name, document in named if "prompt_progress" in document]
    assert progress
    assert all(one["total"] >= one["processed"] >= one["cache"] for one in progress)
    timed = [name for name, document in named if "timings" in document]
    assert {"response.output_text.delta", "response.completed"} == set(timed)
    plain = await events(PATH, ASK)
    assert all("prompt_progress" not in document and "timings" not in document for _, document in plain)


def said(role: str, text: str, kind: str = "input_text") -> dict[str, Any]:
    return {"role": role, "content": [{"type": kind, "text": text}]}


@pytest.mark.parametrize(
    ("items", "read"),
    [
        ([{"role": "user", "content": "a"}], " [INST] a [/INST]"),
        ([{"type": "message", **said("user", "a")}], " [INST] a [/INST]"),
        ([said("developer", "a"), said("user", "b")], " [INST] a\n\nb [/INST]"),
        ([said("user", "a"), said("assistant", "b", "output_text")], " [INST] a [/INST] b"),
        (
            [
                said("user", "a"),
                {"type": "reasoning", "id": "rs_1", "summary": []},
                said("assistant", "b"),
                said("user", "c"),
            ],
            " [INST] a [/INST] b [INST] c [/INST]",
        ),
    ],
)
async def test_what_the_model_reads(client: AsyncOpenAI, items: Any, read: str) -> None:
    assert (await client.responses.create(model="", input=items)).output_text == read


async def test_fields_that_do_no_harm(client: AsyncOpenAI) -> None:
    harmless: Any = {
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "a",
        "reasoning": {"effort": "low", "summary": "auto"},
        "safety_identifier": "me",
        "service_tier": "auto",
        "store": True,
        "text": {"format": {"type": "text"}, "verbosity": "low"},
        "truncation": "auto",
        "user": "me",
    }
    answer = await client.responses.create(**ASK, **harmless)
    assert answer.output_text == ECHOED
    assert answer.reasoning is not None
    assert answer.reasoning.effort == "low"


BAD: list[tuple[dict[str, Any], str]] = [
    ({"input": None}, "input"),
    ({"input": []}, "input"),
    ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
    ({"input": [{"role": "user"}]}, "input[0].content"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
    ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0]"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]"),
    ({"input": [{"type": "web_search_call", "id": "ws_1"}]}, "input[0]"),
    ({"input": [{"type": "function_call", "name": "f"}]}, "input[0]"),
    ({"input": [{"type": "function_call_output", "call_id": "1"}]}, "input[0]"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_logprobs": 21}, "top_logprobs"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "custom", "name": "f"}]}, "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "tools[0].name"),
    ({"tools": [{"type": "namespace", "name": "a", "tools": [{"type": "custom"}]}]}, "tools[0].tools[0].type"),
    ({"tools": [LOOK, {"type": "namespace", "name": "a", "tools": [{**LOOK, "name": "?"}]}]}, "tools[1].tools[0].name"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": "perhaps"}, "tool_choice"),
    ({"tool_choice": {"type": "web_search"}}, "tool_choice"),
    ({"tool_choice": {"type": "function", "name": "f"}, "tools": [LOOK]}, "tool_choice"),
    (
        {"tool_choice": {"type": "allowed_tools", "mode": "required", "tools": []}, "tools": [LOOK]},
        "tool_choice",
    ),
    (
        {"tool_choice": {"type": "allowed_tools", "tools": [LOOK, {"name": "f"}]}, "tools": [LOOK]},
        "tool_choice.tools[1]",
    ),
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"background": True}, "background"),
    ({"conversation": "conv_1"}, "conversation"),
]


@pytest.mark.parametrize(("fields", "param"), BAD)
@pytest.mark.parametrize("stream", [False, True])
async def test_bad_requests(post: Post, fields: dict[str, Any], param: str, stream: bool) -> None:
    status, answer = await post(PATH, {**ASK, "stream": stream, **fields})
    assert (status, answer["error"]["param"]) == (400, param), answer
    assert answer["error"]["type"] in ("invalid_request_error", "not_supported_error")


async def test_what_would_not_be_kept_is_refused(post: Post) -> None:
    for name in UNSUPPORTED:
        for path in (PATH, COUNT):
            status, answer = await post(path, {**ASK, name: {"asked": "for"}})
            assert (status, answer["error"]["param"], answer["error"]["code"]) == (400, name, "unsupported_value")
    assert (await post(PATH, {**ASK, "background": False, "previous_response_id": None}))[0] == 200


async def test_overflow(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        await client.responses.create(model="", input="the quick brown fox " * 200)
    assert (error.value.code, error.value.param) == ("context_length_exceeded", "input")


async def test_an_answer_that_breaks_off(client: AsyncOpenAI, events: Events) -> None:
    named = await events(PATH, {"input": "bug"})
    assert [name for name, _ in named] == ["response.created", "response.in_progress", "error", "response.failed"]
    assert [document["sequence_number"] for _, document in named] == [0, 1, 2, 3]
    failed = named[-1][1]["response"]
    assert (failed["status"], failed["error"]["code"]) == ("failed", "server_error")
    with pytest.raises(openai.APIError):
        async for _ in await client.responses.create(model="", input="bug", stream=True):
            pass
