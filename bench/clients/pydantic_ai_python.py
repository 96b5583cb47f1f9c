"""pydantic-ai: answers and streams of an agent, and objects by a call and by a schema."""

import asyncio
import contextlib
import sys
from typing import Any

from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from bench.clients.cells import LONG, N_TOKENS, QUESTION, expect, expect_idle, report
from bench.clients.weather import Weather

URL = sys.argv[1]
model = OpenAIChatModel("demo", provider=OpenAIProvider(base_url=f"{URL}/v1", api_key="none"))

BRIEF: Any = {"max_tokens": 200, "temperature": 0, "parallel_tool_calls": False}


def chat() -> None:
    """A whole answer."""
    expect(Agent(model).run_sync(QUESTION, model_settings={"max_tokens": N_TOKENS}).output, "no text")


def stream() -> None:
    """The text as it comes."""

    async def read() -> str:
        async with Agent(model).run_stream(QUESTION, model_settings={"max_tokens": N_TOKENS}) as answer:
            return "".join([part async for part in answer.stream_text(delta=True)])

    expect(asyncio.run(read()), "no text")


def tools() -> None:
    """The object comes as the arguments of a call that must be made."""
    agent = Agent(model, output_type=ToolOutput(Weather), retries=0)
    expect(isinstance(agent.run_sync(QUESTION, model_settings=BRIEF).output, Weather), "no object")


def schema() -> None:
    """The answer is held to the class's schema."""
    agent = Agent(model, output_type=NativeOutput(Weather), retries=0)
    expect(isinstance(agent.run_sync(QUESTION, model_settings=BRIEF).output, Weather), "no object")


def usage() -> None:
    """Tokens are counted."""
    found: Any = Agent(model).run_sync(QUESTION, model_settings={"max_tokens": N_TOKENS}).usage
    found = found() if callable(found) else found
    expect(found.output_tokens > 0 and found.input_tokens > 0, found)


def errors() -> None:
    """An overflow reaches the caller with its status and words."""
    try:
        Agent(model).run_sync(LONG)
        expect(False, "an answer to a prompt that is too long")
    except ModelHTTPError as error:
        expect(error.status_code == 400 and "context_length_exceeded" in str(error), error)


def cancel() -> None:
    """A stream that is left early frees its slot."""

    async def begin() -> None:
        settings: Any = {"max_tokens": 1500, "extra_body": {"ignore_eos": True}}
        async with Agent(model).run_stream(QUESTION, model_settings=settings) as answer:
            async for _ in answer.stream_text(delta=True):
                raise TimeoutError
        expect(False, "a stream without text")

    with contextlib.suppress(TimeoutError):
        asyncio.run(begin())
    expect_idle(URL)


if __name__ == "__main__":
    report("pydantic-ai-slim", chat, stream, tools, schema, usage, errors, cancel)
