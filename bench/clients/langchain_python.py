"""langchain-openai: `bind_tools` and `with_structured_output` in each of its ways."""

import sys
from typing import Any, Literal

from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import ToolMessage
from langchain_openai import ChatOpenAI

from bench.clients.cells import LONG, N_TOKENS, QUESTION, check_weather, expect, expect_idle, report
from bench.clients.weather import Weather

URL = sys.argv[1]


def model(fields: dict[str, Any] | None = None) -> ChatOpenAI:
    """The client with `fields`."""
    given: dict[str, Any] = {"max_completion_tokens": N_TOKENS, "temperature": 0, **(fields or {})}
    return ChatOpenAI(base_url=f"{URL}/v1", api_key="none", model="demo", max_retries=0, **given)


def chat() -> None:
    """A whole answer."""
    expect(model().invoke(QUESTION).content, "no text")


def stream() -> None:
    """The stream's text is that of the whole answer."""
    whole = model().invoke(QUESTION).content
    text = "".join(str(chunk.content) for chunk in model().stream(QUESTION))
    expect(text == whole, text)


def tools() -> None:
    """`bind_tools`: a call, its result, an answer."""
    bound = model({"max_completion_tokens": 200}).bind_tools([Weather], tool_choice="any", parallel_tool_calls=False)
    first: Any = bound.invoke(QUESTION)
    check_weather(first.tool_calls[0]["args"])
    result = ToolMessage("18 degrees", tool_call_id=first.tool_calls[0]["id"])
    expect(model().invoke([("user", QUESTION), first, result]).content, "no text")
    parts: Any = None
    for chunk in bound.stream(QUESTION):
        parts = chunk if parts is None else parts + chunk
    check_weather(parts.tool_calls[0]["args"])


def schema() -> None:
    """`with_structured_output` by schema, by a call, and by JSON alone."""
    ways: tuple[Literal["json_schema", "function_calling"], ...] = ("json_schema", "function_calling")
    for way in ways:
        held = model({"max_completion_tokens": 200}).with_structured_output(Weather, method=way)
        expect(isinstance(held.invoke(QUESTION), Weather), way)
    free = model({"max_completion_tokens": 400}).with_structured_output(None, method="json_mode", include_raw=True)
    raw: Any = free.invoke(QUESTION)
    expect(str(raw["raw"].content).lstrip().startswith("{"), raw)


def usage() -> None:
    """Streams count tokens if asked."""
    parts: Any = None
    for chunk in model({"stream_usage": True}).stream(QUESTION):
        parts = chunk if parts is None else parts + chunk
    expect(parts.usage_metadata["output_tokens"] > 0, parts)


def errors() -> None:
    """An overflow is recognised."""
    try:
        model().invoke(LONG)
        expect(False, "an answer to a prompt that is too long")
    except ContextOverflowError:
        return


def cancel() -> None:
    """A stream that is closed early frees its slot."""
    chunks: Any = model({"max_completion_tokens": 1500, "extra_body": {"ignore_eos": True}}).stream(QUESTION)
    next(chunks)
    chunks.close()
    expect_idle(URL)


if __name__ == "__main__":
    report("langchain-openai", chat, stream, tools, schema, usage, errors, cancel)
