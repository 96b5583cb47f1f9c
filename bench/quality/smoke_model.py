"""A random checkpoint for smokes of benches that compress, calibrated and evaluated on random tokens."""

from pathlib import Path

import numpy as np

from bench.models.random_checkpoint import write_random_checkpoint
from bench.models.shapes import SHAPES
from slimoe.converter.forward.texts import CalibrationText
from slimoe.converter.forward.windows import cut_windows
from slimoe.converter.report.evaluation import Reference
from slimoe.converter.source.model_source import ModelSource
from slimoe.converter.source.open_source import open_source
from slimoe.converter.stats.forward_pass import CalibrationSettings, calibrate
from slimoe.converter.stats.observer import Samples
from slimoe.converter.stats.statistics import Statistics


def smoke_model(path: Path, types: tuple[str, ...] = ()) -> tuple[ModelSource, Statistics, Reference]:
    """Writes a checkpoint to `path`; returns it with its statistics, and its predictions for the same tokens.

    `types` are those whose errors are measured.
    """
    write_random_checkpoint(path, SHAPES["smoke"])
    source, rng = open_source(path), np.random.default_rng(1)
    tokens = tuple(tuple(rng.integers(0, source.spec.n_vocab, 32).tolist()) for _ in range(4))
    settings = CalibrationSettings(Samples(types=types), n_sensitivity=128)
    statistics = calibrate(source, CalibrationText(tokens, ("random",) * 4), settings, path.with_name("partial"))
    return source, statistics, Reference(source, cut_windows({"random": sum(tokens, ())}, length=32))
