"""ollama-python: chat and generate, formats, tools, and what it asks about models."""

import sys
from typing import Any

import ollama

from bench.clients.cells import LONG, N_TOKENS, QUESTION, WEATHER, check_weather, expect, expect_idle, report

URL = sys.argv[1]
client = ollama.Client(host=URL)
ASKED: list[Any] = [{"role": "user", "content": QUESTION}]
OPTIONS = {"num_predict": N_TOKENS, "temperature": 0}
TOOL: Any = {"type": "function", "function": {"name": "weather", "description": "Weather.", "parameters": WEATHER}}


def chat() -> None:
    """Whole answers, and the models that are listed and shown."""
    expect(client.chat("demo", ASKED, options=OPTIONS).message.content, "no text")
    expect(client.generate("demo", QUESTION, options=OPTIONS).response, "no text")
    name = client.list().models[0].model
    expect(name and client.show(name).details, name)
    client.ps()


def stream() -> None:
    """The stream's text is that of the whole answer, and its last line has the figures."""
    whole = client.chat("demo", ASKED, options=OPTIONS).message.content
    parts = list(client.chat("demo", ASKED, options=OPTIONS, stream=True))
    expect("".join(part.message.content or "" for part in parts) == whole, parts)
    expect(parts[-1].done and parts[-1].done_reason in ("stop", "length"), parts[-1])


def tools() -> None:
    """Ollama knows no demand for a call: tools are offered, and calls with their results are read."""
    client.chat("demo", ASKED, tools=[TOOL], options=OPTIONS)
    history: list[Any] = [
        *ASKED,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Rome", "days": 2}}}],
        },
        {"role": "tool", "content": "18 degrees", "tool_name": "weather"},
    ]
    expect(client.chat("demo", history, tools=[TOOL], options=OPTIONS).message.content is not None, "no text")


def schema() -> None:
    """`format` holds the answer to a schema."""
    answer = client.chat("demo", ASKED, format=WEATHER, options={"num_predict": 200})
    check_weather(answer.message.content)


def usage() -> None:
    """Tokens and times are counted."""
    answer = client.chat("demo", ASKED, options=OPTIONS)
    expect((answer.eval_count or 0) > 0 and (answer.prompt_eval_count or 0) > 0, answer)
    expect((answer.total_duration or 0) > 0, answer)


def errors() -> None:
    """An overflow is told in words."""
    try:
        client.chat("demo", [{"role": "user", "content": LONG}])
        expect(False, "an answer to a prompt that is too long")
    except ollama.ResponseError as error:
        expect(error.status_code == 400 and "context" in error.error, error)


def cancel() -> None:
    """A stream that is closed early frees its slot."""
    parts: Any = client.generate("demo", QUESTION, stream=True, options={"num_predict": 1500})
    next(iter(parts))
    parts.close()
    expect_idle(URL)


if __name__ == "__main__":
    report("ollama", chat, stream, tools, schema, usage, errors, cancel)
