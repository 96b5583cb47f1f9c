"""openai-python: chat completions, `.parse()`, the streaming helper and the Responses API."""

import sys
from enum import StrEnum
from typing import Any, Literal

import openai
from pydantic import BaseModel, Field

from bench.clients.cells import LONG, N_TOKENS, QUESTION, WEATHER, check_weather, expect, expect_idle, report

URL = sys.argv[1]
client = openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)
ASKED: list[Any] = [{"role": "user", "content": QUESTION}]
TOOL: Any = {"type": "function", "function": {"name": "weather", "parameters": WEATHER, "strict": True}}


class City(StrEnum):
    """A city to ask about."""

    PARIS = "Paris"
    ROME = "Rome"


class Weather(BaseModel):
    """A form to hold answers to."""

    city: City
    days: int = Field(ge=1, le=9)


def chat() -> None:
    """A whole answer."""
    answer = client.chat.completions.create(model="demo", messages=ASKED, max_tokens=N_TOKENS, temperature=0)
    expect(answer.choices[0].message.content, answer)
    expect(answer.choices[0].finish_reason in ("stop", "length"), answer)


def stream() -> None:
    """The streaming helper, whose final answer is the one that is not streamed."""
    whole = client.chat.completions.create(model="demo", messages=ASKED, max_tokens=200, temperature=0)
    with client.chat.completions.stream(model="demo", messages=ASKED, max_tokens=200, temperature=0) as events:
        final = events.get_final_completion()
    expect(final.choices[0].message.content == whole.choices[0].message.content, final)


def tools() -> None:
    """A call is demanded, answered, and followed by an answer; the streaming helper reads calls as well."""
    messages = list(ASKED)
    choice: Literal["required"] = "required"
    first = client.chat.completions.create(
        model="demo",
        messages=messages,
        tools=[TOOL],
        tool_choice=choice,
        parallel_tool_calls=False,
        max_tokens=200,
        temperature=0,
    )
    message = first.choices[0].message
    expect(first.choices[0].finish_reason == "tool_calls" and message.tool_calls, first)
    for call in message.tool_calls or ():
        assert call.type == "function"
        check_weather(call.function.arguments)
        messages += [message, {"role": "tool", "tool_call_id": call.id, "content": "18 degrees"}]
    last = client.chat.completions.create(
        model="demo", messages=messages, tools=[TOOL], tool_choice="none", max_tokens=N_TOKENS
    )
    expect(last.choices[0].message.content and not last.choices[0].message.tool_calls, last)
    with client.chat.completions.stream(
        model="demo",
        messages=ASKED,
        tools=[TOOL],
        tool_choice=choice,
        parallel_tool_calls=False,
        max_tokens=200,
        temperature=0,
    ) as events:
        streamed = events.get_final_completion().choices[0].message.tool_calls
    assert streamed
    check_weather(streamed[0].function.arguments)


def schema() -> None:
    """`.parse()` gives an object of the class."""
    parsed = client.chat.completions.parse(
        model="demo", messages=ASKED, response_format=Weather, max_tokens=200, temperature=0
    )
    expect(isinstance(parsed.choices[0].message.parsed, Weather), parsed)


def usage() -> None:
    """The last chunk counts tokens as the whole answer does."""
    chunks = client.chat.completions.create(
        model="demo",
        messages=ASKED,
        max_tokens=N_TOKENS,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    counted = [chunk.usage for chunk in chunks if chunk.usage][-1]
    expect(counted.prompt_tokens > 5 and 0 < counted.completion_tokens <= N_TOKENS, counted)


def errors() -> None:
    """An overflow has its code, a wrong field its name."""
    try:
        client.chat.completions.create(model="demo", messages=[{"role": "user", "content": LONG}])
        expect(False, "an answer to a prompt that is too long")
    except openai.BadRequestError as error:
        expect(error.code == "context_length_exceeded" and "context_length_exceeded" in error.message, error)
    try:
        client.chat.completions.create(model="demo", messages=ASKED, temperature=-1)
        expect(False, "an answer at a temperature below 0")
    except openai.BadRequestError as error:
        expect(error.param == "temperature", error)


def cancel() -> None:
    """A stream that is closed early frees its slot."""
    chunks = client.chat.completions.create(
        model="demo", messages=ASKED, stream=True, max_tokens=1500, extra_body={"ignore_eos": True}
    )
    next(iter(chunks))
    chunks.close()
    expect_idle(URL)


def responses() -> None:
    """The Responses API: whole, streamed, held to a class, with a tool."""
    whole = client.responses.create(model="demo", input=QUESTION, max_output_tokens=N_TOKENS, temperature=0)
    expect(whole.output_text, whole)
    with client.responses.stream(model="demo", input=QUESTION, max_output_tokens=N_TOKENS, temperature=0) as events:
        text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    expect(text == whole.output_text, (text, whole.output_text))
    parsed = client.responses.parse(model="demo", input=QUESTION, text_format=Weather)
    expect(isinstance(parsed.output_parsed, Weather), parsed)
    tool: Any = {"type": "function", "name": "weather", "parameters": WEATHER, "strict": True}
    called = client.responses.create(
        model="demo", input=QUESTION, tools=[tool], tool_choice="required", parallel_tool_calls=False, temperature=0
    )
    call = next(item for item in called.output if item.type == "function_call")
    check_weather(call.arguments)
    history: Any = [
        {"role": "user", "content": QUESTION},
        *called.output,
        {"type": "function_call_output", "call_id": call.call_id, "output": "18 degrees"},
    ]
    expect(client.responses.create(model="demo", input=history, max_output_tokens=N_TOKENS).output_text, "no text")


if __name__ == "__main__":
    report("openai", chat, stream, tools, schema, usage, errors, cancel, responses)
