"""The end of a model in torch, the last norm and the output matrix, which make logits of hidden states."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from slimoe.converter.forward.block import read_output_norm, read_tensor
from slimoe.converter.forward.norms import Norm
from slimoe.converter.source.model_source import MatrixKey, ModelSource


@dataclass(frozen=True, slots=True)
class Head:
    """The last norm, the output matrix [n_vocab, n_embd] and its bias [n_vocab], if any.

    Logits are `scale` times its products, bounded by `softcap` if that is not 0.
    """

    norm: Norm
    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float = 0.0
    max_logits: int = 1 << 23
    """The most logits that are held at once, 32 MiB of them."""

    def __call__(self, h: Tensor) -> Tensor:
        """Logits [n, n_vocab] of hidden states behind the last layer [n, n_embd]."""
        logits = self.scale * torch.nn.functional.linear(self.norm(h), self.weight, self.bias)
        return self.softcap * (logits / self.softcap).tanh() if self.softcap else logits

    def slopes(self, logits: Tensor) -> Tensor | float:
        """The derivatives of these logits by the products of the matrix."""
        return self.scale * (1 - (logits / self.softcap).square()) if self.softcap else self.scale

    def spans(self, n_rows: int) -> Iterator[slice]:
        """Cuts `n_rows` rows into parts whose logits are few enough to be held at once."""
        step = max(1, self.max_logits // self.weight.shape[0])
        yield from (slice(begin, min(begin + step, n_rows)) for begin in range(0, n_rows, step))


def read_head(source: ModelSource, device: str = "cpu") -> Head:
    """A model's head, whose matrix is that of the embeddings where it has none of its own; raises ModelFileError."""
    output = MatrixKey("output.weight")
    table = read_tensor(source, output if output in source.shapes else MatrixKey("token_embd.weight"), device)
    key = MatrixKey("output.bias")
    bias = read_tensor(source, key, device) if key in source.shapes else None
    scales = source.spec.multipliers
    return Head(read_output_norm(source, device), table, bias, scales.logits, scales.softcap)
