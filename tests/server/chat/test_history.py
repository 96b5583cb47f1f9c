"""Conversations as clients keep them, with calls of tools, names and refusals: nothing gets lost."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from gguf import GGUFWriter

from slimoe.offload.gguf.header import read_gguf
from slimoe.offload.text.tokenizer import Tokenizer
from slimoe.server.api_error import ApiError
from slimoe.server.chat.chat import Chat
from slimoe.server.chat.history import Message, turns
from slimoe.server.messages import Call, ChatPrompt, Turn
from tests.models.gguf_content import finish
from tests.models.tiny_gguf import add_vocabulary


def read(*messages: dict[str, Any]) -> tuple[Turn, ...]:
    return turns(msgspec.convert(messages, list[Message]))


@pytest.fixture(scope="module")
def plain_chat(sentencepiece_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chat]:
    """Of a model without a template, which is told all in words."""
    writer = GGUFWriter(path := tmp_path_factory.mktemp("history") / "v.gguf", "llama")
    add_vocabulary(writer, sentencepiece_path, None)
    finish(writer)
    tokenizer = Tokenizer.open(read_gguf(path))
    yield Chat(tokenizer)
    tokenizer.close()


def words(chat: Chat, *messages: dict[str, Any]) -> list[str]:
    return chat.render(ChatPrompt(read(*messages)), generate=False).split("\n\n")


USER = {"role": "user", "content": "How warm is it?"}
PARIS_ARGUMENTS = '{"city": "Paris",\n "n": 1.50}'
PARIS = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": PARIS_ARGUMENTS}}
ROME_ARGUMENTS = '{"city": "Römer"}'
ROME = {"id": "call_2", "type": "function", "function": {"name": "weather", "arguments": {"city": "Römer"}}}
PARIS_LINE = f'{{"id": "call_1", "name": "weather", "arguments": {PARIS_ARGUMENTS}}}'
CUSTOM = {"type": "custom", "custom": {"name": "s", "input": "x"}}
DEEP = "[" * 65 + "]" * 65


def called(arguments: Any) -> dict[str, Any]:
    return {"role": "assistant", "function_call": {"name": "f", "arguments": arguments}}


ROME_LINE = '{"id": "call_2", "name": "weather", "arguments": {"city": "Römer"}}'


def test_calls_of_tools_and_what_came_of_them(plain_chat: Chat) -> None:
    messages: list[dict[str, Any]] = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [PARIS, ROME]},
        {"role": "tool", "tool_call_id": "call_1", "content": "18 °C"},
        {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "25 °C"}]},
    ]
    assert read(*messages) == (
        Turn("user", "How warm is it?"),
        Turn("assistant", "", (Call("weather", PARIS_ARGUMENTS, "call_1"), Call("weather", ROME_ARGUMENTS, "call_2"))),
        Turn("tool", "18 °C", call_id="call_1", name="weather"),
        Turn("tool", "25 °C", call_id="call_2", name="weather"),
    )
    assert words(plain_chat, *messages) == [
        "User: How warm is it?",
        f"Assistant: {PARIS_LINE}\n{ROME_LINE}",
        "Tool: Result of weather (call_1):\n18 °C",
        "Tool: Result of weather (call_2):\n25 °C",
    ]


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": "Let me see.", "tool_calls": [ROME]}, f"Let me see.\n{ROME_LINE}"),
        ({"content": "", "tool_calls": [ROME]}, ROME_LINE),
        ({"tool_calls": [ROME]}, ROME_LINE),
        ({"function_call": {"name": "f", "arguments": "{}"}}, '{"name": "f", "arguments": {}}'),
        ({"function_call": {"name": "f"}}, '{"name": "f", "arguments": {}}'),
        ({"function_call": {"name": "f", "arguments": ""}}, '{"name": "f", "arguments": {}}'),
        ({"function_call": {"name": 'f"', "arguments": "no json"}}, '{"name": "f\\"", "arguments": "no json"}'),
        ({"tool_calls": [CUSTOM]}, '{"name": "s", "arguments": {"input": "x"}}'),
        ({"content": "Hi", "name": "Ann"}, "Ann: Hi"),
        ({"content": None, "refusal": "No."}, "No."),
        ({"content": [{"type": "refusal", "refusal": "No."}, {"type": "output_text", "text": "Or"}]}, "No.\nOr"),
        ({"content": None, "reasoning_content": "It is late."}, "It is late."),
        ({"content": "Late.", "reasoning_content": "It is late."}, "Late."),
        ({"content": ""}, ""),
    ],
)  # fmt: skip
def test_what_an_assistant_may_have_said(plain_chat: Chat, message: dict[str, Any], text: str) -> None:
    assert words(plain_chat, USER, {"role": "assistant", **message})[1] == f"Assistant: {text}"


def test_reasoning_is_kept_beside_what_was_said() -> None:
    for spelling in ("reasoning_content", "reasoning"):
        said = {"role": "assistant", "content": "Late.", spelling: "It is dark."}
        assert read(USER, said)[1] == Turn("assistant", "Late.", reasoning="It is dark.")
    assert read(USER, {**said, "reasoning": {"effort": "low"}})[1] == Turn("assistant", "Late.")


def test_names_of_others(plain_chat: Chat) -> None:
    for message, text in [
        ({**USER, "name": "Bob"}, "User: Bob: How warm is it?"),
        ({"role": "function", "name": "f", "content": "5"}, "Tool: Result of f:\n5"),
        ({"role": "tool", "tool_call_id": "x", "content": "5"}, "Tool: Result of x:\n5"),
        ({"role": "tool", "content": "5"}, "Tool: 5"),
    ]:
        assert words(plain_chat, message) == [text]


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "assistant", "content": None}, "messages[1].content"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "messages[1].content"),
        ({"role": "assistant"}, "messages[1].content"),
        ({"role": "user", "content": "x", "tool_calls": [ROME]}, "messages[1].tool_calls"),
        ({"role": "assistant", "tool_calls": [{"type": "retrieval"}]}, "messages[1].tool_calls[0]"),
        ({"role": "assistant", "content": None, "audio": {"id": "x"}}, "messages[1].audio"),
        ({"role": "user", "content": "x", "images": ["eA=="]}, "messages[1].images"),
        ({"role": "user", "content": [{"type": "tool_use", "text": "x"}]}, "messages[1].content[0]"),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "messages[1].content[0]"),
        ({"role": "assistant", "content": [{"type": "refusal"}]}, "messages[1].content[0]"),
        (called(DEEP), "messages[1].tool_calls[0].function.arguments"),
        (called("[" * 99_999), "messages[1].tool_calls[0].function.arguments"),
        (called({"a": json.loads(DEEP)}), "messages[1].tool_calls[0].function.arguments"),
    ],
)
def test_what_cannot_be_told_is_refused(message: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as refusal:
        read(USER, message)
    assert (refusal.value.status, refusal.value.info.param) == (400, param)
