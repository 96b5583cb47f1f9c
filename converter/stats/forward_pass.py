"""Runs texts through a model once and learns everything that methods ask for, one layer in memory at a time.

What is done of a pass lies beside its result until that is whole, so that an interrupted pass continues where it was.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from slimoe.converter.forward.block import read_tensor, rms_norm
from slimoe.converter.forward.stream import Sequences, Stream
from slimoe.converter.forward.texts import CalibrationText
from slimoe.converter.source.model_source import MatrixKey, ModelSource
from slimoe.converter.stats.observer import LayerFindings, LayerObserver, Samples
from slimoe.converter.stats.resume import PartialBackward, PartialPass
from slimoe.converter.stats.routing_sums import link
from slimoe.converter.stats.sensitivity import measure_sensitivity
from slimoe.converter.stats.statistics import Int, LayerStatistics, Single, Statistics
from slimoe.converter.stats.sums import column_squares, spread_rows
from slimoe.converter.stats.type_costs import measure_type_costs, packed_costs

Progress = Callable[[str, int, int], None]
"""Called with what is done now, the steps of it that are done, and all of them."""

_ROWS_AT_ONCE = 4096
N_STREAMS = 4
"""Streams of the whole text that a pass holds."""


@dataclass(frozen=True, slots=True)
class CalibrationSettings:
    """How to learn: what on samples; of how many tokens the sensitivity, 0 for none; a torch device; threads of the
    quantiser; beyond how many bytes streams lie on disk; and whether to find what every type costs every matrix
    of a model that has experts to slim.
    """

    samples: Samples = field(default_factory=Samples)
    n_sensitivity: int = 16384
    device: str = "cpu"
    n_threads: int = 1
    max_state_bytes: int = 1 << 31
    prices: bool = False


def calibrate(
    source: ModelSource,
    text: CalibrationText,
    settings: CalibrationSettings,
    partial: Path,
    on_progress: Progress = lambda _what, _done, _all: None,
) -> Statistics:
    """Everything about texts that pass `source`; `partial` is a directory for what is done so far.

    A pass of the same texts and settings that was interrupted goes on from there; the caller deletes the directory when
    it has saved the result. Raises ModelFileError or BadLogitsError for weights that give no numbers, DoesNotFitError
    when the disk is too small for the streams.
    """
    begin = time.monotonic()
    kept = PartialPass(partial, {"source": source.source_hash, "text": text.hash, "samples": asdict(settings.samples)})
    statistics = _pass(source, text, settings, kept, on_progress)
    if settings.n_sensitivity:
        statistics = _with_sensitivity(statistics, source, settings, kept, on_progress)
        if settings.prices and source.spec.n_expert:
            statistics = _with_costs(statistics, source, settings, on_progress)
    return replace(statistics, notes=_notes(statistics, settings, time.monotonic() - begin))


def _pass(
    source: ModelSource, text: CalibrationText, settings: CalibrationSettings, kept: PartialPass, on_progress: Progress
) -> Statistics:
    sequences, n_layer = Sequences(text.tokens), source.spec.n_layer
    stream = Stream(source, sequences, settings.device, _directory(N_STREAMS, sequences, source, settings, kept))
    try:
        findings = kept.restore(stream.h)
        if not findings:
            stream.embed()
        for layer in range(len(findings), n_layer):
            on_progress("layers", layer, n_layer)
            findings.append(_pass_layer(stream, layer, settings))
            kept.add(findings[-1], stream.h)
        on_progress("layers", n_layer, n_layer)
        return Statistics(
            source_hash=source.source_hash,
            text_hash=text.hash,
            tokens=text.tokens,
            domains=text.domains,
            layers=tuple(link([one.statistics for one in findings], [one.foreseen for one in findings])),
            output_input=_output_input(source, stream.h),
            token_count=_token_count(text, source),
        )
    finally:
        stream.close()


def _directory(
    n_streams: int, sequences: Sequences, source: ModelSource, settings: CalibrationSettings, kept: PartialPass
) -> Path | None:
    """Where so many streams are to lie; None for memory. Raises DoesNotFitError."""
    n_bytes = n_streams * 4 * sequences.n_rows * source.spec.n_embd
    if n_bytes <= settings.max_state_bytes:
        return None
    kept.reserve(n_bytes)
    return kept.path


def _with_sensitivity(
    statistics: Statistics,
    source: ModelSource,
    settings: CalibrationSettings,
    kept: PartialPass,
    on_progress: Progress,
) -> Statistics:
    sequences = Sequences(_some(statistics.tokens, settings.n_sensitivity))
    directory = _directory(source.spec.n_layer + 8, sequences, source, settings, kept)
    found = measure_sensitivity(
        source,
        sequences,
        device=settings.device,
        directory=directory,
        partial=PartialBackward(kept.path, f"{sequences.n_rows} tokens", source.spec.n_layer),
        on_progress=lambda done, steps: on_progress("sensitivity", done, steps),
    )
    rows = zip(statistics.layers, found.layers, found.removals, strict=True)
    layers = tuple(replace(layer, sensitivity=one, removals=removals) for layer, one, removals in rows)
    return replace(statistics, layers=layers, output_gradient=found.output, token_gradient=found.token)


def _with_costs(
    statistics: Statistics, source: ModelSource, settings: CalibrationSettings, on_progress: Progress
) -> Statistics:
    costs = measure_type_costs(
        source,
        statistics,
        n_threads=settings.n_threads,
        on_progress=lambda done, matrices: on_progress("prices", done, matrices),
    )
    return replace(statistics, matrix_costs=packed_costs(costs))


def _some(tokens: Sequence[tuple[int, ...]], n_tokens: int) -> tuple[tuple[int, ...], ...]:
    """Evenly spread sequences that have about so many tokens."""
    share = min(1.0, n_tokens / sum(map(len, tokens)))
    return tuple(tokens[row] for row in spread_rows(len(tokens), max(1, round(share * len(tokens)))))


def _pass_layer(stream: Stream, layer: int, settings: CalibrationSettings) -> LayerFindings:
    n_rows = stream.sequences.n_rows
    observer = LayerObserver(stream.source, layer, n_rows, settings.samples, settings.device, settings.n_threads)
    stream.pass_layer(layer, observer, observer.read_expert)
    with torch.no_grad():
        return observer.finish()


def _output_input(source: ModelSource, h: Tensor) -> Single:
    norm = read_tensor(source, MatrixKey("output_norm.weight"))
    total = np.zeros(source.spec.n_embd)
    for part in h.split(_ROWS_AT_ONCE):
        total += column_squares(rms_norm(part, norm, source.spec.rms_eps))
    return total.astype(np.float32)


def _token_count(text: CalibrationText, source: ModelSource) -> Int:
    n_vocab = source.shapes[MatrixKey("token_embd.weight")][0]
    return np.bincount([token for one in text.tokens for token in one], minlength=n_vocab)


def _notes(statistics: Statistics, settings: CalibrationSettings, seconds: float) -> dict[str, str]:
    seen, n_experts = coverage(statistics.layers)
    return {
        "coverage": f"{seen} of {n_experts} experts were routed to",
        "device": settings.device,
        "sensitivity": f"{settings.n_sensitivity} tokens",
        "samples": json.dumps(asdict(settings.samples)),
        "seconds": f"{seconds:.1f}",
        "torch": str(torch.__version__),
    }


def coverage(layers: tuple[LayerStatistics, ...]) -> tuple[int, int]:
    """How many experts any token was routed to, and how many there are."""
    counts = [layer.outputs.n_pick for layer in layers if layer.outputs is not None]
    return sum(int((one > 0).sum()) for one in counts), sum(len(one) for one in counts)
