"""A tiny model and what calibration says of it, for tests of slimming."""

from pathlib import Path

import numpy as np

from slimoe.converter.forward.texts import CalibrationText
from slimoe.converter.source.model_source import ModelSource
from slimoe.converter.stats.forward_pass import CalibrationSettings, calibrate
from slimoe.converter.stats.observer import Samples
from slimoe.converter.stats.statistics import Statistics


def random_sequences(n_sequences: int, length: int, n_vocab: int, seed: int = 0) -> tuple[tuple[int, ...], ...]:
    rng = np.random.default_rng(seed)
    return tuple(tuple(map(int, rng.integers(3, n_vocab, length))) for _ in range(n_sequences))


def learnt(source: ModelSource, directory: Path, n_sequences: int = 6, length: int = 48) -> Statistics:
    """Statistics of random tokens, with all that a plan may ask for."""
    text = CalibrationText(random_sequences(n_sequences, length, source.spec.n_vocab), ("random",) * n_sequences)
    settings = CalibrationSettings(Samples(types=()), n_sensitivity=n_sequences * length, prices=True)
    return calibrate(source, text, settings, directory / "partial")
