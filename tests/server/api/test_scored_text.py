"""Tokens with scores, joined, are the text they come with: pieces of characters, stop strings, prompts."""

import random

import pytest

from slimoe.offload.text.tokenizer import TextStream
from slimoe.server.api.scored_text import SaidTokens, ScoredText, fitted
from slimoe.server.messages import ScoredToken

PIECES = [
    b" hello",
    b" ",
    b"a",
    b"b",
    b"ab",
    b"ENDE",
    b"EN",
    "日".encode(),
    "€uro".encode(),
    b"",
    b"\xe2",
    b"\x82",
    b"\xac",
]


def token(piece: bytes, text: str | None) -> ScoredToken:
    return ScoredToken(0, piece, -1.0, text=text)


def tell(pieces: list[bytes], stop: list[str], *, strips_space: bool) -> tuple[str, list[ScoredToken], bool]:
    """All that is told of an answer; every piece of it is checked on its way."""
    stream, scored = TextStream(lambda n: pieces[n], stop, strips_space), ScoredText()
    text, tokens = "", list[ScoredToken]()
    for n in range(len(pieces)):
        released = stream.feed(n)
        piece = scored.add(released, token(stream.piece, stream.added))
        assert "".join(t.text or "" for t in piece.scores) == piece.text
        text, tokens = text + piece.text, tokens + piece.scores
        if stream.stopped:
            break
    rest = scored.finish(stream.finish())
    assert "".join(t.text or "" for t in rest.scores) == rest.text
    return text + rest.text, tokens + rest.scores, stream.stopped


@pytest.mark.parametrize("strips_space", [False, True])
@pytest.mark.parametrize("stop", [[], ["END", "ba"], ["b"], ["日€"]])
def test_tokens_join_to_the_text(stop: list[str], strips_space: bool) -> None:
    draw = random.Random(7)
    for _ in range(500):
        pieces = draw.choices(PIECES, k=draw.randrange(1, 12))
        text, tokens, stopped = tell(pieces, stop, strips_space=strips_space)
        plain = TextStream(lambda n: pieces[n], stop, strips_space)  # noqa: B023 - used at once
        assert text == "".join(plain.feed(n) for n in range(len(pieces))) + plain.finish()
        joined = b"".join(t.piece for t in tokens)
        assert joined.decode("utf-8", "replace") == text
        assert len(tokens) <= len(pieces)
        assert stopped or len(tokens) == len(pieces)


def test_a_token_waits_for_all_of_its_text() -> None:
    scored = ScoredText()
    assert scored.add("one ", token(b"one EN", "one EN")) == ("", [])
    assert scored.add("", token(b"D", "D")) == ("", [])
    assert scored.finish("") == ("one ", [token(b"one ", "one ")])


def test_text_without_scores_is_told_at_once() -> None:
    scored = ScoredText()
    assert scored.add("one", None) == ("one", [])
    assert scored.add("", None) == ("", [])
    assert scored.finish(" two") == (" two", [])


def test_a_prompts_tokens_are_those_of_its_text() -> None:
    pieces = [b"<s>", b" a", b" \xe6", b"\x97", b"\xa5", b"</s>", b" b"]
    found = fitted([token(piece, None) for piece in pieces], "a 日</s> b")
    assert [t.text for t in found] == [None, "a", " ", "", "日", "</s>", " b"]
    assert [t.text for t in fitted([token(piece, None) for piece in pieces], "a 日 b")][-2:] == [None, " b"]


def said(tokens: list[str], heard: list[str]) -> list[list[str]]:
    """What of the tokens is given out with each text that a reader tells, one after each token."""
    kept = SaidTokens()
    return [
        [one.text or "" for one in kept.take([token(text.encode(), text)], words)]
        for text, words in zip(tokens, heard, strict=True)
    ]


@pytest.mark.parametrize(
    ("tokens", "heard", "expected"),
    [
        (["a", "b"], ["a", "b"], [["a"], ["b"]]),
        (["<think>", "ab", "</think>", "b"], ["", "", "", "b"], [[], [], [], ["b"]]),
        (["a", " <", "b"], ["a", " ", "<b"], [["a"], [" "], ["<", "b"]]),
        (["a", "<", "call>", "{}", "</call>", "a"], ["a", "", "", "", "", "a"], [["a"], [], [], [], [], ["a"]]),
        (["</think>a<", "b"], ["a", "<b"], [["a"], ["<", "b"]]),
        (["a<x>b</x>c"], ["ac"], [["ac"]]),
        (["<x>", "a"], ["", "other"], [[], []]),
    ],
)
def test_tokens_of_what_is_said(tokens: list[str], heard: list[str], expected: list[list[str]]) -> None:
    assert said(tokens, heard) == expected


def test_tokens_without_text_stay_where_all_is_said() -> None:
    """A character over two tokens, of which the first has no text."""
    kept = SaidTokens()
    found = kept.take([token(b"\xc3", ""), token(b"\xa9", "é")], "é")
    assert [one.piece for one in found] == [b"\xc3", b"\xa9"]
    assert kept.take([token(b"\xff", "")], "") == [token(b"\xff", "")]
