"""Tools with the demo model, which knows none: calls that must be made are made well, by chance as by choice."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from slimoe.server.options.engine_options import DEMO
from tests.models.live_server import serving

CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "unit": {"enum": ["celsius", "kelvin"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "unit", "days"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "description": "Tells the weather.", "parameters": CITY}},
    {"type": "function", "function": {"name": "clock"}},
]
QUESTION: Any = {"role": "user", "content": 'Define the noun "river".'}


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    with serving(DEMO) as (_, url):
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def check_weather(arguments: str) -> None:
    values = json.loads(arguments)
    assert values.keys() == {"city", "unit", "days"}
    assert len(values["city"]) <= 20
    assert values["unit"] in ("celsius", "kelvin")
    assert 1 <= values["days"] <= 9


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_demanded_call_is_one_that_follows_its_schema(client: openai.OpenAI, seed: int, choice: Any) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=[QUESTION], tools=TOOLS, tool_choice=choice, temperature=1, seed=seed, max_tokens=200
    )
    (made,) = answer.choices
    assert made.finish_reason == "tool_calls"
    assert made.message.content is None
    assert made.message.tool_calls is not None
    (call,) = made.message.tool_calls
    assert call.type == "function"
    assert call.id.startswith("call_")
    if choice != "required" or call.function.name == "weather":
        check_weather(call.function.arguments)
    else:
        assert (call.function.name, json.loads(call.function.arguments)) == ("clock", {})


def test_a_streamed_call_comes_in_pieces(client: openai.OpenAI) -> None:
    choice: Any = {"type": "function", "function": {"name": "weather"}}
    stream: Any = client.chat.completions.create(
        model="demo", messages=[QUESTION], tools=TOOLS, tool_choice=choice, temperature=1, seed=5, stream=True
    )
    choices = [chunk.choices[0] for chunk in stream]
    pieces = [choice.delta.tool_calls[0] for choice in choices if choice.delta.tool_calls]
    assert (pieces[0].index, pieces[0].type) == (0, "function")
    assert pieces[0].function is not None
    assert (pieces[0].function.name, pieces[0].function.arguments) == ("weather", "")
    assert pieces[0].id
    assert all(piece.id is None and piece.function and piece.function.name is None for piece in pieces[1:])
    assert len(pieces) > 5
    check_weather("".join(piece.function.arguments or "" for piece in pieces if piece.function))
    assert choices[-1].finish_reason == "tool_calls"
    with client.chat.completions.stream(model="demo", messages=[QUESTION], tools=TOOLS, tool_choice=choice) as events:
        message = events.get_final_completion().choices[0].message
    assert message.tool_calls is not None
    check_weather(message.tool_calls[0].function.arguments)


def test_a_conversation_goes_on_until_no_tool_is_called(client: openai.OpenAI) -> None:
    """As `runTools` of OpenAI's clients does it: call, result, answer."""
    messages: list[Any] = [QUESTION]
    for choice in ("required", "auto"):
        answer = client.chat.completions.create(
            model="demo", messages=messages, tools=TOOLS, tool_choice=choice, temperature=0, max_tokens=120
        )
        message = answer.choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        for call in message.tool_calls or []:
            messages.append({"role": "tool", "tool_call_id": call.id, "content": "18 degrees"})
    assert message.content
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert len(messages) == 4


def test_older_programs_call_functions(client: openai.OpenAI) -> None:
    functions: Any = [tool["function"] for tool in TOOLS]
    named: Any = {"name": "weather"}
    answer = client.chat.completions.create(
        model="demo", messages=[QUESTION], functions=functions, function_call=named, temperature=1, seed=3
    )
    assert answer.choices[0].finish_reason == "function_call"
    assert answer.choices[0].message.function_call is not None
    assert answer.choices[0].message.function_call.name == "weather"
    check_weather(answer.choices[0].message.function_call.arguments)


def test_a_strict_tool_whose_schema_cannot_be_held_is_refused(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    tools: Any = [{"type": "function", "function": {"name": "f", "parameters": schema, "strict": True}}]
    with pytest.raises(openai.BadRequestError, match="uniqueItems") as refusal:
        client.chat.completions.create(model="demo", messages=[QUESTION], tools=tools)
    assert refusal.value.param == "tools[0].function.parameters"
    assert "of the tool 'f': Unimplemented keys" in str(refusal.value)
    assert "call_0" not in str(refusal.value)
    tools[0]["function"]["strict"] = False
    answer = client.chat.completions.create(
        model="demo", messages=[QUESTION], tools=tools, tool_choice="required", max_tokens=100
    )
    assert answer.choices[0].message.tool_calls
