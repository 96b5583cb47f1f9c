"""The end of a model: the last norm and the output matrix, which turn streams into logits."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from slimoe.converter.forward.block import read_tensor, rms_norm
from slimoe.converter.source.model_source import MatrixKey, ModelSource

_LOGITS_AT_ONCE = 1 << 23
"""So many numbers, 32 MiB, are held of logits at once."""


@dataclass(frozen=True, slots=True)
class Head:
    """The last norm [n_embd] and the output matrix [n_vocab, n_embd]."""

    norm: Tensor
    weight: Tensor
    eps: float

    def __call__(self, h: Tensor) -> Tensor:
        """Logits [n, n_vocab] of streams behind the last layer [n, n_embd]."""
        return rms_norm(h, self.norm, self.eps) @ self.weight.T

    def spans(self, n_rows: int) -> Iterator[slice]:
        """Rows in parts whose logits are few enough to be held at once."""
        step = max(1, _LOGITS_AT_ONCE // self.weight.shape[0])
        yield from (slice(begin, min(begin + step, n_rows)) for begin in range(0, n_rows, step))


def read_head(source: ModelSource, device: str = "cpu") -> Head:
    """A model's head, whose matrix is that of the embeddings where it has none of its own; raises ModelFileError."""
    output = MatrixKey("output.weight")
    table = read_tensor(source, output if output in source.shapes else MatrixKey("token_embd.weight"), device)
    return Head(read_tensor(source, MatrixKey("output_norm.weight"), device), table, source.spec.rms_eps)
