"""Estimates the seconds that an evaluation takes, from the speed of one of the source's layers on some of the text."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from slimoe.converter.forward.pass_time import layer_seconds
from slimoe.converter.forward.windows import Windows
from slimoe.converter.source.model_source import ModelSource

SOURCE, FILE, SECOND = "the source's predictions", "the file's predictions", "the second copies' predictions"
PLAIN, BLOCKS, WRITING = "plain types", "each block alone", "writing texts"
"""Kinds of work, which progress names like this."""


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
    reading, per_token = layer_seconds(source, work.windows.sequences, device, clock)

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
