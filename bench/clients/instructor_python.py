"""instructor in its modes for OpenAI's API, without retries: the first answer must hold."""

import asyncio
import contextlib
import sys
from typing import Any

import instructor
import openai

from bench.clients.cells import LONG, QUESTION, expect, expect_idle, report
from bench.clients.weather import Weather

URL = sys.argv[1]
plain = openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)
ASKED: list[Any] = [{"role": "user", "content": QUESTION}]


def ask(mode: instructor.Mode) -> None:
    """Asks for an object in one of instructor's modes."""
    client = instructor.from_openai(plain, mode=mode)
    found = client.chat.completions.create(
        model="demo", messages=ASKED, response_model=Weather, max_retries=0, max_tokens=200, temperature=0
    )
    expect(isinstance(found, Weather), found)


def chat() -> None:
    """A whole answer, which is an object, as all of instructor's are."""
    ask(instructor.Mode.JSON_SCHEMA)


def tools() -> None:
    """The object is the arguments of a call that must be made."""
    ask(instructor.Mode.TOOLS)


def tools_strict() -> None:
    """The same with a strict tool."""
    ask(instructor.Mode.TOOLS_STRICT)


def schema() -> None:
    """The answer is held to the class's schema."""
    ask(instructor.Mode.JSON_SCHEMA)


def stream() -> None:
    """Parts of an object come as they are written."""
    client = instructor.from_openai(plain, mode=instructor.Mode.TOOLS)
    parts = list(client.chat.completions.create_partial(model="demo", messages=ASKED, response_model=Weather))
    expect(parts and parts[-1].days, parts)


def usage() -> None:
    """The raw answer counts tokens."""
    client = instructor.from_openai(plain, mode=instructor.Mode.TOOLS)
    _, raw = client.chat.completions.create_with_completion(model="demo", messages=ASKED, response_model=Weather)
    expect(raw.usage.completion_tokens > 0, raw)


def errors() -> None:
    """An overflow reaches the caller."""
    client = instructor.from_openai(plain, mode=instructor.Mode.TOOLS)
    try:
        client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": LONG}], response_model=Weather, max_retries=0
        )
        expect(False, "an object from a prompt that is too long")
    except Exception as error:
        expect("context_length_exceeded" in str(error), error)


def cancel() -> None:
    """An object that nobody waits for any more is not written to its end."""

    async def begin() -> None:
        client = instructor.from_openai(openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key="none"))
        asked = client.chat.completions.create(model="demo", messages=ASKED, response_model=Weather)
        await asyncio.wait_for(asked, 0.2)

    with contextlib.suppress(TimeoutError):
        asyncio.run(begin())
    expect_idle(URL)


if __name__ == "__main__":
    report("instructor", chat, stream, tools, tools_strict, schema, usage, errors, cancel)
