"""What judging a file will take, from the speed of the source's first block on some of the text."""

import time

from converter.model_source import ModelSource
from converter.stream import Observer, Sequences, Stream
from converter.windows import Windows

_FEW, _MANY = 32, 256


def estimate_seconds(
    source: ModelSource, windows: Windows, block_windows: Windows | None, n_models: int, device: str = "cpu"
) -> float:
    """Seconds of running `windows` through the source and `n_models` others of its size, and of swapping each block.

    Raises ModelFileError.
    """
    few, many = _pass_seconds(source, windows, _FEW, device), _pass_seconds(source, windows, _MANY, device)
    n_layer = source.spec.n_layer

    def layer(n_tokens: int) -> float:
        """Reading takes its time for any number of tokens."""
        per_token = max(0.0, many[0] - few[0]) / max(1, many[1] - few[1])
        return max(0.0, few[0] - per_token * few[1]) + per_token * n_tokens

    total = n_layer * (1 + n_models) * layer(windows.sequences.n_rows)
    if block_windows is not None:
        total += (n_layer * 2 + n_layer * (n_layer - 1) / 2) * layer(block_windows.sequences.n_rows)
    return total


def _pass_seconds(source: ModelSource, windows: Windows, n_tokens: int, device: str) -> tuple[float, int]:
    """Of one block on so many tokens, and how many there were."""
    tokens: list[tuple[int, ...]] = []
    for window in windows.sequences.tokens:
        left = n_tokens - sum(map(len, tokens))
        if left > 0:
            tokens.append(window[:left])
    stream = Stream(source, Sequences(tuple(tokens)), device)
    try:
        stream.embed()
        begin = time.perf_counter()
        stream.pass_layer(0, Observer())
        return time.perf_counter() - begin, stream.sequences.n_rows
    finally:
        stream.close()
