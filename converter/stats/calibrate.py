"""Calibrates a model: the entry point, which runs texts through it and writes their statistics to a file."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from slimoe.converter.forward.texts import (
    DEFAULT_LENGTH,
    DEFAULT_TOKENS,
    CalibrationText,
    TextEncoder,
    TextFile,
    default_texts,
    read_texts,
)
from slimoe.converter.gguf.writer import check_target
from slimoe.converter.source.model_source import ModelSource
from slimoe.converter.source.open_source import model_files, open_source
from slimoe.converter.stats.estimate import Estimate, estimate
from slimoe.converter.stats.forward_pass import CalibrationSettings, Progress, calibrate, coverage
from slimoe.converter.stats.imatrix_file import imatrix_of, write_imatrix
from slimoe.converter.stats.observer import Samples
from slimoe.converter.stats.statistics import Statistics
from slimoe.converter.stats.statistics_file import save_statistics
from slimoe.converter.stats.type_errors import type_by_name
from slimoe.offload.errors import UnsupportedModelError, UsageError
from slimoe.offload.files.whole_file import Destination, real_path
from slimoe.offload.resources.memory import peak_resident_bytes
from slimoe.offload.resources.processors import usable_processors

OpenEncoder = Callable[[Path, Mapping[str, Any]], TextEncoder]
"""From a model's path and its metadata to its tokenizer."""


@dataclass(frozen=True, slots=True)
class CalibrateOptions:
    """Which model to calibrate, and on what: `texts` are FILE or DOMAIN=FILE, none for the shipped mixture of texts.

    `imatrix` is the path of llama.cpp's importance matrix, None if it is not wanted.
    """

    source: Path
    target: Path
    texts: tuple[str, ...] = ()
    n_tokens: int = DEFAULT_TOKENS
    length: int = DEFAULT_LENGTH
    settings: CalibrationSettings = field(default_factory=CalibrationSettings)
    force: bool = False
    imatrix: Path | None = None


@dataclass(frozen=True, slots=True)
class CalibratePlan:
    """An opened calibration: the model, the texts as tokens, the settings, and the estimate of time and memory.

    `imatrix` is the path of the importance matrix, None if it is not wanted.
    """

    source: ModelSource
    text: CalibrationText
    settings: CalibrationSettings
    estimate: Estimate
    imatrix: Path | None = None


@dataclass(frozen=True, slots=True)
class LayerSummary:
    """A layer in a line; `busiest_share` and `n_unseen` are None for a layer without experts.

    `busiest_share` is the part of all expert selections that its most used expert has, `n_unseen` the number of experts
    that no token selected. The cosines are means between the residual stream before and after the block and before and
    after its feed-forward part.
    """

    busiest_share: float | None
    n_unseen: int | None
    block_cosine: float
    ffn_cosine: float


@dataclass(frozen=True, slots=True)
class CalibrateReport:
    """A summary of a calibration, in which `n_seen` of `n_experts` were selected; peak bytes are of the process."""

    path: Path
    n_tokens: int
    n_sequences: int
    domains: Mapping[str, int]
    seconds: float
    n_bytes: int
    n_seen: int
    n_experts: int
    peak_bytes: int
    layers: tuple[LayerSummary, ...]


def plan(options: CalibrateOptions, open_encoder: OpenEncoder) -> CalibratePlan:
    """Opens the model, reads the texts, and estimates the time and memory that are needed; writes nothing.

    Raises UsageError for a target that exists or cannot be, unknown types or too little text, and ModelFileError or
    UnsupportedModelError for the model.
    """
    check_targets(options)
    for name in options.settings.samples.types:
        type_by_name(name)
    source = open_source(options.source)
    if source.spec.n_expert_aux:
        problem = "the model has compressed experts, of which calibration knows nothing."
        raise UnsupportedModelError(source.path, problem, "Calibrate the model that it was made of.")
    for target in (options.target, options.imatrix):
        if target is not None:
            check_target(target, 0, force=options.force, sources=model_files(source))
    files = tuple(map(TextFile.parse, options.texts)) or default_texts()
    encoder = open_encoder(source.path, source.metadata)
    text = read_texts(files, encoder, options.n_tokens, min(options.length, source.spec.n_ctx_train))
    expected = estimate(source, text, options.settings)
    return CalibratePlan(source, text, options.settings, expected, options.imatrix)


def check_targets(options: CalibrateOptions) -> None:
    """Raises UsageError for a target that exists or cannot be."""
    check_target(options.target, 0, force=options.force)
    if options.imatrix is not None:
        check_target(options.imatrix, 0, force=options.force)
        if real_path(options.imatrix) == real_path(options.target):
            raise UsageError(f"{options.target} cannot be both files. Choose another name for the imatrix.")


def carry_out(planned: CalibratePlan, destination: Destination, on_progress: Progress) -> CalibrateReport:
    """Calibrates and saves the statistics; until then, finished layers lie in the destination's folder.

    Raises as `calibrate`, `save_statistics` and `write_imatrix` do.
    """
    begin = time.monotonic()
    statistics = calibrate(planned.source, planned.text, planned.settings, destination.folder, on_progress)
    save_statistics(statistics, destination.target, destination.folder)
    if planned.imatrix is not None:
        architecture = planned.source.spec.architecture
        imatrix = imatrix_of(statistics, architecture.projections)
        write_imatrix(imatrix.joined() if architecture.joins_qkv else imatrix, planned.imatrix)
    destination.forget()
    return _report(statistics, destination.target, time.monotonic() - begin)


def settings(
    device: str = "auto", types: str | None = None, sensitivity: bool = True, widths: bool = True
) -> CalibrationSettings:
    """The settings from a command line's words: a torch device or "auto", and types with commas between them or "none".

    Raises UsageError for a device that torch does not have.
    """
    samples = Samples(widths=widths)
    if types is not None:
        names = () if types == "none" else tuple(name.strip().upper() for name in types.split(","))
        samples = replace(samples, types=names)
    made = CalibrationSettings(samples=samples, device=choose_device(device), n_threads=usable_processors())
    return replace(made, prices=True) if sensitivity else replace(made, n_sensitivity=0)


def choose_device(name: str) -> str:
    """A torch device for auto, cpu, cuda or any of torch's names; raises UsageError for one that is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, dtype=torch.float64, device=name)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UsageError(f"torch has no device {name!r} here ({reason}). Use --device cpu.") from None
    return name


def _report(statistics: Statistics, target: Path, seconds: float) -> CalibrateReport:
    layers = []
    n_tokens = statistics.n_tokens
    for layer in statistics.layers:
        counts = None if layer.outputs is None else layer.outputs.n_pick
        layers.append(
            LayerSummary(
                busiest_share=None if counts is None else float(counts.max() / counts.sum()),
                n_unseen=None if counts is None else int((counts == 0).sum()),
                block_cosine=layer.similarity.block_cosine / n_tokens,
                ffn_cosine=layer.similarity.ffn_cosine / n_tokens,
            )
        )
    n_seen, n_experts = coverage(statistics.layers)
    domains: dict[str, int] = {}
    for domain, one in zip(statistics.domains, statistics.tokens, strict=True):
        domains[domain] = domains.get(domain, 0) + len(one)
    return CalibrateReport(
        path=target,
        n_tokens=n_tokens,
        n_sequences=len(statistics.tokens),
        domains=domains,
        seconds=seconds,
        n_bytes=target.stat().st_size,
        n_seen=n_seen,
        n_experts=n_experts,
        peak_bytes=peak_resident_bytes(),
        layers=tuple(layers),
    )
