"""What evaluating a file will take, by kind of work, from the speed of the source's first block on some of the text."""

import time
from contextlib import closing
from dataclasses import dataclass
from statistics import median

from slimoe.converter.forward.stream import Observer, Sequences, Stream
from slimoe.converter.forward.windows import Windows
from slimoe.converter.source.model_source import ModelSource

SOURCE, FILE, SECOND = "the source's answers", "the file's answers", "the second copies' answers"
PLAIN, BLOCKS, WRITING = "plain types", "each block alone", "writing texts"
"""Kinds of work, as progress names them too."""
_FEW, _MANY = 32, 256
_TRIAL_SECONDS = 0.5
"""Passes are tried for so long, and the middle one counts: the first is slow, and so are disturbed ones."""


@dataclass(frozen=True, slots=True)
class ReportWork:
    """How much there is to do: `windows` through the source and each of the file's `n_copy` sets of copies; a swap of
    each block on `block_windows`, if any; `n_plain` plain models, which take `plain_seconds` to quantise; `n_written`
    tokens of each of `n_texts` texts written by `n_models` models.
    """

    windows: Windows
    block_windows: Windows | None
    n_copy: int
    n_plain: int
    plain_seconds: float
    n_texts: int
    n_written: int
    n_models: int


def estimate_seconds(source: ModelSource, work: ReportWork, device: str = "cpu") -> dict[str, float]:
    """Seconds by kind of work, in its order. Raises ModelFileError."""
    few, many = _pass_seconds(source, work.windows, _FEW, device), _pass_seconds(source, work.windows, _MANY, device)
    n_layer = source.spec.n_layer
    per_token = max(0.0, many[0] - few[0]) / max(1, many[1] - few[1])
    reading = max(0.0, few[0] - per_token * few[1])

    def layers(n: float, n_tokens: int) -> float:
        """Reading takes its time for any number of tokens."""
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


def _pass_seconds(source: ModelSource, windows: Windows, n_tokens: int, device: str) -> tuple[float, int]:
    """Of one block on so many tokens, in the median, and how many there were."""
    tokens: list[tuple[int, ...]] = []
    for window in windows.sequences.tokens:
        left = n_tokens - sum(map(len, tokens))
        if left > 0:
            tokens.append(window[:left])
    sequences, seconds = Sequences(tuple(tokens)), list[float]()
    while sum(seconds) < _TRIAL_SECONDS:
        with closing(Stream(source, sequences, device)) as stream:
            stream.embed()
            begin = time.perf_counter()
            stream.pass_layer(0, Observer())
            seconds.append(time.perf_counter() - begin)
    return median(seconds), sequences.n_rows
