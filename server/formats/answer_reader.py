"""Reads what is said, reasoning and calls out of an answer as it comes. Apart: each family has a reader."""

from typing import NamedTuple, Protocol


class CallDelta(NamedTuple):
    """A piece of the call of this number, from 0; the first one has the call's id and name and no arguments yet."""

    number: int
    id: str = ""
    name: str = ""
    arguments: str = ""


class Parts(NamedTuple):
    """What a piece of text adds to an answer."""

    text: str = ""
    reasoning: str = ""
    calls: tuple[CallDelta, ...] = ()


class AnswerReader(Protocol):
    """Takes an answer's text piece by piece."""

    def feed(self, text: str) -> Parts:
        """Takes a piece and returns what can be told; what may begin a mark is held back."""

    def finish(self) -> Parts:
        """Returns what was held back, once no more text comes."""


class PlainReader:
    """Everything is said."""

    def feed(self, text: str) -> Parts:
        """The piece as it is."""
        return Parts(text)

    def finish(self) -> Parts:
        """Nothing was held back."""
        return Parts()


def joined(first: Parts, second: Parts) -> Parts:
    """Two successive parts as one."""
    return Parts(first.text + second.text, first.reasoning + second.reasoning, (*first.calls, *second.calls))
