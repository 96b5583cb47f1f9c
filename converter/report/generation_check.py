"""Checks whether a model still writes: it continues texts by the likeliest tokens, and loops and endings are counted.

The divergence on given texts does not show whether a model falls into a loop when it reads its own words.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from slimoe.converter.forward.head import read_head
from slimoe.converter.forward.stream import Sequences, run
from slimoe.converter.source.held_source import HeldSource
from slimoe.converter.source.model_source import ModelSource

_REPEATS, _SPAN = 4, 16
"""The least number of repetitions of a loop, and of its tokens in all."""

Continue = Callable[[Sequence[Sequence[int]], int], Sequence[Sequence[int]]]
"""Continues prompts by at most a number of tokens each, with the ending token: by an engine, or by `greedy`."""


@dataclass(frozen=True, slots=True)
class Loop:
    """A stretch of `length` tokens from `start` on that repeats itself every `period` tokens."""

    start: int
    period: int
    length: int


@dataclass(frozen=True, slots=True)
class Continuation:
    """What a model wrote after a prompt: the `tokens`, whether it `ended` the text by itself, and the first loop.

    `distinct` is the number of different tokens over that of all tokens, 0 for an empty text.
    """

    tokens: tuple[int, ...]
    ended: bool
    loop: Loop | None
    distinct: float


@dataclass(frozen=True, slots=True)
class GenerationCheck:
    """The continuations of all prompts, whose counts are meaningful only beside those of the source model."""

    continuations: tuple[Continuation, ...]

    @property
    def n_looped(self) -> int:
        """The number of texts with a loop."""
        return sum(one.loop is not None for one in self.continuations)

    @property
    def n_ended(self) -> int:
        """The number of texts that the model ended by itself."""
        return sum(one.ended for one in self.continuations)

    @property
    def distinct(self) -> float:
        """The mean of the texts' `distinct`."""
        return sum(one.distinct for one in self.continuations) / len(self.continuations)


def check_generation(
    continue_: Continue, prompts: Sequence[Sequence[int]], n_tokens: int, ends: Collection[int]
) -> GenerationCheck:
    """Has prompts continued by at most `n_tokens` tokens each; `ends` are the tokens that end a text."""
    assert prompts
    return GenerationCheck(tuple(check_continuation(tokens, ends) for tokens in continue_(prompts, n_tokens)))


def check_continuation(tokens: Sequence[int], ends: Collection[int]) -> Continuation:
    """Looks for an ending and a loop in the tokens that continue a prompt."""
    ended = bool(tokens) and tokens[-1] in ends
    text = tuple(tokens[:-1] if ended else tokens)
    return Continuation(tuple(tokens), ended, find_loop(text), len(set(text)) / len(text) if text else 0.0)


def find_loop(tokens: Sequence[int], repeats: int = _REPEATS, span: int = _SPAN) -> Loop | None:
    """Finds the first loop of the shortest period with at least `repeats` repetitions and `span` tokens, if any."""
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
    """Continues texts by the likeliest tokens, computing all tokens again for each new one, with all weights in memory.

    This is for small models, such as those of tests; an engine is faster for all others. Continuing raises
    ModelFileError.
    """
    held = HeldSource(source)

    def continue_(prompts: Sequence[Sequence[int]], n_tokens: int) -> list[tuple[int, ...]]:
        texts = [tuple(prompt) for prompt in prompts]
        for _ in range(n_tokens):
            going = [n for n, text in enumerate(texts) if len(text) == len(prompts[n]) or text[-1] not in ends]
            if not going:
                break
            sequences = Sequences(tuple(texts[n] for n in going))
            last = torch.tensor([end - 1 for _, end in sequences.spans()])
            with torch.no_grad():
                following = read_head(held)(run(held, sequences)[last]).argmax(-1).tolist()
            for n, token in zip(going, following, strict=True):
                texts[n] = (*texts[n], token)
        return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]

    return continue_
