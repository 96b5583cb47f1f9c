"""The state of a running healing on disk, from which the same command goes on after an interruption."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from slimoe.converter.source.model_source import MatrixKey, parse_key
from slimoe.converter.stats.statistics_file import Arrays, StatisticsError, read_arrays, write_arrays

_TRAINED = "trained."


@dataclass(frozen=True, slots=True)
class Saved:
    """What a phase needs to go on: arrays, those of the trained tensors among them, and numbers."""

    arrays: Arrays
    numbers: Mapping[str, float]


class SavedState:
    """One file in the folder of a run, of one phase at a time; without a folder nothing is saved.

    `key` tells the model, the texts and the settings apart: what was saved of others is not loaded.
    """

    def __init__(self, folder: Path | None, key: str) -> None:
        self._path = None if folder is None else folder / "heal.safetensors"
        self._key = key

    def load(self, phase: str) -> Saved | None:
        """What was saved of a phase, None if there is nothing that can be read."""
        if self._path is None:
            return None
        try:
            arrays, about = read_arrays(self._path)
            if (about["key"], about["phase"]) != (self._key, phase):
                return None
            return Saved(arrays, json.loads(about["numbers"]))
        except (StatisticsError, KeyError, ValueError):
            return None

    def save(self, phase: str, saved: Saved) -> None:
        """Replaces what was saved before; raises UsageError or DoesNotFitError if the file cannot be written."""
        if self._path is not None:
            about = {"key": self._key, "phase": phase, "numbers": json.dumps(dict(saved.numbers))}
            write_arrays(saved.arrays, self._path, about)


def trained_arrays(tensors: Mapping[MatrixKey, Tensor], prefix: str = _TRAINED) -> Arrays:
    """Tensors as arrays to save."""
    return {f"{prefix}{key}": one.detach().cpu().numpy().copy() for key, one in tensors.items()}


def restore_trained(tensors: Mapping[MatrixKey, Tensor], arrays: Arrays, prefix: str = _TRAINED) -> None:
    """Gives the tensors their saved values again."""
    with torch.no_grad():
        for name, array in arrays.items():
            if name.startswith(prefix):
                tensors[parse_key(name.removeprefix(prefix))].copy_(torch.from_numpy(array))
