"""Conversations as clients keep them, with calls of tools, names and refusals: nothing gets lost in turns of text."""

from typing import Any

import msgspec
import pytest

from slimoe.server.api_error import ApiError
from slimoe.server.chat.history import Message, turns


def read(*messages: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple((turn.role, turn.content) for turn in turns(msgspec.convert(messages, list[Message])))


USER = {"role": "user", "content": "How warm is it?"}
PARIS_ARGUMENTS = '{"city": "Paris",\n "n": 1.50}'
PARIS = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": PARIS_ARGUMENTS}}
ROME = {"id": "call_2", "type": "function", "function": {"name": "weather", "arguments": {"city": "Römer"}}}
PARIS_LINE = f'{{"id": "call_1", "name": "weather", "arguments": {PARIS_ARGUMENTS}}}'
ROME_LINE = '{"id": "call_2", "name": "weather", "arguments": {"city": "Römer"}}'


def test_calls_of_tools_and_what_came_of_them() -> None:
    found = read(
        USER,
        {"role": "assistant", "content": None, "tool_calls": [PARIS, ROME]},
        {"role": "tool", "tool_call_id": "call_1", "content": "18 °C"},
        {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "25 °C"}]},
    )
    assert found == (
        ("user", "How warm is it?"),
        ("assistant", f"{PARIS_LINE}\n{ROME_LINE}"),
        ("tool", "Result of weather (call_1):\n18 °C"),
        ("tool", "Result of weather (call_2):\n25 °C"),
    )


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
        ({"tool_calls": [{"type": "custom", "custom": {"name": "s", "input": "x"}}]}, '{"name": "s", "input": "x"}'),
        ({"content": "Hi", "name": "Ann"}, "Ann: Hi"),
        ({"content": None, "refusal": "No."}, "No."),
        ({"content": [{"type": "refusal", "refusal": "No."}, {"type": "output_text", "text": "Or"}]}, "No.\nOr"),
        ({"content": None, "reasoning_content": "It is late."}, "It is late."),
        ({"content": "Late.", "reasoning_content": "It is late."}, "Late."),
        ({"content": ""}, ""),
    ],
)  # fmt: skip
def test_what_an_assistant_may_have_said(message: dict[str, Any], text: str) -> None:
    assert read(USER, {"role": "assistant", **message})[1] == ("assistant", text)


def test_names_of_others() -> None:
    assert read({**USER, "name": "Bob"}) == (("user", "Bob: How warm is it?"),)
    assert read(USER, {"role": "function", "name": "f", "content": "5"})[1] == ("tool", "Result of f:\n5")
    assert read(USER, {"role": "tool", "tool_call_id": "x", "content": "5"})[1] == ("tool", "Result of x:\n5")
    assert read(USER, {"role": "tool", "content": "5"})[1] == ("tool", "5")


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
    ],
)
def test_what_cannot_be_told_is_refused(message: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as refusal:
        read(USER, message)
    assert (refusal.value.status, refusal.value.info.param) == (400, param)
