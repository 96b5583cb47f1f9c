"""Estimates the seconds that an evaluation takes, from the speed of the source's first block on some of the text."""

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from statistics import median

from slimoe.converter.forward.stream import Observer, Sequences, Stream
from slimoe.converter.forward.windows import Windows
from slimoe.converter.source.model_source import ModelSource

SOURCE, FILE, SECOND = "the source's predictions", "the file's predictions", "the second copies' predictions"
PLAIN, BLOCKS, WRITING = "plain types", "each block alone", "writing texts"
"""Kinds of work, which progress names like this."""
_FEW, _MANY = 32, 256
_TRIAL_SECONDS, _MOST_TRIALS = 0.5, 9
"""How long passes are tried, and how many; their median counts, as the first is slow, and disturbed ones are too."""


@dataclass(frozen=True, slots=True)
class ReportWork:
    """The work of an evaluation.

    `windows` pass through the source and through the file with each of its `n_copy` sets of copies, and
    `block_windows`, if there are any, through the source with each block swapped. `n_plain` models in plain types take
    `plain_seconds` to quantise. `n_models` models continue `n_texts` texts by `n_written` tokens each.
    """

    windows: Windows
    block_windows: Windows | None
    n_copy: int
    n_plain: int
    plain_seconds: float
    n_texts: int
    n_written: int
    n_models: int


def estimate_seconds(
    source: ModelSource, work: ReportWork, device: str = "cpu", clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Estimates the seconds by kind of work, in the order in which it is done.

    `clock` tells seconds. Raises ModelFileError.
    """
    n_layer = source.spec.n_layer
    reading, per_token = _layer_seconds(source, work.windows.sequences, device, clock)

    def layers(n: float, n_tokens: int) -> float:
        """Seconds of `n` layers, whose reading does not depend on the number of tokens."""
        return n * (reading + per_token * n_tokens)

    whole = layers(n_layer, work.windows.sequences.n_rows)
    seconds = {SOURCE: whole, FILE: whole}
    if work.n_copy > 1:
        seconds[SECOND] = whole
    if work.n_plain:
        seconds[PLAIN] = work.n_plain * whole + work.plain_seconds
    if work.block_windows is not None:
        n_swapped = n_layer * 2 + n_layer * (n_layer - 1) / 2
        seconds[BLOCKS] = layers(n_swapped, work.block_windows.sequences.n_rows)
    if work.n_written:
        # Engines compute each token once; what is written without one is read again for every token.
        n_tokens = work.n_models * work.n_texts * work.n_written
        seconds[WRITING] = n_layer * per_token * n_tokens * max(1, work.n_written // 2)
    return seconds


def pass_seconds(
    source: ModelSource, sequences: Sequences, device: str = "cpu", clock: Callable[[], float] = time.perf_counter
) -> float:
    """Estimates the seconds in which sequences pass through all layers of a model; raises ModelFileError."""
    reading, per_token = _layer_seconds(source, sequences, device, clock)
    return source.spec.n_layer * (reading + per_token * sequences.n_rows)


def _layer_seconds(
    source: ModelSource, sequences: Sequences, device: str, clock: Callable[[], float]
) -> tuple[float, float]:
    """Seconds to read a layer, and those of a token in it."""
    few, many = (_trial_seconds(source, sequences, n_tokens, device, clock) for n_tokens in (_FEW, _MANY))
    per_token = max(0.0, many[0] - few[0]) / max(1, many[1] - few[1])
    return max(0.0, few[0] - per_token * few[1]), per_token


def _trial_seconds(
    source: ModelSource, texts: Sequences, n_tokens: int, device: str, clock: Callable[[], float]
) -> tuple[float, int]:
    """Median seconds of the first block on at most `n_tokens` tokens, and the number of tokens that there were."""
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
            stream.pass_layer(0, Observer())
            seconds.append(clock() - begin)
    return median(seconds), sequences.n_rows
