"""The server answers several clients at once: `serve --parallel`, over the real engine."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from openai import APIError, AsyncOpenAI, BadRequestError

from tests.models.live_server import DEADLINE, serving
from tests.models.tiny_gguf import TinyShape, write_tiny_gguf

PROMPTS = ["the quick brown fox", "def import", "hello world naïve café", "the quick brown dog", "1234"]


@pytest.fixture(scope="module")
def url(sentencepiece_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with three places, whose context is long enough for an answer that does not end by itself."""
    shape = TinyShape(n_layer=1, n_ctx=50_000)
    path = write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf", sentencepiece_path, shape=shape)
    with serving(path, "--ctx", "50000", "--parallel", "3", "--kv-type", "f32") as (_, url):
        yield url


def client_of(url: str) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=DEADLINE)


async def stream_of(client: AsyncOpenAI, prompt: str, max_tokens: int) -> Any:
    return await client.completions.create(
        model="", prompt=prompt, max_tokens=max_tokens, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )


async def text_of(client: AsyncOpenAI, prompt: str, max_tokens: int = 40) -> str:
    return "".join([chunk.choices[0].text async for chunk in await stream_of(client, prompt, max_tokens)])


async def test_others_are_answered_while_one_answer_goes_on(url: str) -> None:
    """With one place, nobody would be answered before the endless answers end."""
    async with asyncio.timeout(DEADLINE), client_of(url) as client:
        endless = [await stream_of(client, prompt, 40_000) for prompt in PROMPTS[:2]]
        for stream in endless:
            await anext(aiter(stream))
        for prompt in PROMPTS:
            assert await text_of(client, prompt)
        await until_running(url, 2)
        for stream in endless:
            await stream.close()
    await until_running(url, 0)


async def test_streams_at_once_are_the_streams_of_each_alone(url: str) -> None:
    async with client_of(url) as client:
        alone = [await text_of(client, prompt) for prompt in PROMPTS]
        assert len(set(alone)) == len(PROMPTS)
        assert await asyncio.gather(*(text_of(client, prompt) for prompt in PROMPTS)) == alone


async def test_a_grammar_that_gets_slower_and_slower_ends_and_others_are_answered_as_alone(url: str) -> None:
    """Each of its tokens takes longer than the one before, until all together have taken too long."""
    async with client_of(url) as client:
        alone = [await text_of(client, prompt) for prompt in PROMPTS[:2]]
        slower = await client.completions.create(
            model="",
            prompt="a",
            max_tokens=10_000,
            temperature=1,
            seed=1,
            stream=True,
            extra_body={"ignore_eos": True, "grammar": 'root ::= root root root | [a-z ] | [a-z ] [a-z ] | ""'},
        )
        pieces = aiter(slower)
        await anext(pieces)

        async def to_its_end() -> None:
            async for _ in pieces:
                pass

        others = asyncio.gather(*(text_of(client, prompt) for prompt in PROMPTS[:2]))
        with pytest.raises(APIError, match=r"^grammar cannot be followed: its tokens, \d+ so far, take more") as error:
            await to_its_end()
        assert (error.value.type, error.value.param) == ("invalid_request_error", "grammar")
        assert await others == alone
    await until_running(url, 0)


async def test_clients_that_leave_make_room(url: str) -> None:
    async with asyncio.timeout(DEADLINE), client_of(url) as client:
        for _ in range(3):
            streams = [await stream_of(client, prompt, 40_000) for prompt in PROMPTS[:3]]
            waiting = asyncio.create_task(text_of(client, PROMPTS[4], 5))
            for stream in streams:
                await anext(aiter(stream))
            assert not waiting.done()
            await streams[1].close()
            assert await waiting
            for stream in streams:
                await stream.close()
    await until_running(url, 0)


@pytest.mark.parametrize("several", [{"prompt": PROMPTS[0], "n": 3}, {"prompt": PROMPTS[:2]}])
async def test_choices_are_written_at_once(url: str, several: dict[str, Any]) -> None:
    """Endless answers: with one after the other, there would never be a second one."""
    n_choices = several.get("n", 2)
    async with asyncio.timeout(DEADLINE), client_of(url) as client:
        stream = await client.completions.create(
            model="", max_tokens=40_000, stream=True, extra_body={"ignore_eos": True}, **several
        )
        seen = set[int]()
        async for chunk in stream:
            seen.add(chunk.choices[0].index)
            if len(seen) == n_choices:
                break
        assert seen == set(range(n_choices))
        await until_running(url, n_choices)
        await stream.close()
    await until_running(url, 0)


@pytest.mark.parametrize("stream", [False, True])
async def test_choices_keep_their_order(url: str, stream: bool) -> None:
    """More prompts than places, of different lengths, and several choices of each."""
    async with client_of(url) as client:
        alone = [await text_of(client, prompt, 9) for prompt in PROMPTS]
        answer: Any = await client.completions.create(
            model="", prompt=PROMPTS, n=2, max_tokens=9, temperature=0, stream=stream, extra_body={"ignore_eos": True}
        )
        texts = [""] * 2 * len(PROMPTS)
        if stream:
            ends = list[int]()
            async for chunk in answer:
                (choice,) = chunk.choices
                texts[choice.index] += choice.text
                ends += [choice.index] if choice.finish_reason else []
            assert sorted(ends) == list(range(len(texts)))
        else:
            assert [choice.index for choice in answer.choices] == list(range(len(texts)))
            texts = [choice.text for choice in answer.choices]
    assert texts == [text for text in alone for _ in range(2)]


async def test_one_bad_prompt_ends_all_of_a_request(url: str) -> None:
    async with client_of(url) as client:
        with pytest.raises(BadRequestError) as failure:
            await client.completions.create(model="", prompt=[[5], [5], [5, 99_999], [5]], max_tokens=40_000)
        assert failure.value.param == "prompt"
    await until_running(url, 0)


async def test_the_server_tells_its_places(url: str) -> None:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/props") as response:
        assert (await response.json())["total_slots"] == 3


async def until_running(url: str, n_wanted: int) -> None:
    """Waits for so many requests at the engine, as the server counts them."""
    async with asyncio.timeout(DEADLINE):
        while await n_running(url) != n_wanted:
            await asyncio.sleep(0.005)


async def n_running(url: str) -> float:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/metrics") as response:
        lines = (await response.text()).splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("slimoe_num_requests_running "))
