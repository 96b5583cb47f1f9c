"""Whether a model still writes: some texts continued by the likeliest tokens, looked through for loops and endings.

Divergence on given texts does not show a model that falls into a loop once it reads its own words.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from slimoe.converter.forward.block import read_head
from slimoe.converter.forward.stream import Sequences, run
from slimoe.converter.source.held_source import HeldSource
from slimoe.converter.source.model_source import ModelSource

_REPEATS, _SPAN = 4, 16
"""A loop says the same at least so often, and for at least so many tokens."""

Continue = Callable[[Sequence[Sequence[int]], int], Sequence[Sequence[int]]]
"""Continues prompts by at most so many tokens each, the ending token included: by an engine, or by `greedy`."""


@dataclass(frozen=True, slots=True)
class Loop:
    """A stretch of tokens that repeats itself every `period` ones: its first token, and how many it has."""

    start: int
    period: int
    length: int


@dataclass(frozen=True, slots=True)
class Continuation:
    """What a model wrote after a prompt, and what is to be said about it. `distinct` is the share of different tokens
    among all, 0 for an empty text.
    """

    tokens: tuple[int, ...]
    ended: bool
    loop: Loop | None
    distinct: float


@dataclass(frozen=True, slots=True)
class GenerationCheck:
    """All continuations. The counts are to be seen beside those of the model that it was made of."""

    continuations: tuple[Continuation, ...]

    @property
    def n_looped(self) -> int:
        """Texts with a loop."""
        return sum(one.loop is not None for one in self.continuations)

    @property
    def n_ended(self) -> int:
        """Texts that the model ended by itself."""
        return sum(one.ended for one in self.continuations)

    @property
    def distinct(self) -> float:
        """Mean share of different tokens."""
        return sum(one.distinct for one in self.continuations) / len(self.continuations)


def check_generation(
    continue_: Continue, prompts: Sequence[Sequence[int]], n_tokens: int, ends: Collection[int]
) -> GenerationCheck:
    """Has prompts continued and looks at the results; `ends` are the tokens that end a text."""
    assert prompts
    return GenerationCheck(tuple(judge(tokens, ends) for tokens in continue_(prompts, n_tokens)))


def judge(tokens: Sequence[int], ends: Collection[int]) -> Continuation:
    """What there is to say about one continuation."""
    ended = bool(tokens) and tokens[-1] in ends
    text = tuple(tokens[:-1] if ended else tokens)
    return Continuation(tuple(tokens), ended, find_loop(text), len(set(text)) / len(text) if text else 0.0)


def find_loop(tokens: Sequence[int], repeats: int = _REPEATS, span: int = _SPAN) -> Loop | None:
    """The first loop of the shortest period: `repeats` times the same in a row, at least `span` tokens in all."""
    values = np.array(tokens, np.int64)
    for period in range(1, len(values) // repeats + 1):
        length = max(repeats * period, span)
        same = np.concatenate(([False], values[period:] == values[:-period], [False]))
        edges = np.flatnonzero(same[1:] != same[:-1])
        for begin, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            if end - begin + period >= length:
                return Loop(begin, period, end - begin + period)
    return None


def greedy(source: ModelSource, ends: Collection[int]) -> Continue:
    """Continues by the likeliest tokens, computing all tokens anew for each next one, with all weights in memory.

    For models that fit there, such as those of tests; an engine is the better way for all others. Continuing raises
    ModelFileError.
    """
    held = HeldSource(source)

    def continue_(prompts: Sequence[Sequence[int]], n_tokens: int) -> list[tuple[int, ...]]:
        texts = [tuple(prompt) for prompt in prompts]
        for _ in range(n_tokens):
            going = [n for n, text in enumerate(texts) if len(text) == len(prompts[n]) or text[-1] not in ends]
            if not going:
                break
            for n, token in zip(going, _next_tokens(held, [texts[n] for n in going]), strict=True):
                texts[n] = (*texts[n], token)
        return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]

    return continue_


def _next_tokens(source: ModelSource, texts: Sequence[tuple[int, ...]]) -> list[int]:
    sequences = Sequences(tuple(texts))
    last = torch.tensor([end - 1 for _, end in sequences.spans()])
    with torch.no_grad():
        found: list[int] = read_head(source)(run(source, sequences)[last]).argmax(-1).tolist()
    return found
