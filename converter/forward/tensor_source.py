"""A source whose matrices are tensors on a device, to some of which gradients flow."""

from collections.abc import Collection, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slimoe.converter.source.held_source import HeldSource
from slimoe.converter.source.model_source import MatrixKey, ModelSource


class TensorSource(HeldSource):
    """A ModelSource whose tensors stay on a device once they were read; the trained ones may be changed in place."""

    def __init__(self, source: ModelSource, device: str = "cpu") -> None:
        super().__init__(source)
        self.device = device
        self._tensors: dict[MatrixKey, Tensor] = {}
        self._trained: dict[MatrixKey, Tensor] = {}

    @property
    def trained(self) -> Mapping[MatrixKey, Tensor]:
        """The tensors to which gradients flow, by name."""
        return self._trained

    def train(self, keys: Collection[MatrixKey]) -> None:
        """Lets gradients flow to these tensors, which are kept until the end; raises ModelFileError."""
        for key in keys:
            self._trained[key] = torch.tensor(self._source.read(key), device=self.device, requires_grad=True)

    def tensor(self, key: MatrixKey) -> Tensor:
        """A matrix or vector on the device; raises ModelFileError."""
        found = self._trained.get(key)
        if found is None:
            found = self._tensors.get(key)
        if found is None:
            found = self._tensors[key] = torch.from_numpy(self._source.read(key)).to(self.device)
        return found

    def release(self) -> None:
        """Forgets what is not trained."""
        self._tensors.clear()

    def read(self, key: MatrixKey) -> NDArray[np.float32]:
        """Returns the values, as far as they are trained; raises ModelFileError."""
        found = self._trained.get(key)
        values: NDArray[np.float32] = self._source.read(key) if found is None else found.detach().cpu().numpy().copy()
        return values
