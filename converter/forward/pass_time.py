"""How long passes through a model take, tried for a moment on one of its layers and some of the text."""

import time
from collections.abc import Callable
from contextlib import closing
from statistics import median

from slimoe.converter.forward.stream import Observer, Sequences, Stream
from slimoe.converter.source.model_source import ModelSource

_FEW, _MANY = 32, 256
_TRIAL_SECONDS, _MOST_TRIALS = 0.5, 9
"""How long passes are tried, and how many; their median counts, as the first is slow, and disturbed ones are too."""


def pass_seconds(source: ModelSource, sequences: Sequences, device: str = "cpu") -> float:
    """Estimates the seconds in which sequences pass through all layers of a model; raises ModelFileError."""
    reading, per_token = layer_seconds(source, sequences, device)
    return source.spec.n_layer * (reading + per_token * sequences.n_rows)


def median_seconds(work: Callable[[], object]) -> float:
    """Median seconds of some tries; the first one, which makes tables and fills caches, does not count."""
    seconds = list[float]()
    while len(seconds) < 2 or (sum(seconds[1:]) < _TRIAL_SECONDS / 2 and len(seconds) < _MOST_TRIALS):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return median(seconds[1:])


def layer_seconds(
    source: ModelSource, sequences: Sequences, device: str = "cpu", clock: Callable[[], float] = time.perf_counter
) -> tuple[float, float]:
    """Estimates the seconds to read a layer with experts, if the model has any, and those of a token in it.

    Raises ModelFileError.
    """
    few, many = (_trial_seconds(source, sequences, n_tokens, device, clock) for n_tokens in (_FEW, _MANY))
    per_token = max(0.0, many[0] - few[0]) / max(1, many[1] - few[1])
    return max(0.0, few[0] - per_token * few[1]), per_token


def _trial_seconds(
    source: ModelSource, texts: Sequences, n_tokens: int, device: str, clock: Callable[[], float]
) -> tuple[float, int]:
    """Median seconds of a block on at most `n_tokens` tokens, and the number of tokens that there were."""
    block = next((number for number, layer in enumerate(source.layers) if layer.target), 0)
    tokens: list[tuple[int, ...]] = []
    for window in texts.tokens:
        left = n_tokens - sum(map(len, tokens))
        if left > 0:
            tokens.append(window[:left])
    sequences, seconds = Sequences(tuple(tokens)), list[float]()
    while sum(seconds) < _TRIAL_SECONDS and len(seconds) < _MOST_TRIALS:
        with closing(Stream(source, sequences, device)) as stream:
            stream.embed()
            begin = clock()
            stream.pass_layer(block, Observer())
            seconds.append(clock() - begin)
    return median(seconds), sequences.n_rows
