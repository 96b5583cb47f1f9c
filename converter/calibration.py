"""Runs texts through a model once and learns everything that methods ask for, one layer in memory at a time.

What is done of a pass lies beside its result until that is whole, so that an interrupted pass continues where it was.
"""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from converter.block import read_tensor, rms_norm
from converter.input_sums import column_squares
from converter.layer_observer import LayerFindings, LayerObserver, Samples
from converter.model_source import MatrixKey, ModelSource
from converter.partial_pass import PartialPass
from converter.routing_sums import link
from converter.statistics import Int, LayerStatistics, Single, Statistics
from converter.stream import Sequences, Stream

Progress = Callable[[int, int], None]
"""Called with (layers done, layers of the model)."""

_ROWS_AT_ONCE = 4096
N_STREAMS = 4
"""Streams of the whole text that a pass holds."""


@dataclass(frozen=True, slots=True)
class CalibrationText:
    """Sequences of token ids, and the name of each one's text."""

    tokens: tuple[tuple[int, ...], ...]
    domains: tuple[str, ...]

    @property
    def hash(self) -> str:
        """A digest of all of it."""
        return hashlib.sha256(json.dumps([self.tokens, self.domains]).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class CalibrationSettings:
    """How to learn: a torch device, threads of the quantiser, and beyond how many bytes streams lie on disk."""

    samples: Samples = field(default_factory=Samples)
    device: str = "cpu"
    n_threads: int = 1
    max_state_bytes: int = 1 << 31


def calibrate(
    source: ModelSource,
    text: CalibrationText,
    settings: CalibrationSettings,
    partial: Path,
    on_progress: Progress = lambda _done, _all: None,
) -> Statistics:
    """Everything but the sensitivity, of texts that pass `source`; `partial` is a directory for what is done so far.

    A pass of the same texts and settings that was interrupted goes on from there; the caller deletes the directory when
    it has saved the result. Raises ModelFileError for weights that give no numbers, DoesNotFitError when the disk is
    too small for the streams.
    """
    begin = time.monotonic()
    sequences = Sequences(text.tokens)
    kept = PartialPass(partial, {"source": source.source_hash, "text": text.hash, "samples": asdict(settings.samples)})
    n_bytes = N_STREAMS * 4 * sequences.n_rows * source.spec.n_embd
    directory = kept.path if n_bytes > settings.max_state_bytes else None
    stream = Stream(source, sequences, settings.device, directory)
    try:
        findings = kept.restore(stream.h)
        if not findings:
            stream.embed()
        for layer in range(len(findings), source.spec.n_layer):
            on_progress(layer, source.spec.n_layer)
            findings.append(_pass_layer(stream, layer, settings))
            kept.add(findings[-1], stream.h)
        on_progress(source.spec.n_layer, source.spec.n_layer)
        layers = link([one.statistics for one in findings], [one.foreseen for one in findings])
        statistics = Statistics(
            source_hash=source.source_hash,
            text_hash=text.hash,
            tokens=text.tokens,
            domains=text.domains,
            layers=tuple(layers),
            output_input=_output_input(source, stream.h),
            token_count=_token_count(text, source),
        )
    finally:
        stream.close()
    return replace(statistics, notes=_notes(statistics, settings, time.monotonic() - begin))


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
        "samples": json.dumps(asdict(settings.samples)),
        "seconds": f"{seconds:.1f}",
        "torch": str(torch.__version__),
    }


def coverage(layers: tuple[LayerStatistics, ...]) -> tuple[int, int]:
    """How many experts any token was routed to, and how many there are."""
    counts = [layer.outputs.n_pick for layer in layers if layer.outputs is not None]
    return sum(int((one > 0).sum()) for one in counts), sum(len(one) for one in counts)
