"""Which tensors of a file are trained, and how: by Adam, each at a rate in units of its own values."""

from collections.abc import Sequence

import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from slimoe.converter.layout.layer import CHOICE_BIAS, ROUTER
from slimoe.converter.source.model_source import MatrixKey, ModelSource
from slimoe.offload.model.tensor_list import AUX_GAIN, AUX_SHIFT

_MATRICES = (f".{ROUTER}.weight", f".{AUX_GAIN}.", f".{AUX_SHIFT}.", "_exps.bias")
"""Parts of the names of what is trained though it is no vector."""
_DECAY, _SQUARE_DECAY = 0.9, 0.995
SLOWER = 3.0
"""What rates are divided by where they have led to nothing better."""
_LEAST_SIZE = 0.01
"""What stands for the size of tensors that are smaller, such as those that are zero at first."""


def trained_keys(model: ModelSource) -> tuple[MatrixKey, ...]:
    """The tensors of a file that healing changes, all in F32.

    They are routers, norms, biases, scales, sinks, constant experts and the vectors of compressed ones. What only
    selects experts gets no gradient, and the divisors of the rotation are the architecture's.
    """
    keys = []
    for key, shape in model.shapes.items():
        blocks = model.blocks(key)
        is_small = len(shape) == 1 or any(part in key.name for part in _MATRICES)
        is_own = key.name.startswith(("blk.", "output", "token_embd_norm.")) and f".{CHOICE_BIAS}." not in key.name
        if is_small and is_own and blocks is not None and blocks.type is Type.F32:
            keys.append(key)
    return tuple(keys)


def of_layer(keys: Sequence[MatrixKey], layer: int) -> tuple[MatrixKey, ...]:
    """Those of the keys that are of one layer."""
    return tuple(key for key in keys if key.name.startswith(f"blk.{layer}."))


class Adam:
    """Adam's moments of some tensors, written out, as torch's own takes seconds to import.

    Rates are in units of the root of a tensor's mean square at first, so that one fits norms and routers alike.
    """

    def __init__(self, tensors: Sequence[Tensor], rate: float) -> None:
        self._tensors, self.n_step = tensors, 0
        self._rates = [rate * max(_LEAST_SIZE, float(one.detach().square().mean().sqrt())) for one in tensors]
        self.means, self.squares = ([torch.zeros_like(one) for one in tensors] for _ in range(2))

    def slow_down(self, factor: float) -> None:
        """Divides the rates, and forgets where the steps led."""
        self._rates = [rate / factor for rate in self._rates]
        for mean in self.means:
            mean.zero_()

    def step(self, loss: Tensor, part: float) -> None:
        """Changes the tensors in place, against the gradient of the loss, by `part` of the rate."""
        gradients = torch.autograd.grad(loss, self._tensors, allow_unused=True)
        self.n_step += 1
        with torch.no_grad():
            for tensor, gradient, mean, square, rate in zip(
                self._tensors, gradients, self.means, self.squares, self._rates, strict=True
            ):
                if gradient is None:
                    continue
                mean.lerp_(gradient, 1 - _DECAY)
                square.lerp_(gradient.square(), 1 - _SQUARE_DECAY)
                size = (square / (1 - _SQUARE_DECAY**self.n_step)).sqrt()
                tensor -= part * rate * (mean / (1 - _DECAY**self.n_step)) / size.clamp(min=1e-12)
