"""litellm, with its provider for OpenAI's API: what agents such as aider are built on."""

import os
import sys
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm

from bench.clients.cells import LONG, N_TOKENS, QUESTION, WEATHER, check_weather, expect, expect_idle, report

URL = sys.argv[1]
ASKED: list[Any] = [{"role": "user", "content": QUESTION}]
TOOL: Any = {"type": "function", "function": {"name": "weather", "parameters": WEATHER}}
ONE_CALL = {"tool_choice": "required", "parallel_tool_calls": False, "temperature": 0}
FORM = {"type": "json_schema", "json_schema": {"name": "weather", "schema": WEATHER, "strict": True}}


def ask(fields: dict[str, Any]) -> Any:
    """An answer by the server."""
    asked = {"messages": ASKED, **fields}
    return litellm.completion(model="openai/demo", api_base=f"{URL}/v1", api_key="none", num_retries=0, **asked)


def chat() -> None:
    """A whole answer."""
    expect(ask({"max_tokens": N_TOKENS}).choices[0].message.content, "no text")


def stream() -> None:
    """The stream's text is that of the whole answer."""
    whole = ask({"max_tokens": N_TOKENS, "temperature": 0}).choices[0].message.content
    parts = [
        chunk.choices[0].delta.content or ""
        for chunk in ask({"max_tokens": N_TOKENS, "temperature": 0, "stream": True})
    ]
    expect("".join(parts) == whole, parts)


def tools() -> None:
    """A call, its result, an answer."""
    first = ask({"tools": [TOOL], **ONE_CALL, "max_tokens": 200}).choices[0]
    expect(first.finish_reason == "tool_calls", first)
    call = first.message.tool_calls[0]
    check_weather(call.function.arguments)
    result = {"role": "tool", "tool_call_id": call.id, "content": "18 degrees"}
    last = ask(
        {"messages": [*ASKED, first.message, result], "tools": [TOOL], "tool_choice": "none", "max_tokens": N_TOKENS}
    )
    expect(last.choices[0].message.content, last)
    chunks = list(ask({"tools": [TOOL], **ONE_CALL, "max_tokens": 200, "stream": True}))
    built: Any = litellm.stream_chunk_builder(chunks)
    check_weather(built.choices[0].message.tool_calls[0].function.arguments)


def schema() -> None:
    """`response_format` holds the answer to a schema."""
    check_weather(ask({"response_format": FORM, "max_tokens": 200, "temperature": 0}).choices[0].message.content)


def usage() -> None:
    """The last chunk counts tokens."""
    chunks = list(ask({"max_tokens": N_TOKENS, "stream": True, "stream_options": {"include_usage": True}}))
    expect(chunks[-1].usage.completion_tokens > 0, chunks[-1])


def errors() -> None:
    """An overflow is recognised, which agents shorten the conversation on."""
    try:
        ask({"messages": [{"role": "user", "content": LONG}]})
        expect(False, "an answer to a prompt that is too long")
    except litellm.ContextWindowExceededError:
        return


def cancel() -> None:
    """A stream that is closed early frees its slot."""
    chunks = ask({"max_tokens": 1500, "stream": True, "extra_body": {"ignore_eos": True}})
    next(iter(chunks))
    chunks.completion_stream.close()
    expect_idle(URL)


if __name__ == "__main__":
    report("litellm", chat, stream, tools, schema, usage, errors, cancel)
