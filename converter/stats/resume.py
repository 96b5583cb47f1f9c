"""The state of a running calibration on disk: the results of finished layers, and what the next layer starts from.

The forward pass keeps the residual stream behind the last finished layer, the backward pass the gradient before it.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slimoe.converter.stats.observer import LayerFindings
from slimoe.converter.stats.statistics import LayerStatistics
from slimoe.converter.stats.statistics_file import StatisticsError, from_arrays, read_arrays, to_arrays, write_arrays
from slimoe.offload.errors import DoesNotFitError
from slimoe.offload.files.whole_file import clear, whole_file, write_error, write_whole

_STATE, _PREDICTED = "state.json", "foreseen"
_STATES_AT_ONCE = 6
"""Residual streams that may lie here at the same time: four of a pass and two generations of the kept one."""


@dataclass(frozen=True, slots=True)
class PartialPass:
    """The folder `path` of one forward pass, which `key` identifies; the files of another pass are deleted from it."""

    path: Path
    key: Mapping[str, Any]

    def __post_init__(self) -> None:
        try:
            self.path.mkdir(exist_ok=True)
            if not self.matches():
                clear(self.path)
        except OSError as error:
            raise write_error(self.path, error) from None

    def matches(self) -> bool:
        """Whether the files in the folder are of this pass."""
        return bool(self._state().get("key") == json.loads(json.dumps(dict(self.key))))

    def _state(self) -> dict[str, Any]:
        try:
            state = json.loads((self.path / _STATE).read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return state if isinstance(state, dict) else {}

    @property
    def n_done(self) -> int:
        """The number of layers that are finished."""
        return int(self._state().get("n_done", 0))

    def reserve(self, n_bytes: int) -> None:
        """Raises DoesNotFitError if the disk has fewer bytes free: writing to a mapped file must not find it full."""
        available = shutil.disk_usage(self.path).free
        if available < n_bytes:
            message = f"The pass needs up to {n_bytes:,} bytes of disk, but {self.path} has only {available:,} free."
            message += " Free some space or use fewer --tokens."
            raise DoesNotFitError(message, required_bytes=n_bytes, available_bytes=available)

    def restore(self, h: Tensor) -> list[LayerFindings]:
        """Returns the findings of finished layers, and sets `h` to the residual stream behind them.

        Returns none, and leaves `h`, if they cannot be read. Raises DoesNotFitError if the disk has too little room for
        the streams of the pass.
        """
        self.reserve(_STATES_AT_ONCE * h.numel() * 4)
        n_done = self.n_done
        if not n_done:
            return []
        try:
            findings = []
            for layer in range(n_done):
                arrays, _ = read_arrays(self._layer_path(layer))
                findings.append(LayerFindings(from_arrays(LayerStatistics, arrays), arrays.get(_PREDICTED)))
            rows = np.load(self._stream_path(n_done), mmap_mode="c")
        except (StatisticsError, KeyError, OSError, ValueError):
            return []
        h.copy_(torch.from_numpy(rows))
        return findings

    def add(self, findings: LayerFindings, h: Tensor) -> None:
        """Stores the findings of the next layer, and replaces the stored residual stream with that behind the layer.

        Raises UsageError or DoesNotFitError if the files cannot be written.
        """
        layer = self.n_done
        arrays = to_arrays(findings.statistics)
        if findings.predicted is not None:
            arrays[_PREDICTED] = findings.predicted
        write_arrays(arrays, self._layer_path(layer), {})
        save_rows(self._stream_path(layer + 1), h)
        write_whole(self.path / _STATE, json.dumps({"key": dict(self.key), "n_done": layer + 1}).encode())
        self._stream_path(layer).unlink(missing_ok=True)

    def _layer_path(self, layer: int) -> Path:
        return self.path / f"layer-{layer:04}.safetensors"

    def _stream_path(self, n_done: int) -> Path:
        return self.path / f"stream-{n_done:04}.npy"


def save_rows(path: Path, rows: Tensor) -> None:
    """Writes a matrix to a .npy file, whole or not at all; raises as `whole_file` does."""
    with whole_file(path) as part, part.open("wb") as file:
        np.save(file, rows.numpy())


Sums = dict[str, NDArray[np.float64]]

_BACKWARD_STATE = "backward.json"


class PartialBackward:
    """The state of one backward pass, which `key` identifies, in the folder `path` of its calibration.

    Steps have the numbers of their layers, and the head that after the last layer; they are done from the highest down.
    """

    def __init__(self, path: Path, key: str, n_layer: int) -> None:
        self._path, self._key, self._n_layer = path, key, n_layer

    def restore(self, gradient: Tensor) -> dict[int, Sums]:
        """Returns the sums of finished steps, and sets `gradient` to that before the last of them.

        Returns none if they cannot be read.
        """
        try:
            state = json.loads((self._path / _BACKWARD_STATE).read_text("utf-8"))
            if state["key"] != self._key:
                return {}
            last = int(state["step"])
            found: dict[int, Sums] = {step: read_arrays(self._sums(step))[0] for step in range(last, self._n_layer + 1)}
            gradient.copy_(torch.from_numpy(np.load(self._gradient(last), mmap_mode="c")))
        except (StatisticsError, KeyError, TypeError, OSError, ValueError, RuntimeError):
            return {}
        return found

    def add(self, step: int, sums: Sums, gradient: Tensor) -> None:
        """Stores the sums of the next step, and replaces the stored gradient with that before the step.

        Raises UsageError or DoesNotFitError if the files cannot be written.
        """
        write_arrays(sums, self._sums(step), {})
        state: dict[str, Any] = {"key": self._key, "step": step}
        save_rows(self._gradient(step), gradient)
        write_whole(self._path / _BACKWARD_STATE, json.dumps(state).encode())
        self._gradient(step + 1).unlink(missing_ok=True)

    def _sums(self, step: int) -> Path:
        return self._path / f"backward-{step:04}.safetensors"

    def _gradient(self, step: int) -> Path:
        return self._path / f"gradient-{step:04}.npy"
