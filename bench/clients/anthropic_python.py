"""anthropic-python: messages whole and streamed, tools, and counted tokens."""

import sys
from typing import Any

import anthropic

from bench.clients.cells import LONG, N_TOKENS, QUESTION, WEATHER, check_weather, expect, expect_idle, report

URL = sys.argv[1]
client = anthropic.Anthropic(base_url=URL, api_key="none", max_retries=0)
ASKED: list[Any] = [{"role": "user", "content": QUESTION}]
TOOL: Any = {"name": "weather", "description": "Tells the weather.", "input_schema": WEATHER}


def chat() -> None:
    """A whole answer."""
    answer = client.messages.create(model="demo", messages=ASKED, max_tokens=N_TOKENS, system="Be brief.")
    expect(answer.content[0].type == "text" and answer.content[0].text, answer)
    expect(answer.stop_reason in ("end_turn", "max_tokens"), answer)


def stream() -> None:
    """The streaming helper's text is that of the whole answer."""
    cold: Any = {"temperature": 0}
    whole = client.messages.create(model="demo", messages=ASKED, max_tokens=N_TOKENS, extra_body=cold)
    with client.messages.stream(model="demo", messages=ASKED, max_tokens=N_TOKENS, extra_body=cold) as events:
        text = "".join(events.text_stream)
    expect(whole.content[0].type == "text" and text == whole.content[0].text, (text, whole))


def tools() -> None:
    """An agent's loop: a call, its result, an answer; then the same call as a stream."""
    messages = list(ASKED)
    first = client.messages.create(
        model="demo",
        messages=messages,
        tools=[TOOL],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
        max_tokens=200,
    )
    expect(first.stop_reason == "tool_use", first)
    calls = [block for block in first.content if block.type == "tool_use"]
    check_weather(calls[0].input)
    results = [{"type": "tool_result", "tool_use_id": call.id, "content": "18 degrees"} for call in calls]
    messages += [{"role": "assistant", "content": first.content}, {"role": "user", "content": results}]
    last = client.messages.create(
        model="demo", messages=messages, tools=[TOOL], tool_choice={"type": "none"}, max_tokens=N_TOKENS
    )
    expect(last.content[0].type == "text", last)
    with client.messages.stream(
        model="demo", messages=ASKED, tools=[TOOL], tool_choice={"type": "tool", "name": "weather"}, max_tokens=200
    ) as events:
        final = events.get_final_message()
    check_weather(next(block.input for block in final.content if block.type == "tool_use"))


def schema() -> None:
    """Anthropic's clients get an object by the arguments of a tool that must be called."""
    answer = client.messages.create(
        model="demo",
        messages=ASKED,
        tools=[TOOL],
        tool_choice={"type": "tool", "name": "weather", "disable_parallel_tool_use": True},
        max_tokens=200,
    )
    calls = [block for block in answer.content if block.type == "tool_use"]
    expect(len(calls) == 1, answer)
    check_weather(calls[0].input)


def usage() -> None:
    """The counted tokens are those of the answer."""
    counted = client.messages.count_tokens(model="demo", messages=ASKED)
    answer = client.messages.create(model="demo", messages=ASKED, max_tokens=N_TOKENS)
    used = answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0)
    expect(counted.input_tokens == used and answer.usage.output_tokens > 0, (counted, answer.usage))


def errors() -> None:
    """What is too long, and what is wrong, is told in Anthropic's shape."""
    try:
        client.messages.create(model="demo", messages=[{"role": "user", "content": LONG}], max_tokens=5)
        expect(False, "an answer to a prompt that is too long")
    except anthropic.BadRequestError as error:
        body: Any = error.body
        expect(body["type"] == "error" and body["error"]["type"] == "invalid_request_error", body)


def cancel() -> None:
    """A stream that is closed early frees its slot."""
    with client.messages.stream(
        model="demo", messages=ASKED, max_tokens=1500, extra_body={"ignore_eos": True}
    ) as events:
        next(iter(events.text_stream))
    expect_idle(URL)


if __name__ == "__main__":
    report("anthropic", chat, stream, tools, schema, usage, errors, cancel)
