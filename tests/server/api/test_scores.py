"""Scores of a real engine's answers, by OpenAI's client: tokens and bytes joined are the text, whole and streamed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.models.live_server import serving

HELLO: list[Any] = [{"role": "user", "content": "hello world"}]
WILD: dict[str, Any] = {"temperature": 1000.0, "top_p": 1, "max_tokens": 40}
ANY_TOKEN = {"ignore_eos": True, "top_k": 0, "min_p": 0}
"""Every token of the vocabulary, control tokens and parts of characters among them, is about as likely."""


@pytest.fixture(scope="module")
def client(tiny_model: Path) -> Iterator[openai.OpenAI]:
    with (
        serving(tiny_model, "--parallel", "2") as (_, url),
        openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client,
    ):
        yield client


def chat(client: openai.OpenAI, stream: bool, arguments: dict[str, Any]) -> tuple[str, list[Any]]:
    answer: Any = client.chat.completions.create(
        model="", messages=HELLO, logprobs=True, top_logprobs=3, stream=stream, **arguments
    )
    if not stream:
        return answer.choices[0].message.content, answer.choices[0].logprobs.content
    text, tokens = "", list[Any]()
    for chunk in answer:
        (choice,) = chunk.choices
        text += choice.delta.content or ""
        own = choice.logprobs.content if choice.logprobs else []
        assert "".join(token.token for token in own) == (choice.delta.content or "")
        tokens += own
    return text, tokens


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stop", [[], ["e", "x", "a"]])
def test_a_chats_tokens_join_to_its_text(client: openai.OpenAI, stream: bool, stop: list[str]) -> None:
    seen = set()
    for seed in range(12):
        arguments = {**WILD, "seed": seed, "stop": stop, "extra_body": ANY_TOKEN}
        text, tokens = chat(client, stream, arguments)
        assert "".join(token.token for token in tokens) == text
        assert b"".join(bytes(token.bytes) for token in tokens).decode("utf-8", "replace") == text
        assert not any(text.count(end) for end in stop)
        seen |= {"nothing" for token in tokens if not token.token} | {"space" for token in tokens if token.token == " "}
    assert stop or "nothing" in seen, "no control token or part of a character was drawn: draw more"


@pytest.mark.parametrize("seed", range(4))
def test_the_space_before_the_first_word_is_in_no_token(client: openai.OpenAI, seed: int) -> None:
    """A word that begins with the tokenizer's space comes first: such words alone are allowed."""
    bias = {str(token): -100 for token in range(512)} | {str(token): 0 for token in _words(client)}
    text, tokens = chat(client, False, {**WILD, "seed": seed, "max_tokens": 3, "logit_bias": bias})
    assert not text.startswith(" ")
    assert "".join(token.token for token in tokens) == text
    assert tokens[0].top_logprobs
    assert all(not top.token.startswith(" ") for top in tokens[0].top_logprobs)
    assert tokens[1].token.startswith(" ")


def _words(client: openai.OpenAI) -> list[int]:
    """The tokens of words in front of which the tokenizer puts a space."""
    bodies = [{"content": word, "with_pieces": True} for word in ("hello", "quick", "the")]
    answers: list[Any] = [client.post("/tokenize", body=body, cast_to=object) for body in bodies]
    assert all(answer["tokens"][0]["piece"].startswith(" ") for answer in answers)
    return [answer["tokens"][0]["id"] for answer in answers]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["hello 日本 ü", [1, 364, 5, 2, 6], "<s>hello</s> world"])
def test_a_completions_offsets_point_at_its_tokens(client: openai.OpenAI, stream: bool, prompt: Any) -> None:
    for seed in range(4):
        arguments: Any = {**WILD, "seed": seed, "echo": True, "logprobs": 2, "extra_body": ANY_TOKEN}
        answer: Any = client.completions.create(model="", prompt=prompt, stream=stream, **arguments)
        parts = [chunk.choices[0] for chunk in answer] if stream else [answer.choices[0]]
        text = "".join(part.text for part in parts)
        scores = [part.logprobs for part in parts if part.logprobs]
        tokens = [token for score in scores for token in score.tokens]
        offsets = [offset for score in scores for offset in score.text_offset]
        tops = [top for score in scores for top in score.top_logprobs]
        values = [value for score in scores for value in score.token_logprobs]
        spans = zip(tokens, offsets, [*offsets[1:], len(text)], strict=True)
        not_shown = {token for token, begin, end in spans if text[begin:end] != token}
        assert not_shown <= {"<s>", "</s>"}
        assert all(top[token] >= value for top, token, value in zip(tops[1:], tokens[1:], values[1:], strict=True))
