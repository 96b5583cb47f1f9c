"""Runs texts through a model once and gathers all statistics that methods need, one layer in memory at a time.

Finished layers are kept on disk until the pass is complete, so that an interrupted pass continues where it was.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from slimoe.converter.forward.block import read_output_norm
from slimoe.converter.forward.stream import Sequences, Stream
from slimoe.converter.forward.texts import CalibrationText
from slimoe.converter.source.model_source import MatrixKey, ModelSource
from slimoe.converter.stats.observer import LayerObserver, Samples
from slimoe.converter.stats.resume import PartialBackward, PartialPass
from slimoe.converter.stats.routing_sums import link
from slimoe.converter.stats.sensitivity import measure_sensitivity
from slimoe.converter.stats.statistics import LayerStatistics, Statistics
from slimoe.converter.stats.sums import column_squares, spread_rows
from slimoe.converter.stats.type_costs import measure_type_costs, packed_costs

Progress = Callable[[str, int, int], None]
"""Called with the name of the work, the number of its steps that are done, and the number of all its steps."""

_ROWS_AT_ONCE = 4096
N_STREAMS = 4
"""The number of residual streams of the whole text that a pass holds."""


@dataclass(frozen=True, slots=True)
class CalibrationSettings:
    """How to calibrate: what to measure on samples of tokens, and with which resources.

    `n_sensitivity` is the number of tokens for sensitivities, 0 for none; `device` a torch device; `n_threads` are
    threads of the quantiser; residual streams of more than `max_state_bytes` lie on disk. With `prices`, the cost of
    every type for every matrix is measured, if the model has experts.
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
    """The statistics of texts that pass through the model `source`; `partial` is a directory for finished layers.

    An interrupted pass of the same texts and settings continues from there; the caller deletes the directory after
    saving the result. Raises ModelFileError or BadLogitsError for weights that compute NaN or infinity, and
    DoesNotFitError if the disk is too small for the residual streams.
    """
    begin, samples = time.monotonic(), settings.samples.stored()
    kept = PartialPass(partial, {"source": source.source_hash, "text": text.hash, "samples": samples})
    statistics = _pass(source, text, settings, kept, on_progress)
    if settings.n_sensitivity:
        statistics = _with_sensitivity(statistics, source, settings, kept, on_progress)
        if settings.prices and source.spec.n_expert:
            costs = measure_type_costs(
                source,
                statistics,
                n_threads=settings.n_threads,
                on_progress=lambda done, matrices: on_progress("prices", done, matrices),
            )
            statistics = replace(statistics, matrix_costs=packed_costs(costs))
    n_seen, n_experts = coverage(statistics.layers)
    notes = {
        "coverage": f"{n_seen} of {n_experts} experts were routed to",
        "device": settings.device,
        "sensitivity": f"{settings.n_sensitivity} tokens",
        "samples": json.dumps(samples),
        "seconds": f"{time.monotonic() - begin:.1f}",
        "torch": str(torch.__version__),
    }
    return replace(statistics, notes=notes)


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
            observer = LayerObserver(
                source, layer, sequences.n_rows, settings.samples, settings.device, settings.n_threads
            )
            stream.pass_layer(layer, observer, observer.read_expert)
            with torch.no_grad():
                findings.append(observer.finish())
            kept.add(findings[-1], stream.h)
        on_progress("layers", n_layer, n_layer)
        norm, output_input = read_output_norm(source), np.zeros(source.spec.n_embd)
        for part in stream.h.split(_ROWS_AT_ONCE):
            output_input += column_squares(norm(part))
        tokens = [token for one in text.tokens for token in one]
        return Statistics(
            source_hash=source.source_hash,
            text_hash=text.hash,
            tokens=text.tokens,
            domains=text.domains,
            layers=tuple(link([one.statistics for one in findings], [one.predicted for one in findings])),
            output_input=output_input.astype(np.float32),
            token_count=np.bincount(tokens, minlength=source.shapes[MatrixKey("token_embd.weight")][0]),
        )
    finally:
        stream.close()


def _directory(
    n_streams: int, sequences: Sequences, source: ModelSource, settings: CalibrationSettings, kept: PartialPass
) -> Path | None:
    """The directory for `n_streams` residual streams; None if they may lie in memory. Raises DoesNotFitError."""
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
    tokens = statistics.tokens
    # Evenly spread sequences that have about as many tokens as are wanted.
    part = min(1.0, settings.n_sensitivity / statistics.n_tokens)
    rows = spread_rows(len(tokens), max(1, round(part * len(tokens))))
    sequences = Sequences(tuple(tokens[row] for row in rows))
    directory = _directory(source.spec.n_layer + 8, sequences, source, settings, kept)
    found = measure_sensitivity(
        source,
        sequences,
        device=settings.device,
        directory=directory,
        partial=PartialBackward(kept.path, f"{sequences.n_rows} tokens", source.spec.n_layer),
        on_progress=lambda done, steps: on_progress("sensitivity", done, steps),
    )
    found_layers = zip(statistics.layers, found.layers, found.removals, strict=True)
    layers = tuple(replace(layer, sensitivity=one, removals=removals) for layer, one, removals in found_layers)
    return replace(statistics, layers=layers, output_gradient=found.output, token_gradient=found.token)


def coverage(layers: tuple[LayerStatistics, ...]) -> tuple[int, int]:
    """The number of experts that any token selected, and the number of all experts."""
    counts = [layer.outputs.n_pick for layer in layers if layer.outputs is not None]
    return sum(int((one > 0).sum()) for one in counts), sum(len(one) for one in counts)
