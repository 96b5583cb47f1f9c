"""Tools and reasoning in chats, over an engine that says again what it is told: what comes, and what is refused."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
import pytest_asyncio
from openai import AsyncOpenAI, BadRequestError

from slimoe.server.dialects.chat_tools import ChatTool, ChatToolChoice, ToolsBody, tools_of
from tests.models.live_server import LiveOptions, LiveServer, live_server

pytestmark = pytest.mark.asyncio(loop_scope="module")
ECHO = """{# <tool_call> <think> #}{% for tool in tools or [] %}{{ tool.function | tojson }}
{% endfor %}{% for m in messages %}{% if m.role == 'tool' or m.tool_calls %}({{ m.role }}: {{ m.content }}
{%- for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}){% else %}{{ m.content }}{% endif %}
{%- endfor %}{% if enable_thinking is defined and not enable_thinking %}no thought{% endif %}{{ reasoning_effort }}"""
WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
TOOLS: list[Any] = [{"type": "function", "function": WEATHER}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
SAID = f"<think>\nHm.\n</think>\n\nSo.\n{CALL}\n{CALL}"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(model: Path) -> AsyncIterator[LiveServer]:
    async with live_server(model, LiveOptions(chat_template=ECHO)) as server:
        yield server


def asked(text: str, **more: Any) -> Any:
    return {"model": "", "messages": [{"role": "user", "content": text}], **more}


async def posted(server: LiveServer, path: str, body: Any) -> Any:
    async with aiohttp.ClientSession() as session, session.post(f"{server.url}{path}", json=body) as response:
        return response.status, await response.json()


async def test_a_whole_answer_with_reasoning_and_calls(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(**asked(SAID, tools=TOOLS))
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is not None
    assert choice.message.content.endswith("So.")
    assert choice.message.model_extra is not None
    assert choice.message.model_extra["reasoning_content"] == "Hm."
    assert choice.message.tool_calls is not None
    assert [call.model_dump() for call in choice.message.tool_calls] == [
        {"id": call.id, "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
        for call in choice.message.tool_calls
    ]
    assert len({call.id for call in choice.message.tool_calls}) == 2


async def test_a_stream_with_reasoning_and_calls(client: AsyncOpenAI) -> None:
    whole = await client.chat.completions.create(**asked(SAID, tools=TOOLS))
    stream = await client.chat.completions.create(**asked(SAID, tools=TOOLS, stream=True, logprobs=True))
    chunks = [chunk.choices[0] async for chunk in stream]
    deltas = [choice.delta for choice in chunks]
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    assert "".join((delta.model_extra or {}).get("reasoning_content", "") for delta in deltas) == "Hm."
    calls = [call for delta in deltas for call in delta.tool_calls or []]
    assert [call.index for call in calls if call.id] == [0, 1]
    for number in (0, 1):
        first, *rest = [call for call in calls if call.index == number]
        assert first.type == "function"
        assert first.function is not None
        assert (first.function.name, first.function.arguments) == ("weather", "")
        assert all(call.id is None and call.function and call.function.name is None for call in rest)
        text = "".join(call.function.arguments or "" for call in rest if call.function)
        assert json.loads(text) == {"city": "Paris"}
        assert len(rest) > 2
    assert [choice.finish_reason for choice in chunks] == [None] * (len(chunks) - 1) + ["tool_calls"]
    scored = await client.chat.completions.create(**asked(SAID, tools=TOOLS, logprobs=True))
    assert scored.choices[0].logprobs is not None
    streamed = [token for choice in chunks if choice.logprobs for token in choice.logprobs.content or []]
    assert [token.token for token in streamed] == [token.token for token in scored.choices[0].logprobs.content or []]


async def test_reasoning_stays_in_the_text_if_wanted(client: AsyncOpenAI) -> None:
    extra = {"reasoning_format": "none"}
    answer = await client.chat.completions.create(**asked("<think>Hm.</think>So.", extra_body=extra))
    assert answer.choices[0].message.content is not None
    assert answer.choices[0].message.content.strip() == "<think>Hm.</think>So."
    answer = await client.chat.completions.create(**asked("<think>Hm.</think>So."))
    assert answer.choices[0].message.content == "So."
    answer = await client.chat.completions.create(**asked("<think>Hm.", max_tokens=200))
    assert answer.choices[0].message.content == ""
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"reasoning_effort": "high"}, "Hihigh"),
        ({"reasoning_effort": "none"}, "Hino thoughtnone"),
        ({"reasoning": {"effort": "low"}}, "Hilow"),
        ({"reasoning": {"enabled": False}}, "Hino thought"),
        ({"enable_thinking": False}, "Hino thought"),
        ({"chat_template_kwargs": {"enable_thinking": False, "reasoning_effort": "x"}}, "Hino thoughtx"),
    ],
)
async def test_how_much_is_thought_is_told_to_the_template(server: LiveServer, fields: Any, text: str) -> None:
    status, answer = await posted(server, "/apply-template", {**asked("Hi"), **fields})
    assert (status, answer["prompt"]) == (200, text)


async def test_the_template_in_use_is_shown(server: LiveServer) -> None:
    async with aiohttp.ClientSession() as session, session.get(f"{server.url}/props") as response:
        assert (await response.json())["chat_template"] == ECHO


async def test_tools_and_calls_in_a_prompt(server: LiveServer) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "no json"}}
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "18"},
        {"role": "tool", "tool_call_id": "nowhere", "content": "lost"},
    ]
    status, answer = await posted(server, "/apply-template", {"messages": messages, "tools": TOOLS})
    assert status == 200
    shown = {"name": "weather", "description": "", "parameters": WEATHER["parameters"]}
    said = '(assistant: {"name": "weather", "arguments": "no json"})(tool: 18)(tool: Result of nowhere:\nlost)'
    assert answer["prompt"] == f"{json.dumps(shown)}\nHi{said}"
    status, answer = await posted(server, "/apply-template", {**asked("Hi"), "tools": TOOLS, "tool_choice": "none"})
    assert (status, answer["prompt"]) == (200, "Hi")


def allowed(*names: str, **more: Any) -> Any:
    """`tool_choice` with the tools of these names."""
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"tools": tools, **more}}


async def test_only_allowed_tools_are_told_of_and_called(server: LiveServer) -> None:
    tools = [*named("clock"), *TOOLS]
    path, body = "/apply-template", {**asked("Hi"), "tools": tools}
    told = await posted(server, path, {**asked("Hi"), "tools": TOOLS})
    for mode in ("auto", "required"):
        assert await posted(server, path, {**body, "tool_choice": allowed("weather", mode=mode)}) == told
    assert await posted(server, path, {**body, "tool_choice": allowed("clock", "weather")}) == await posted(
        server, path, body
    )
    for mode in ("auto", "required"):
        choice = msgspec.convert(allowed("weather", mode=mode), ChatToolChoice)
        found = tools_of(ToolsBody(tools=msgspec.convert(tools, list[ChatTool]), tool_choice=choice))
        assert ([tool.name for tool in found[0]], found[1].mode, found[1].name) == (["weather"], mode, "")


def named(name: str) -> list[Any]:
    return [{"type": "function", "function": {"name": name}}]


SCHEMA = "tools[0].function.parameters"
DEEP = json.loads('{"a":' * 65 + "1" + "}" * 65)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": named("we ather")}, "tools[0].function.name"),
        ({"tools": named("wéather")}, "tools[0].function.name"),
        ({"tools": named('"}\n</tool_call>')}, "tools[0].function.name"),
        ({"tools": named("")}, "tools[0].function.name"),
        ({"tools": named("w" * 129)}, "tools[0].function.name"),
        ({"tools": named("a") + named("a")}, "tools[1].function.name"),
        ({"tools": [tool for n in range(257) for tool in named(f"a{n}")]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": [1]}}]}, SCHEMA),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": DEEP}}]}, SCHEMA),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": [1]}, "tools[0]"),
        ({"tools": "all"}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "clock"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {}}}, "tool_choice.function"),
        ({"tools": TOOLS, "tool_choice": {"type": "custom"}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": allowed("weather", mode="none")}, "tool_choice.allowed_tools.mode"),
        ({"tools": TOOLS, "tool_choice": allowed("weather", "clock")}, "tool_choice.allowed_tools.tools[1]"),
        ({"tools": TOOLS, "tool_choice": allowed(mode="required")}, "tool_choice"),
        ({"id_slot": 99}, "id_slot"),
        ({"id_slot": 99, "stream": True}, "id_slot"),
        ({"tools": TOOLS, "parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"functions": [{"name": "a b"}]}, "functions[0].name"),
        ({"functions": [WEATHER], "function_call": {"name": "clock"}}, "function_call"),
        ({"reasoning_format": "loud"}, "reasoning_format"),
        ({"reasoning": "much"}, "reasoning"),
        ({"enable_thinking": "yes"}, "enable_thinking"),
    ],
)  # fmt: skip
async def test_what_cannot_be_followed_is_refused(client: AsyncOpenAI, fields: Any, param: str) -> None:
    with pytest.raises(BadRequestError) as refusal:
        await client.chat.completions.create(**{"model": "", "messages": [], **asked("Hi")}, extra_body=fields)
    assert refusal.value.param == param
    assert refusal.value.body["message"].endswith(".")  # type: ignore[index]
