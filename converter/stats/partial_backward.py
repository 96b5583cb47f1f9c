"""A backward pass on disk while it runs: what each finished layer gave, and the gradient before the last of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slimoe.converter.stats.resume import save_rows
from slimoe.converter.stats.statistics_file import StatisticsError, read_arrays, write_arrays
from slimoe.offload.files.whole_file import write_whole

Sums = dict[str, NDArray[np.float64]]

_STATE = "backward.json"


class PartialBackward:
    """Lies in the directory of the calibration that it belongs to; `key` says which pass of it this is.

    Steps are numbered as layers are, and the head as the layer behind the last: each is done after those above it.
    """

    def __init__(self, path: Path, key: str, n_layer: int) -> None:
        self._path, self._key, self._n_layer = path, key, n_layer

    def restore(self, gradient: Tensor) -> dict[int, Sums]:
        """What finished steps gave; `gradient` becomes the one before the last. Nothing if it cannot be read."""
        try:
            state = json.loads((self._path / _STATE).read_text("utf-8"))
            if state["key"] != self._key:
                return {}
            last = int(state["step"])
            found: dict[int, Sums] = {step: read_arrays(self._sums(step))[0] for step in range(last, self._n_layer + 1)}
            gradient.copy_(torch.from_numpy(np.load(self._gradient(last), mmap_mode="c")))
        except (StatisticsError, KeyError, TypeError, OSError, ValueError, RuntimeError):
            return {}
        return found

    def add(self, step: int, sums: Sums, gradient: Tensor) -> None:
        """Keeps another step's sums, and the gradient before it in place of the one behind; raises as
        `PartialPass.add` does."""
        write_arrays(sums, self._sums(step), {})
        state: dict[str, Any] = {"key": self._key, "step": step}
        save_rows(self._gradient(step), gradient)
        write_whole(self._path / _STATE, json.dumps(state).encode())
        self._gradient(step + 1).unlink(missing_ok=True)

    def _sums(self, step: int) -> Path:
        return self._path / f"backward-{step:04}.safetensors"

    def _gradient(self, step: int) -> Path:
        return self._path / f"gradient-{step:04}.npy"
